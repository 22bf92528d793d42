"""The card of a dry run: what would be trained, what it costs, and the rows as the model sees them."""

from __future__ import annotations

from typing import Any

from tune_magic.storage.events import number
from tune_magic.storage.folder import RunFolder
from tune_magic.view import words
from tune_magic.view.frame import about
from tune_magic.view.html import BLUE, Bundle, box, bundle, grey, heading, rule, table
from tune_magic.view.lens import lens, lens_lines
from tune_magic.view.rows import made_of

ON_CPU = (  # benchmarks/quantised.py, of a model of 135 million parameters
    "steps a tenth to a fifth longer than in float32, answers at less than half the speed, "
    "and with a small model the process is no smaller"
)


def plan_card(run: RunFolder) -> Bundle:
    """Return the card of a dry run."""
    summary = run.summary()
    facts = plan_facts(summary.plan, summary.result)
    name = run.name or "recipe"
    rows: list[list[object]] = [[grey(key), value] for key, value in facts]
    body = [
        heading(BLUE, name, "plan · nothing was trained", ""),
        table(rows),
        *about(run, summary),
        rule(lens(summary.plan["lens"])),
    ]
    lines = [f"{name}: plan, nothing was trained", *(f"  {key}: {value}" for key, value in facts)]
    lines += lens_lines(summary.plan["lens"])
    return bundle(box(*body), lines)


def plan_facts(plan: dict[str, Any], result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (name, value) of what a plan promises."""
    share = 100 * plan["trained_tokens_per_epoch"] / plan["tokens_per_epoch"]
    trained = "" if plan.get("scores_rows") else f", {share:.0f} % trained"
    cut = f", {plan['cut_rows']} rows cut at max_length" if plan["cut_rows"] else ""
    rows = [
        (
            "steps",
            f"{plan['total_steps']} of {plan['recipe']['batch_size']} examples, {plan['steps_per_epoch']} an epoch",
        ),
        ("rows", f"{plan['train_rows']} to train, {plan['held_out_rows']} held out"),
        ("tokens", f"{words.count(plan['tokens_per_epoch'])} an epoch{trained}{cut}"),
        ("longest row", f"{plan['longest_row_tokens']} tokens"),
        *made_of(plan),
        ("precision", f"{plan['dtype']} on {plan['device']}"),
        *_quantised(plan),
    ]
    if result:
        rows += [
            ("predicted time", f"{words.duration(result['seconds'])} (a step of {result['step_tokens']} tokens took "
                               f"{words.duration(result['step_seconds'])})"),
            ("predicted peak memory", words.size(result["peak_bytes"])),
        ]  # fmt: skip
        if result.get("base_loss") is not None:
            rows.append(("held-out loss of the base", words.value(number(result["base_loss"]))))
    return rows


def _quantised(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """Say what a quantised base takes, and what to expect of it on a CPU; nothing where none is."""
    facts = plan.get("quantization")
    if facts is None:
        return []
    scales = ", scales in 8 bits" if facts["double_quant"] else ""
    taken = f"{words.size(facts['bytes'])} of weights, {words.size(facts['float32_bytes'])} in float32"
    return [
        ("frozen base", f"{facts['kind']}{scales}: {taken}"),
        *([("on a CPU", ON_CPU)] if plan["device"] == "cpu" else []),
    ]
