"""The card of a check-up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tune_magic.view.html import (
    BLUE,
    GREEN,
    ORANGE,
    RED,
    Bundle,
    box,
    bundle,
    code,
    div,
    escape,
    grey,
    heading,
    span,
    table,
)

_COLOURS = {"ok": GREEN, "warning": ORANGE, "problem": RED}
_MARKS = {"ok": "●", "warning": "▲", "problem": "■"}


class Finding(Protocol):
    """What is shown of a finding."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def verdict(self) -> str: ...  # noqa: D102
    @property
    def says(self) -> str: ...  # noqa: D102
    @property
    def do(self) -> str: ...  # noqa: D102


def findings_card(findings: Sequence[Finding]) -> Bundle:
    """Return findings as a table, a line each with what to do below it."""
    wrong = [finding for finding in findings if finding.verdict != "ok"]
    worst = "problem" if any(f.verdict == "problem" for f in wrong) else "warning" if wrong else "ok"
    summary = "all well" if not wrong else f"{len(wrong)} to look at"
    rows: list[list[object]] = [
        [
            span(f"{_MARKS[f.verdict]} ", style=f"color:{_COLOURS[f.verdict]}"),
            grey(f.name),
            div(escape(f.says, 400), div(grey("→ "), code(f.do)) if f.do else None),
        ]
        for f in findings
    ]
    told = [f"  {_MARKS[f.verdict]} {f.name}: {f.says}" + (f"\n      → {f.do}" if f.do else "") for f in findings]
    lines = [f"tune_magic: {summary}", *told]
    return bundle(box(heading(_COLOURS.get(worst, BLUE), "doctor", summary, ""), table(rows, align="lll")), lines)
