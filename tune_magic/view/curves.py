"""ROC, precision against recall, and calibration of a classifier, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tune_magic.view.figure import PALETTE, literal
from tune_magic.view.html import GREY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DOT = 90.0  # area of the largest dot of calibration


def curves_figure(curves: dict[str, Any]) -> Figure:
    """Draw the curves of each class, and of calibration a dot for each tenth of probability, larger with more rows.

    Args:
        curves: As `evaluation.curves.curves_of` returns them.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tune_magic", "font.size": 7}):
        figure = Figure(figsize=(6.4, 2.5), dpi=100, layout="constrained")
        figure.patch.set_alpha(0)
        roc, precision, calibration = figure.subplots(1, 3)
        _of_classes(roc, curves["roc"], "false positives", "found", "ROC")
        _of_classes(precision, curves["precision_recall"], "found", "right of those", "precision and recall")
        roc.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
        _of_sureness(calibration, curves["calibration"])
        handles, names = roc.get_legend_handles_labels()
        if names:
            figure.legend(
                handles, names, loc="outside lower center", ncols=4, frameon=False, labelcolor=GREY, fontsize=7
            )
    return figure


def _of_classes(axes: Any, curves: dict[str, list[list[float]]], across: str, up: str, title: str) -> None:
    for (name, points), colour in zip(curves.items(), PALETTE, strict=False):
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=colour, linewidth=1.3, label=literal(name)[:24])
    _style(axes, across, up, title)


def _of_sureness(axes: Any, tenths: list[list[float]]) -> None:
    most = max((count for _, _, count in tenths), default=1)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
    sure, right, counts = zip(*tenths, strict=True)
    axes.plot(sure, right, color=PALETTE[0], linewidth=1.3)
    axes.scatter(sure, right, s=[max(6.0, _DOT * count / most) for count in counts], color=PALETTE[0], alpha=0.7)
    _style(axes, "how sure", "how often right", "calibration")


def _style(axes: Any, across: str, up: str, title: str) -> None:
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.04), facecolor="none")
    axes.set_title(title, color=GREY, fontsize=8, loc="left")
    axes.set_xlabel(across, color=GREY)
    axes.set_ylabel(up, color=GREY)
    axes.set_xticks([0, 0.5, 1])
    axes.set_yticks([0, 0.5, 1])
    axes.tick_params(colors=GREY, length=0)
    axes.grid(color=GREY, alpha=0.2, linewidth=0.8)
    for spine in axes.spines.values():
        spine.set_visible(False)
