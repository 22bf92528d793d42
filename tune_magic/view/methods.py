"""Methods in a table: what they are, or how they did on the same rows within the same budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tune_magic.recipe.topics import Topic
from tune_magic.view import words
from tune_magic.view.explain import share, trained
from tune_magic.view.figure import svg, tradeoff_figure
from tune_magic.view.html import (
    BLUE,
    GREEN,
    RED,
    Bundle,
    Html,
    box,
    bundle,
    clean,
    code,
    div,
    grey,
    heading,
    image,
    note_bundle,
    rule,
    span,
    table,
    tag,
    ticked,
    word,
)

_LONGEST = 140
_COLUMNS = ("method", "state", "trained parameters", "learning rate", "a step", "in all", "peak memory")


def methods_card(topics: Sequence[Topic], numbers: Sequence[Mapping[str, Any]], model: str | None) -> Bundle:
    """Return every method with its variants below it.

    Args:
        topics: Methods, each followed by its variants.
        numbers: Of `training.sizes.size` for each, or nothing.
        model: Whose the numbers are.
    """
    has_numbers = any(numbers)
    heads = ["", "trained parameters", "share"] if has_numbers else [""]
    rows: list[list[object]] = [[grey(head) for head in [*heads, "what is trained", "keys"]]]
    lines = []
    for topic, found in zip(topics, numbers, strict=True):
        amounts = _amounts(found) if has_numbers else []
        keys = topic.line.removeprefix("method: ") if topic.of else ", ".join(key.name for key in topic.keys)
        name = word(f"\u2003{topic.name}") if topic.of else tag("b", word(topic.name))
        note = div(grey(ticked(found["problem"]))) if "problem" in found else None
        shown = [span(amount, style="white-space:nowrap") for amount in amounts]
        rows.append([name, *shown, span(topic.summary, note), grey(keys)])
        lines.append("  ".join(filter(None, [f"  {topic.name}", *amounts, topic.summary, f"[{keys}]"])))
    count = sum(topic.of is None for topic in topics)
    detail = f"with {words.tail(model)}" if model else "name a model for numbers"
    body = [
        heading(BLUE, f"{count} methods", detail, ""),
        table(rows, align="lrrll" if has_numbers else "lll"),
        rule(code("%tune explain NAME"), grey(" tells more; "), code("%tune methods --try lora,dora --data FILE"),
             grey(" trains several and compares them")),
    ]  # fmt: skip
    return bundle(box(*body), [f"{count} methods, {detail}", *lines])


def _amounts(found: Mapping[str, Any]) -> list[str]:
    return ["–", "–"] if "trained" not in found else [trained(found), share(found)]


def trial_card(title: str, rows: Sequence[Mapping[str, Any]], note: str | None = None) -> Bundle:
    """Return methods that were tried, side by side.

    Args:
        title: The model and the data.
        rows: As of `trying.TriedMethods.rows`.
        note: A line above, such as why some were not trained.
    """
    scores = [name for name in ("held_out_loss", "accuracy") if any(_number(row, name) is not None for row in rows)]
    best = {name: _best(rows, name) for name in scores}
    heads = [
        *_COLUMNS,
        *(f"{word} {name.replace('_', '-').replace('-loss', ' loss')}" for name in scores for word in ("base", "")),
    ]
    cells: list[list[object]] = [[grey(head.strip()) for head in heads]]
    for row in rows:
        marked = [_marked(row, name, best[name]) for name in scores]
        costs = [span(cost, style="white-space:nowrap") for cost in _costs(row)]
        cells.append([tag("b", row["method"]), _state(row), *costs, *(cell for pair in marked for cell in pair)])
    picture = _picture(rows, scores)
    lines = [title, *([note] if note else []), *_lines(rows, heads, scores)]
    body = [
        heading(BLUE, title, f"{len(rows)} methods", ""),
        div(grey(note)) if note else None,
        picture,
        table(cells, align="ll" + "r" * (len(heads) - 2)),
        *(rule(tag("b", row["method"]), ": ", ticked(clean(row["problem"], 400))) for row in rows if row["problem"]),
    ]
    lines += [f"  {row['method']}: {row['problem']}" for row in rows if row["problem"]]
    return bundle(box(*body), lines)


def trial_so_far(title: str, rows: Sequence[Mapping[str, Any]], left: Sequence[str]) -> Bundle:
    """Return what stands above the run that trains while methods are tried: those that are done, and what is to come.

    Args:
        title: The model and the data.
        rows: Of those that are done.
        left: Names of the one that trains and of those after it.
    """
    now, *later = left
    coming = f"now {now}{', then ' if later else ''}{', '.join(later)}"
    return trial_card(title, rows, coming) if rows else note_bundle(f"{title}: {coming}")


def _picture(rows: Sequence[Mapping[str, Any]], scores: Sequence[str]) -> Html | None:
    """Draw the last score against the trained parameters, where there are two points or more."""
    if not scores:
        return None
    name = scores[-1]
    points = {
        str(row["method"]): (float(row["trained"]), float(row[name]))
        for row in rows
        if row["trained"] and _number(row, name) is not None
    }
    if len(points) < 2:
        return None
    spoken = ", ".join(f"{method} {words.value(score)}" for method, (_, score) in points.items())
    title = name.replace("_", "-").replace("-loss", " loss")
    return div(image(svg(tradeoff_figure(points, title)), f"{title} by trained parameters: {spoken}"), style="max-width:560px")  # fmt: skip


def _state(row: Mapping[str, Any]) -> Html:
    colour = RED if row["problem"] else GREEN if row["state"] == "finished" else BLUE
    steps = f" · {row['steps']} steps" if row["steps"] else ""
    return span("● ", span(f"{row['state']}{steps}", style="color:inherit"), style=f"color:{colour}")


def _costs(row: Mapping[str, Any]) -> list[str]:
    return [
        f"{row['trained']:,}" if row["trained"] else "–",
        words.rate(row["learning_rate"]) if math.isfinite(row["learning_rate"]) else "–",
        words.duration(row["step_seconds"]),
        words.duration(row["seconds"]),
        words.size(row["peak_bytes"]) if math.isfinite(row["peak_bytes"]) else "–",
    ]


def _marked(row: Mapping[str, Any], name: str, best: float | None) -> tuple[object, object]:
    base, value = _number(row, f"base_{name}"), _number(row, name)
    shown: object = "–" if value is None else words.value(value)
    if value is not None and value == best:
        shown = tag("b", shown, style=f"color:{GREEN}")
    return ("–" if base is None else words.value(base)), shown


def _best(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [value for row in rows if (value := _number(row, name)) is not None]
    if len(set(values)) < 2:
        return None
    return min(values) if "loss" in name else max(values)


def _number(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    return None if value is None or math.isnan(value) else float(value)


def _lines(rows: Sequence[Mapping[str, Any]], heads: Sequence[str], scores: Sequence[str]) -> list[str]:
    texts = [[head.strip() for head in heads]]
    for row in rows:
        numbers = [_number(row, f"{part}{name}") for name in scores for part in ("base_", "")]
        steps = f" · {row['steps']} steps" if row["steps"] else ""
        texts.append(
            [row["method"], f"{row['state']}{steps}", *_costs(row), *("–" if n is None else words.value(n) for n in numbers)]
        )  # fmt: skip
    cells = [[clean(cell, _LONGEST) for cell in row] for row in texts]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
