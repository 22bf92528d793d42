"""The card of a search for the learning rate: loss against rate, and the line to paste."""

from __future__ import annotations

from typing import Any

from tune_magic.storage.folder import RunFolder
from tune_magic.view import words
from tune_magic.view.figure import rates_figure, svg
from tune_magic.view.html import BLUE, ORANGE, Bundle, Html, box, bundle, code, div, grey, heading, image, table

_NOTHING = "The loss fell at no rate: there may be too few rows, or this method trains too little of the model."


def rates_card(run: RunFolder) -> Bundle:
    """Return the card of a search for the learning rate."""
    found = run.summary().result
    name, line, facts = run.name or "recipe", rate_line(found["learning_rate"]), rates_facts(found)
    detail = "learning rate · nothing was kept"
    body = [
        heading(BLUE if line else ORANGE, name, detail, ""),
        div(
            div(_picture(found), style="flex:2 1 380px;min-width:0"),
            div(table([[grey(key), value] for key, value in facts]), style="flex:1 1 240px;min-width:0"),
            style="display:flex;flex-wrap:wrap;gap:4px 20px;margin-top:8px",
        ),
        div(grey("for the recipe: "), code(line), style="margin-top:8px") if line else div(_NOTHING),
    ]
    lines = [f"{name}: {detail}", *(f"  {key}: {value}" for key, value in facts), f"  {line or _NOTHING}"]
    return bundle(box(*body), lines)


def rate_line(rate: float | None) -> str | None:
    """Return the line of a recipe, None where no rate was found."""
    return None if rate is None else f"learning_rate: {words.rate(rate)}"


def rates_facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (name, value) of what was tried and seen."""
    rates = found["rates"]
    tried = f"{len(rates)} steps"
    if rates:
        tried += f" at {words.rate(rates[0])} to {words.rate(rates[-1])}"
    rows = [("tried", tried), ("ended", "the loss left all bounds" if found["diverged"] else "at the highest rate")]
    named = (("steepest fall", "steepest"), ("lowest loss", "lowest"), ("a tenth of that", "learning_rate"))
    return rows + [(title, words.rate(found[key])) for title, key in named if found[key] is not None]


def _picture(found: dict[str, Any]) -> Html | None:
    if not found["rates"]:
        return None
    chosen = rate_line(found["learning_rate"])
    return image(svg(rates_figure(found)), f"loss by learning rate; {chosen or 'it fell at none'}")
