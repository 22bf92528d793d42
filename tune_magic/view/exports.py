"""Several exports of a run: a table, and quality against size as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tune_magic.storage.events import number
from tune_magic.view import words
from tune_magic.view.figure import svg
from tune_magic.view.html import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    Bundle,
    box,
    bundle,
    clean,
    div,
    grey,
    heading,
    image,
    span,
    table,
    tag,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {True: GREEN, False: RED, None: ORANGE}
_WORDS = {True: "same", False: "out of tolerance", None: "not compared"}
_LOW_SHARE = 0.15  # of the highest: there is no room for a name below
_HEADS = ("export", "size", "same answers", "right", "largest logit difference", "loss", "latency", "")
COLUMNS = (
    "to", "quantize", "size_bytes", "rows", "same_answers", "same_share", "logit_share", "trained_right",
    "exported_right", "right_share", "trained_loss", "exported_loss", "trained_seconds", "exported_seconds", "unit",
    "computed_by", "ok", "path",
)  # fmt: skip


def export_rows(receipts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a line of figures for each receipt, None where there is no such figure; see `COLUMNS`."""
    found = []
    for receipt in receipts:
        parity = receipt.get("parity", {})
        rows = parity.get("rows")
        largest = number(parity["largest_logit"]) if rows else 0.0
        right = parity.get("exported_right")
        row = {**receipt, **parity}
        row |= {
            "same_share": parity["same_answers"] / rows if rows else None,
            "logit_share": number(parity["logit_difference"]) / largest if largest else None,
            "right_share": right / rows if rows and right is not None else None,
        }
        found.append({column: row.get(column) for column in COLUMNS})
    return found


def exports_figure(receipts: Sequence[dict[str, Any]]) -> Figure:
    """Draw answers that are right, or the same where nobody knows what is right, and latency, each against size.

    A line across the first panel is the trained model.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = [row for row in export_rows(receipts) if row["rows"]]
    knows = bool(rows) and all(row["right_share"] is not None for row in rows)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tune_magic", "font.size": 8}):
        figure = Figure(figsize=(7.2, 2.6), dpi=100)
        figure.patch.set_alpha(0)
        quality, speed = figure.subplots(1, 2)
        _points(quality, rows, [100 * row["right_share" if knows else "same_share"] for row in rows])
        if knows:
            trained = 100 * max(row["trained_right"] / row["rows"] for row in rows)
            quality.axhline(trained, color=GREY, linewidth=0.8, linestyle=":")
        _points(speed, rows, [1000 * number(row["exported_seconds"]) for row in rows])
        unit = rows[0]["unit"] if rows else "row"
        _titled(quality, "right answers in %" if knows else "same answers in %")
        _titled(speed, f"ms a {unit}")
        quality.set_ylim(-5, 109)
        speed.set_ylim(bottom=0)
        figure.subplots_adjust(left=0.07, right=0.97, top=0.88, bottom=0.19, wspace=0.2)
    return figure


def exports_card(receipts: Sequence[dict[str, Any]], name: str) -> Bundle:
    """Return the card of all exports of a run, smallest first."""
    ordered = sorted(receipts, key=lambda receipt: int(receipt["size_bytes"]))
    title = f"{len(ordered)} export{'' if len(ordered) == 1 else 's'}"
    rows = export_rows(ordered)
    lines = [_line(row) for row in rows]
    cells: list[list[object]] = [[grey(head) for head in _HEADS]]
    for row, line in zip(rows, lines, strict=True):
        verdict = span("● ", _WORDS[row["ok"]], style=f"color:{_COLOURS[row['ok']]}")
        cells.append([tag("b", line[0]), *line[1:-1], verdict])
    drawn = image(svg(exports_figure(ordered)), f"quality and latency against size of {title} of {clean(name, 40)}")
    picture = div(drawn, style="max-width:640px") if any(row["rows"] for row in rows) else None
    body = [heading(BLUE, name, title, ""), picture, table(cells, align="lrrrrrrl")]
    return bundle(
        box(*(part for part in body if part)), [f"{name}: {title}", *("  " + " · ".join(line) for line in lines)]
    )


def _line(row: dict[str, Any]) -> list[str]:
    """Return a line of the table in words."""
    called, size = _called(row), words.size(row["size_bytes"])
    if not row["rows"]:
        return [called, size, *["–"] * 5, _WORDS[row["ok"]]]
    right, loss = "–", "–"
    if row["exported_right"] is not None:
        right = f"{row['trained_right']} → {row['exported_right']}"
    if row["exported_loss"] is not None:
        loss = f"{number(row['trained_loss']):.3f} → {number(row['exported_loss']):.3f}"
    share = "–" if row["logit_share"] is None else f"{row['logit_share']:.2%}"
    latency = f"{1000 * number(row['exported_seconds']):.1f} ms a {row['unit'] or 'row'}"
    return [called, size, f"{row['same_answers']} of {row['rows']}", right, share, loss, latency, _WORDS[row["ok"]]]


def _called(row: dict[str, Any]) -> str:
    return f"{row['to']} {row['quantize']}" if row["quantize"] else str(row["to"])


def _points(axes: Axes, rows: Sequence[dict[str, Any]], values: Sequence[float]) -> None:
    """Draw a point for each export, with its name; names above and below in turn, for points lie close; none on the axis."""
    lowest = _LOW_SHARE * max(values, default=0.0)
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        size = row["size_bytes"] / 1e6
        axes.plot(size, value, "o", color=_COLOURS[row["ok"]], markersize=5)
        above = place % 2 == 0 or value < lowest
        far = 6 + 9 * (place // 2 % 2)  # names of points side by side stand on two lines
        axes.annotate(
            clean(_called(row), 24).replace("$", r"\$"), (size, value), xytext=(0, far if above else -far),
            textcoords="offset points", ha="center", va="bottom" if above else "top", color=GREY, fontsize=7,
        )  # fmt: skip


def _titled(axes: Axes, title: str) -> None:
    axes.set_title(title, color=GREY, fontsize=8, loc="left")
    axes.set_xlabel("MB", color=GREY)
    axes.margins(x=0.18, y=0.2)
    axes.set_xlim(left=0)
    axes.tick_params(colors=GREY, length=2)
    axes.patch.set_alpha(0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)
