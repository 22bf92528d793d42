"""The loss curve. Figures are `Figure()` objects, never pyplot, which races with other threads."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tune_magic.storage.events import number
from tune_magic.storage.summary import Summary
from tune_magic.view.html import BLUE, GREEN, GREY, ORANGE, RED, clean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_POINTS = 160
_LEAST_POINTS = 20
_MOST_MARKERS = 40
_MOST_MARKS = 20
_MOST_NUMBERS = 80  # cells that carry their counts
_MOST_NAMES = 40
_LONGEST_NAME = 24
_STRONG = 0.7  # white numbers are read from here on
_SMOOTH_SHARE = 0.04
_EARLY = 12  # before a twelfth of the steps the curve would be a blot on the left
_PATHS = re.compile(rb' d="[^"]*"')
_FINE = re.compile(rb"(\.\d\d)\d+")  # a hundredth of a point is not seen, and cards have a budget
PALETTE = (BLUE, ORANGE, GREEN, RED, "#a371f7", "#1fb8c9", "#d29922", "#e36bb0")
Points = list[tuple[float, float]]


def thin(points: Points, most: int = _MOST_POINTS) -> Points:
    """Keep the lowest and highest point of each bucket, so that spikes stay however long the run.

    Example:
        >>> len(thin([(x, 0.0) for x in range(10_000)])) <= 160
        True
    """
    if len(points) <= most:
        return points
    width = math.ceil(len(points) / (most // 2))
    kept: Points = []
    for start in range(0, len(points), width):
        bucket = points[start : start + width]
        low, high = min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])
        kept += sorted({low, high})
    return kept


def smooth(values: Sequence[float]) -> list[float]:
    """Return an exponential moving average without the pull of its start; non-finite values are passed over.

    The window grows with the run: about a twenty-fifth of its steps, at least four.
    """
    decay = 1 - 1 / max(4.0, _SMOOTH_SHARE * len(values))
    total = weight = 0.0
    smoothed = []
    for item in values:
        if math.isfinite(item):
            total, weight = decay * total + (1 - decay) * item, decay * weight + (1 - decay)
        smoothed.append(total / weight if weight else math.nan)
    return smoothed


def loss_figure(summary: Summary, total_steps: int | None = None) -> Figure:
    """Draw train loss, its smoothed form, and held-out loss by step.

    Args:
        summary: The run's.
        total_steps: Right end of the axis; default: the plan's.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    steps = sorted(summary.steps)
    losses = [number(summary.steps[step]["loss"]) for step in steps]
    held_out = [(float(s), number(e["loss"])) for s, e in sorted(summary.evaluations.items())]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tune_magic", "path.simplify": True, "font.size": 8}):
        figure = Figure(figsize=(6.4, 2.3), dpi=100)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        raw = thin([(float(s), v) for s, v in zip(steps, losses, strict=True) if math.isfinite(v)])
        even = thin([(float(s), v) for s, v in zip(steps, smooth(losses), strict=True) if math.isfinite(v)])
        held_out = thin([point for point in held_out if math.isfinite(point[1])], _MOST_POINTS // 2)
        _line(axes, raw, BLUE, width=0.8, alpha=0.35)
        _line(axes, even, BLUE, width=1.8)
        _line(axes, held_out, ORANGE, width=1.5, marker="o" if len(held_out) <= _MOST_MARKERS else "")
        _labels(axes, even, held_out)
        best = summary.best
        if best is not None and len(held_out) > 2:
            axes.axvline(best["step"], color=GREEN, linewidth=1, linestyle=":")
            axes.annotate(
                f"best · step {best['step']}", (best["step"], 0.96), xycoords=("data", "axes fraction"),
                xytext=(-4, 0), textcoords="offset points", ha="right", va="top", color=GREEN, fontsize=7,
            )  # fmt: skip
        lost = [step for step, loss in zip(steps, losses, strict=True) if not math.isfinite(loss)]
        for step in lost[:_MOST_MARKS]:
            axes.axvline(step, color=RED, linewidth=1)
        _style(axes, _right_end(summary, total_steps or summary.plan.get("total_steps") or 1))
        figure.subplots_adjust(left=0.065, right=0.91, top=0.9, bottom=0.2)
    return figure


def overlaid_figure(summaries: Mapping[str, Summary]) -> Figure:
    """Draw the losses of several runs over each other, each in its colour: held-out strong, train thin.

    Args:
        summaries: By what each run is called; from the ninth on, colours come again.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    most = max(_MOST_POINTS // max(1, len(summaries)), _LEAST_POINTS)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tune_magic", "path.simplify": True, "font.size": 8}):
        figure = Figure(figsize=(7.2, 2.8), dpi=100)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        for number_of, (name, summary) in enumerate(summaries.items()):
            colour = PALETTE[number_of % len(PALETTE)]
            steps = sorted(summary.steps)
            train = smooth([number(summary.steps[step]["loss"]) for step in steps])
            held_out = [(float(s), number(e["loss"])) for s, e in sorted(summary.evaluations.items())]
            finite = [(float(s), v) for s, v in zip(steps, train, strict=True) if math.isfinite(v)]
            scored = [point for point in held_out if math.isfinite(point[1])]
            _line(axes, thin(finite, most), colour, width=0.9, alpha=0.5)
            marker = "o" if len(scored) * len(summaries) <= _MOST_MARKERS else ""
            _line(axes, thin(scored, most), colour, width=1.8, marker=marker)
            axes.plot([], [], color=colour, linewidth=1.8, label=literal(clean(name, _LONGEST_NAME)))
        _style(axes, max((summary.step for summary in summaries.values()), default=1))
        legend = axes.legend(loc="best", frameon=False, fontsize=8)
        for text in legend.get_texts():
            text.set_color(GREY)
        axes.set_title("loss: held-out strong, train thin", color=GREY, fontsize=8, loc="left")
        figure.subplots_adjust(left=0.06, right=0.98, top=0.9, bottom=0.17)
    return figure


def tradeoff_figure(points: Mapping[str, tuple[float, float]], score: str) -> Figure:
    """Draw a score (up) against the number of trained parameters (across, by powers of ten).

    Args:
        points: Parameters and score by name.
        score: Its name.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tune_magic", "font.size": 8}):
        figure = Figure(figsize=(5.6, 2.6), dpi=100)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        for number_of, (name, place) in enumerate(sorted(points.items(), key=lambda item: item[1])):
            colour = PALETTE[number_of % len(PALETTE)]
            axes.plot(*([part] for part in place), color=colour, marker="o", markersize=6, linewidth=0)
            above = number_of % 2 == 0  # neighbours often lie beside each other
            axes.annotate(
                literal(clean(name, _LONGEST_NAME)), place, xytext=(0, 7 if above else -7),
                textcoords="offset points", ha="center", va="bottom" if above else "top", color=colour, fontsize=8,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.margins(x=0.15, y=0.25)
        axes.set_facecolor("none")
        for side in axes.spines.values():
            side.set_visible(False)
        axes.grid(color=GREY, alpha=0.2, linewidth=0.8)
        axes.tick_params(which="both", colors=GREY, length=0, labelsize=8)
        axes.set_xlabel("trained parameters", color=GREY, fontsize=8)
        axes.set_title(score, color=GREY, fontsize=8, loc="left")
        figure.subplots_adjust(left=0.1, right=0.97, top=0.89, bottom=0.19)
    return figure


def rates_figure(found: Mapping[str, Any]) -> Figure:
    """Draw the loss against a rising learning rate, with the rates that were found in it.

    Args:
        found: ``rates``, ``losses`` and ``smoothed`` of each step; ``learning_rate``, ``steepest`` and ``lowest``, or None.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rates, smoothed = found["rates"], found["smoothed"]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tune_magic", "font.size": 8}):
        figure = Figure(figsize=(6.4, 2.3), dpi=100)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        _line(axes, list(zip(rates, found["losses"], strict=True)), BLUE, width=0.8, alpha=0.35)
        _line(axes, list(zip(rates, smoothed, strict=True)), BLUE, width=1.8)
        for key, name, colour in (("learning_rate", "suggested", GREEN), ("lowest", "lowest", GREY)):
            if found[key] is not None:
                axes.axvline(found[key], color=colour, linewidth=1, linestyle=":")
                axes.annotate(
                    name, (found[key], 0.04), xycoords=("data", "axes fraction"), xytext=(-4, 0),
                    textcoords="offset points", ha="right", va="bottom", color=colour, fontsize=7,
                )  # fmt: skip
        if found["steepest"] is not None:
            place = rates.index(found["steepest"])
            axes.plot(rates[place], smoothed[place], color=ORANGE, marker="o", markersize=5)
        _style(axes, 1)
        axes.set_xscale("log")
        if rates:
            axes.set_xlim(rates[0], max(rates[-1], 2 * rates[0]))
            fall = max(smoothed[0] - min(smoothed), 0.02 * abs(smoothed[0]))
            axes.set_ylim(min(smoothed) - 0.2 * fall, smoothed[0] + fall)  # what has left all bounds need not be seen
        axes.minorticks_off()
        axes.set_xlabel("learning rate", color=GREY, fontsize=8)
        figure.subplots_adjust(left=0.065, right=0.98, top=0.9, bottom=0.2)
    return figure


def lengths_figure(lengths: Mapping[str, Sequence[int]], limit: int) -> Figure:
    """Draw how many rows have how many tokens, with the limit where it is in sight.

    Args:
        lengths: ``edges`` of the bins and ``counts`` in them.
        limit: Longest example in tokens.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    edges, counts = lengths["edges"], lengths["counts"]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tune_magic", "font.size": 8}):
        figure = Figure(figsize=(4.2, 1.7), dpi=100)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        widths = [b - a for a, b in itertools.pairwise(edges)]
        axes.bar(edges[:-1], counts, widths, align="edge", color=BLUE, alpha=0.75, linewidth=0)
        _style(axes, edges[-1])
        if limit <= edges[-1]:
            axes.axvline(limit, color=ORANGE, linewidth=1, linestyle=":")
        axes.set_xlabel("tokens", color=GREY, fontsize=8)
        axes.set_title("rows by length", color=GREY, fontsize=8, loc="left")
        figure.subplots_adjust(left=0.1, right=0.98, top=0.86, bottom=0.25)
    return figure


def confusion_figure(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """Draw how often rows of a class (down) were given a class (across), darker by the share of the class's rows.

    Args:
        counts: (classes, classes) numbers of rows.
        names: Of the classes.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    count = len(names)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(6.4, 1.8 + 0.36 * count)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tune_magic", "font.size": 7}):
        figure = Figure(figsize=(side, side * 0.82), dpi=100, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        _cells(axes, counts, shares)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(range(count) if count <= _MOST_NAMES else [])
        if count <= _MOST_NAMES:
            shown = [name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…" for name in names]
            axes.set_xticklabels([literal(name) for name in shown], rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticklabels([literal(name) for name in shown])
        axes.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5), facecolor="none")
        axes.set_xlabel("chosen", color=GREY)
        axes.set_ylabel("given", color=GREY)
        axes.tick_params(colors=GREY, length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure


def _cells(axes: Any, counts: np.ndarray, shares: np.ndarray) -> None:
    """Fill the cells that are not empty: blue where given and chosen agree, orange where they do not.

    One small picture for all cells, since a rectangle each would not fit a card's budget; numbers while there are few.
    """
    from matplotlib.colors import to_rgb

    cells = np.zeros((*counts.shape, 4))
    cells[..., :3] = to_rgb(ORANGE)
    cells[np.arange(len(counts)), np.arange(len(counts)), :3] = to_rgb(BLUE)
    cells[..., 3] = np.where(counts > 0, 0.15 + 0.75 * shares, 0.0)
    axes.imshow(cells, interpolation="none", aspect="auto")
    filled = list(zip(*np.nonzero(counts), strict=True))
    for given, chosen in filled if len(filled) <= _MOST_NUMBERS else []:
        text, strong = str(counts[given, chosen]), cells[given, chosen, 3] >= _STRONG
        axes.text(chosen, given, text, ha="center", va="center", color="white" if strong else GREY)


def literal(name: str) -> str:
    """Keep matplotlib from reading dollar signs as mathematics."""
    return clean(name).replace("$", r"\$")


def svg(figure: Figure) -> bytes:
    """Return a figure as SVG with real text and a transparent ground."""
    from matplotlib import rc_context

    out = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tune_magic"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _PATHS.sub(lambda path: _FINE.sub(rb"\1", path[0]), out.getvalue())


def _line(axes: Any, points: Points, colour: str, *, width: float, alpha: float = 1.0, marker: str = "") -> None:
    if points:
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=colour, linewidth=width, alpha=alpha, marker=marker, markersize=4)


def _labels(axes: Any, train: Points, held_out: Points) -> None:
    """Name each line at its end, apart from each other."""
    ends = [(points[-1], name, colour) for points, name, colour in
            ((train, "train", BLUE), (held_out, "held-out", ORANGE)) if points]  # fmt: skip
    lower = min(ends, key=lambda end: end[0][1])[1] if ends else ""
    for (x, y), name, colour in ends:
        shift = (-4 if name == lower else 4) if len(ends) > 1 else 0
        axes.annotate(
            name, (x, y), xytext=(6, shift), textcoords="offset points", color=colour, va="center", fontsize=8
        )


def _right_end(summary: Summary, total_steps: int) -> int:
    """Return where the axis ends: at the plan's last step, at what was reached when it ended, nearer at the start."""
    reached = max(summary.step, 1)
    if summary.ended is not None:
        return reached
    return total_steps if reached * _EARLY >= total_steps else reached * _EARLY // 2


def _style(axes: Any, total_steps: int) -> None:
    axes.set_xlim(0, max(total_steps, 1) * 1.02)
    axes.set_ylim(bottom=0)
    axes.set_facecolor("none")
    for side in axes.spines.values():
        side.set_visible(False)
    axes.grid(axis="y", color=GREY, alpha=0.2, linewidth=0.8)
    axes.tick_params(colors=GREY, length=0, labelsize=8)
    axes.locator_params(axis="y", nbins=5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step", color=GREY, fontsize=8)
    axes.set_title("loss", color=GREY, fontsize=8, loc="left")
