"""Gauges: what holds how much memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tune_magic.view import words
from tune_magic.view.html import (
    BLUE,
    GREY,
    ORANGE,
    RED,
    Bundle,
    Html,
    bar,
    box,
    bundle,
    clean,
    code,
    div,
    grey,
    span,
    table,
)

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


class Held(Protocol):
    """What is shown of something that holds memory."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def num_bytes(self) -> int: ...  # noqa: D102
    @property
    def gpu_bytes(self) -> int: ...  # noqa: D102
    @property
    def to_free(self) -> str: ...  # noqa: D102


def holding_card(gauges: Sequence[Gauge], held: Sequence[Held], freed_bytes: int | None = None) -> Bundle:
    """Return gauges, and below them who holds how much and what gives it back.

    Args:
        gauges: Against all there is.
        held: In their order.
        freed_bytes: What was given back just now; None where nobody asked for it.
    """
    has_gpu = any(row.gpu_bytes for row in held)
    rows: list[list[object]] = [[grey(name) for name in ("held by", "", "memory", *(["GPU"] * has_gpu), "to free it")]]
    lines = ["memory"] + [f"  {gauge.name}: {words.size(gauge.used)} of {words.size(gauge.total)}" for gauge in gauges]
    for row in held:
        sizes = [words.size(row.num_bytes), *([words.size(row.gpu_bytes)] * has_gpu)]
        rows.append([clean(row.name, 60), grey(row.kind), *sizes, code(row.to_free) if row.to_free else ""])
        lines.append(f"  {row.kind} {row.name}: {', '.join(sizes)}" + (f" · {row.to_free}" if row.to_free else ""))
    note = None if freed_bytes is None else f"{words.size(freed_bytes)} were given back"
    return bundle(
        box(
            gauge_table(gauges),
            table(rows, align="llr" + "r" * has_gpu + "l") if held else None,
            grey(note) if note else None,
        ),
        [*lines, note] if note else lines,
    )


def _colour(share: float) -> str:
    return RED if share >= _FULL else ORANGE if share >= _TIGHT else BLUE
