"""What a form shows: the cell that would do the same, its faults, the data's first rows, its plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tune_magic.data.preview import Head
from tune_magic.view.html import (
    ORANGE,
    Bundle,
    Html,
    box,
    bundle,
    clean,
    code,
    div,
    escape,
    grey,
    span,
    table,
    tag,
)  # fmt: skip

_MOST_COLUMNS = 8
_CELL = 120
_SHOWN_ROWS = 3


def form_bundle(
    name: str, recipe: str, problems: Sequence[str], plan: Bundle | None, head: Head | None = None
) -> Bundle:
    """Return recipe, faults, first rows and plan.

    Args:
        name: Of the run.
        recipe: As YAML.
        problems: Faults, in words.
        plan: The card of a dry run of this recipe, if there is one.
        head: The first rows of the data, where they can be seen.
    """
    cell = f"%%finetune {clean(name, 60)}\n{recipe}".rstrip()
    body = box(
        grey("the cell that does the same"),
        div(code(cell), style="white-space:pre-wrap;margin-top:4px"),
        _faults(problems),
        _first_rows(head),
    )
    return _with(plan, body, [cell, *_lines(problems, head)])


def data_form_bundle(
    typed: Mapping[str, Any], problems: Sequence[str], report: Bundle | None, head: Head | None
) -> Bundle:
    """Return first rows, faults and the report on all of them.

    Args:
        typed: The keys that were filled in.
        problems: Faults, in words.
        report: The card of a data job, if there is one.
        head: The first rows of the data, where they can be seen.
    """
    title = str(typed.get("data.train") or "no data yet")
    body = box(grey(title, " as it is"), _faults(problems), _first_rows(head))
    return _with(report, body, [title, *_lines(problems, head)])


def _with(card: Bundle | None, body: Html, lines: Sequence[str]) -> Bundle:
    if card is None:
        return bundle(body, lines)
    return bundle(Html(body + card["text/html"]), [*lines, card["text/plain"]])


def _faults(problems: Sequence[str]) -> Html | None:
    faults = [div(span("▲ ", style=f"color:{ORANGE}"), escape(problem, 400)) for problem in problems]
    return div(*faults, style="margin-top:8px") if faults else None


def _first_rows(head: Head | None) -> Html | None:
    if head is None or not head.rows:
        return None
    names = head.columns[:_MOST_COLUMNS]
    more = f" and {len(head.columns) - len(names)} more columns" if len(head.columns) > len(names) else ""
    rows: list[list[object]] = [[tag("b", escape(name, 40)) for name in names]]
    rows += [[escape(_flat(row.get(name)), _CELL) for name in names] for row in head.rows[:_SHOWN_ROWS]]
    return div(grey(f"first rows{more}"), table(rows), style="margin-top:8px;overflow-x:auto")


def _lines(problems: Sequence[str], head: Head | None) -> list[str]:
    shown = [f"columns: {', '.join(head.columns)}"] if head is not None else []
    return [*(f"! {problem}" for problem in problems), *shown]


def _flat(value: Any) -> str:
    return "" if value is None else " ".join(str(value).split())
