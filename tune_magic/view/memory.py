"""Gauges: what holds how much memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tune_magic.view import words
from tune_magic.view.html import BLUE, GREY, ORANGE, RED, Bundle, Html, bar, box, bundle, clean, div, grey, span, table

_TIGHT, _FULL = 0.8, 0.93


@dataclass(frozen=True)
class Gauge:
    """Memory of something, in bytes, against all there is."""

    name: str
    used: int
    total: int

    @property
    def share(self) -> float:
        """Part of all there is, from 0 to 1."""
        return self.used / self.total if self.total else 0.0

    @property
    def mark(self) -> tuple[str, int]:
        """Changes when the gauge has moved by a hundredth."""
        return self.name, round(100 * self.share)


def gauge_table(gauges: Sequence[Gauge]) -> Html:
    """Return a bar for each."""
    cells: list[list[object]] = [
        [
            span(clean(gauge.name, 40), style=f"color:{GREY};white-space:nowrap"),
            div(bar(gauge.share, _colour(gauge.share), 8), style="width:160px;margin-top:5px"),
            span(f"{words.size(gauge.used)} of {words.size(gauge.total)}", style="white-space:nowrap"),
        ]
        for gauge in gauges
    ]
    return table(cells, align="llr")


def gauges_bundle(gauges: Sequence[Gauge], clock: str) -> Bundle:
    """Return the gauges as HTML and as text, with the time of the look."""
    lines = [f"memory at {clock}"]
    lines += [f"  {gauge.name}: {words.size(gauge.used)} of {words.size(gauge.total)}" for gauge in gauges]
    return bundle(box(grey(f"memory at {clock}"), gauge_table(gauges)), lines)


def _colour(share: float) -> str:
    return RED if share >= _FULL else ORANGE if share >= _TIGHT else BLUE
