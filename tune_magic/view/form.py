"""What a form shows: the cell that would do the same, its faults, its plan."""

from __future__ import annotations

from collections.abc import Sequence

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
)  # fmt: skip


def form_bundle(name: str, recipe: str, problems: Sequence[str], plan: Bundle | None) -> Bundle:
    """Return recipe, faults and plan.

    Args:
        name: Of the run.
        recipe: As YAML.
        problems: Faults, in words.
        plan: The card of a dry run of this recipe, if there is one.
    """
    cell = f"%%finetune {clean(name, 60)}\n{recipe}".rstrip()
    faults = [div(span("▲ ", style=f"color:{ORANGE}"), escape(problem, 400)) for problem in problems]
    body = box(
        grey("the cell that does the same"),
        div(code(cell), style="white-space:pre-wrap;margin-top:4px"),
        div(*faults, style="margin-top:8px") if faults else None,
    )
    lines = [cell, *(f"! {problem}" for problem in problems)]
    if plan is None:
        return bundle(body, lines)
    return bundle(Html(body + plan["text/html"]), [*lines, plan["text/plain"]])
