"""The card of an evaluation: scores, and the rows worth reading."""

from __future__ import annotations

from typing import Any

from tune_magic.evaluation.report import Scores
from tune_magic.storage.events import number
from tune_magic.view import words
from tune_magic.view.card import comparison_line, scores_table
from tune_magic.view.frame import Bundle
from tune_magic.view.html import (
    GREEN,
    GREY,
    Html,
    box,
    bundle,
    code,
    div,
    escape,
    grey,
    heading,
    rule,
    span,
    table,
    tag,
)

_TITLES = {"best": "gained most", "worst": "scored lowest", "regressed": "got worse"}
_CHARACTERS = 240


def report_card(report: Scores, name: str) -> Bundle:
    """Return the card of a report."""
    about = report.about
    subject = f"evaluated on {about['rows']} {about['split']} rows"
    caution = (
        "These rows also chose the checkpoint; a `test` file would not flatter." if about["chose_checkpoint"] else None
    )
    body = [
        heading(GREEN, name, subject, f"checkpoint of step {about['step']}"),
        scores_table(report.comparisons),
        div(grey("difference with its 95 % interval, paired bootstrap over the rows"), style="margin-top:4px"),
        div(grey(caution)) if caution else None,
        *(_examples(_TITLES[kind], rows) for kind, rows in report.notable().items() if rows),
    ]
    lines = [f"{name}: {subject} (checkpoint of step {about['step']})"]
    lines += [f"  {comparison_line(comparison)}" for comparison in report.comparisons.values()]
    lines += [f"  {caution}"] if caution else []
    return bundle(box(*(part for part in body if part)), lines)


def _examples(title: str, rows: list[dict[str, Any]]) -> Html:
    parts: list[object] = [tag("b", title)]
    for row in rows:
        if row["question"]:
            parts.append(div("“", escape(row["question"], _CHARACTERS), "”", style=f"color:{GREY};margin-top:4px"))
        cells: list[list[object]] = [
            [grey(side), code(escape(row[key], _CHARACTERS))]
            for side, key in (("expected", "reference"), ("base", "base"), ("tuned", "tuned"))
            if row.get(key) is not None
        ]
        losses = f"{words.value(number(row['loss_base']))} → {words.value(number(row['loss_tuned']))}"
        parts.append(table([*cells, [grey("loss"), span(losses, style=f"color:{GREY}")]]))
    return rule(*parts)
