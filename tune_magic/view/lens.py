"""The label lens: the first rows as the model sees them, trained tokens marked, cut ones struck."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tune_magic.view.html import GREY, MARK, Html, div, escape, grey, span

_TEXT = "white-space:pre-wrap;overflow-wrap:anywhere;font-family:monospace;font-size:12px"
_TRAINED = f"background:{MARK};border-bottom:2px solid {MARK}"
_CUT = f"text-decoration:line-through;color:{GREY}"
_MOST = 1200  # characters of a piece
_LINE = 240


def lens(rows: Sequence[dict[str, Any]]) -> Html:
    """Return rows as `data.lens.lens` describes them."""
    has_cut = any(row["cut"] for row in rows)
    legend = [
        grey("label lens: what the model sees; "),
        span("what it learns", style=_TRAINED),
        *([grey("; "), span("what was cut off", style=_CUT)] if has_cut else []),
    ]
    return div(div(*legend), *map(_row, rows))


def lens_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the same as lines of text: «trained», ~~cut off~~."""
    lines = ["  label lens («trained», ~~cut off~~):"]
    for row in rows:
        text = "".join(f"«{piece}»" if trained else piece for piece, trained in row["spans"])
        cut = f"~~{_flat(row['cut_text'])[:60]}~~" if row.get("cut_text") else ""
        label = f"«{row['label']}», " if "label" in row else ""
        lines.append(f"    {_flat(text)[:_LINE]}{cut} ({label}{_numbers(row)})")
    return lines


def _row(row: dict[str, Any]) -> Html:
    pieces = [span(escape(text, _MOST), style=_TRAINED if trained else "") for text, trained in row["spans"]]
    if row.get("cut_text"):
        pieces.append(span(escape(row["cut_text"], _MOST), style=_CUT))
    label = span(escape(row["label"], _LINE), style=_TRAINED) if "label" in row else None
    numbers = grey(label, " · " if label else None, _numbers(row), size=11)
    return div(div(*pieces, style=_TEXT), numbers, style="margin-top:8px")


def _numbers(row: dict[str, Any]) -> str:
    cut = f", {row['cut']} cut off" if row["cut"] else ""
    if "label" in row:
        return f"{row['tokens']} tokens{cut}"
    share = 100 * row["trained"] / max(1, row["tokens"])
    return f"{row['tokens']} tokens, {row['trained']} trained ({share:.0f} %){cut}"


def _flat(text: str) -> str:
    return " ".join(text.split())
