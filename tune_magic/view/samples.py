"""Held-out prompts answered while training: the base's answer, the latest one, and the one that is wanted."""

from __future__ import annotations

from tune_magic.storage.summary import Summary
from tune_magic.view.html import GREY, Html, code, details, div, escape, grey, rule, span, table

_LONGEST = 150
_SHOWN = 2  # the others open by a click


def samples(summary: Summary) -> Html | None:
    """Return the latest sample of a run beside the base's, or None before there is one."""
    if not summary.samples:
        return None
    last, first = summary.samples[max(summary.samples)], summary.samples.get(0)
    base = {item["row"]: item["answer"] for item in first["items"]} if first and first is not last else {}
    title = f"step\u00a0{last['step']}" if last["step"] else "base"
    parts = [_item(item, base.get(item["row"]), title) for item in last["items"]]
    rest = details(f"{len(parts) - _SHOWN} more", *parts[_SHOWN:]) if len(parts) > _SHOWN else None
    return rule(*parts[:_SHOWN], rest)


def _item(item: dict[str, str], base: str | None, title: str) -> Html:
    asked = span("“", escape(item["question"] or "continue", _LONGEST), "”", style=f"color:{GREY}")
    answers = [("base", base), (title, item["answer"] or "(an empty answer)"), ("wanted", item.get("reference"))]
    rows: list[list[object]] = [
        [grey(name), code(escape(answer, _LONGEST))] for name, answer in answers if answer is not None
    ]
    return div(div(grey("a held-out row: "), asked), table(rows), style="margin-bottom:6px")
