"""The card of an explanation: what is trained or minimised, the formula, numbers for a model, keys, what to paste."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tune_magic.recipe.topics import Topic
from tune_magic.view import words
from tune_magic.view.html import (
    BLUE,
    Bundle,
    Html,
    box,
    bundle,
    code,
    div,
    grey,
    heading,
    rule,
    span,
    table,
    ticked,
    word,
)

_NO_ACTIVATIONS = (
    "What a step keeps for its backward pass comes on top, and grows with the tokens computed at once "
    "(`microbatch_tokens`): `--dry-run` measures it on your rows."
)
_FIRSTS = {"method": "what is trained", "objective": "what is minimised"}


def explanation_card(
    topic: Topic, model: str | None, numbers: Mapping[str, Any], measured: Mapping[str, Any]
) -> Bundle:
    """Return an explanation.

    Args:
        topic: What is explained.
        model: Whose the numbers are.
        numbers: Of `training.sizes.size`, or a ``problem``, or nothing.
        measured: What a run of the model took, or nothing.
    """
    facts = [
        (name, value)
        for name, value in (
            (_FIRSTS.get(topic.kind, "what it is"), topic.summary), ("formula", topic.formula),
            ("source", topic.source), ("when", topic.when),
            ("learning rate", f"{words.rate(topic.learning_rate)} is usual" if topic.learning_rate else ""),
        )
        if value
    ]  # fmt: skip
    amounts = number_facts(numbers, measured)
    about = (
        f"{topic.kind} of {topic.of}"
        if topic.kind in ("value", "way")
        else f"a variant of {topic.of}"
        if topic.of
        else topic.kind
    )
    by = f", by `{numbers['method']}`" if topic.kind == "objective" and "method" in numbers else ""
    title = f"with {words.tail(model)}{by}" if model else ""
    body = [
        heading(BLUE, topic.name, about, ""),
        table([[_nowrap(name), _formula(value) if name == "formula" else ticked(value)] for name, value in facts]),
        rule(grey(ticked(title)), table([[_nowrap(name), ticked(value)] for name, value in amounts])) if amounts else None,
        rule(grey("in a recipe"), div(code(topic.line), style="margin-top:2px")) if topic.line else None,
        rule(grey("its keys"), _keys(topic)) if topic.keys else None,
        rule(grey("also"), table([[word(name), ticked(text)] for name, text in topic.variants])) if topic.variants else None,
    ]  # fmt: skip
    lines = [f"{topic.name}: {about}", *(f"  {name}: {value}" for name, value in facts)]
    lines += [f"  {title}", *(f"    {name}: {value}" for name, value in amounts)] if amounts else []
    lines += ["  in a recipe", *(f"    {line}" for line in topic.line.split("\n"))] if topic.line else []
    lines += ["  its keys", *(f"    {key.name} = {key.default or '–'}  {key.help}" for key in topic.keys)] if topic.keys else []  # fmt: skip
    lines += ["  also", *(f"    {name}: {text}" for name, text in topic.variants)] if topic.variants else []
    return bundle(box(*body), lines)


def number_facts(numbers: Mapping[str, Any], measured: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (name, value) of what a method takes; no number that was neither counted nor measured."""
    if "problem" in numbers:
        return [("no numbers", str(numbers["problem"]))]
    if "trained" not in numbers:
        return []
    sizes = [numbers[f"{part}_bytes"] for part in ("weight", "gradient", "optimizer")]
    facts = [
        ("trained parameters", f"{trained(numbers)}, {share(numbers)} of {words.count(numbers['parameters'])}"),
        ("memory", f"{words.size(sum(sizes))}: weights {words.size(sizes[0])} ({numbers['dtype']}), gradients "
                   f"{words.size(sizes[1])}, {numbers['optim']} {words.size(sizes[2])}"),
        ("activations", _NO_ACTIVATIONS),
        ("a checkpoint", f"{words.size(numbers['checkpoint_bytes'])}, with the optimizer's state"),
    ]  # fmt: skip
    if measured:
        peak = f", peak memory {words.size(measured['peak_bytes'])}" if math.isfinite(measured["peak_bytes"]) else ""
        took = f"{words.duration(measured['step_seconds'])} for a step of {words.count(measured['step_tokens'])} tokens"
        facts.append(("measured", f"{took}{peak}, in your run {measured['name']} (`{measured['method']}`)"))
    return facts


def trained(numbers: Mapping[str, Any]) -> str:
    """Return how many parameters are trained, those of a new head apart."""
    body, head = numbers["trained"] - numbers["head"], numbers["head"]
    if not head:
        return f"{body:,}"
    classes = f" for {numbers['classes']} classes" if "classes" in numbers else ""
    return f"{body:,} + {head:,} of the new head{classes}"


def share(numbers: Mapping[str, Any]) -> str:
    """Return the trained share of all parameters in percent, to two digits that say something."""
    percent = 100 * numbers["trained"] / numbers["parameters"]
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"


def _keys(topic: Topic) -> Html:
    cells: list[list[object]] = [
        [word(key.name), word(key.default) if key.default else grey("–"), ticked(key.help)] for key in topic.keys
    ]
    return table(cells)


def _nowrap(text: str) -> Html:
    return span(text, style="white-space:nowrap;opacity:.7")


def _formula(text: str) -> Html:
    parts = [div(ticked(part.strip())) for part in text.split(";  ")]
    return div(*parts, style="font-family:ui-monospace,Menlo,Consolas,monospace;font-size:12.5px")
