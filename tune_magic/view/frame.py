"""What a cell shows while a run trains: state first, then the curve, memory, a sample."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tune_magic.diagnosis import Diagnosis
from tune_magic.storage.events import Event, number
from tune_magic.storage.folder import RunFolder
from tune_magic.storage.state import State
from tune_magic.storage.summary import Summary
from tune_magic.view import words
from tune_magic.view.figure import loss_figure, smooth, svg
from tune_magic.view.html import (
    BLUE,
    GREEN,
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
    escape,
    grey,
    heading,
    image,
    rule,
    span,
    table,
)  # fmt: skip
from tune_magic.view.rows import made_of
from tune_magic.view.samples import samples

COLOURS = {"finished": GREEN, "failed": RED, "lost": RED, "damaged": RED, "stopped": ORANGE, "paused": ORANGE}
_MADE_OF, _ABOUT = 60, 130  # characters of a fact on the rows, and of a line; the card's text has all of it
_MOST_ADVICE = 2
_TITLE_STATES = {"running": "training"}


def frame(
    run: RunFolder, state: State, picture: Html | None, advice: Sequence[Diagnosis] = (), *, interruptible: bool = True
) -> Bundle:
    """Return the live frame of a run.

    Args:
        run: The run.
        state: Its state now.
        picture: The loss curve as drawn last, see `curve`; None before the first step.
        advice: What the curve means, as `diagnose` last found it.
        interruptible: Whether Interrupt would stop the run.
    """
    summary = run.summary()
    name = run.name or run.id
    body = [
        heading(COLOURS.get(state, BLUE), name, _doing(summary, state), _remaining(summary)),
        bar(_share(summary), BLUE),
        _numbers(summary),
        _middle(run, summary, state, picture, interruptible=interruptible),
        samples(summary),
        *(warning(event) for event in summary.warnings[-2:]),
        *map(diagnosis, advice[:_MOST_ADVICE]),
    ]
    return bundle(box(*(part for part in body if part)), [line(run, state)])


def curve(summary: Summary) -> Html | None:
    """Draw the loss curve, or return None before there is a point."""
    if not summary.steps and not summary.evaluations:
        return None
    return image(svg(loss_figure(summary)), f"loss by step: {_spoken(summary)}")


def line(run: RunFolder, state: State) -> str:
    """Return one line of text for terminals, logs and screen readers."""
    summary = run.summary()
    parts = [f"{run.name or run.id}: {_doing(summary, state)}"]
    if state == "queued":
        parts.append(_expected(summary))
    elif summary.steps:
        parts.append(_spoken(summary))
    left = summary.seconds_left()
    if left is not None and state == "running":
        parts.append(f"{words.duration(left)} left")
    return " · ".join(part for part in parts if part)


def memory_gauges(memory: dict[str, Any]) -> Html | None:
    """Return bars for what the process, its peak, the machine and the GPU take."""
    if not memory:
        return None
    total = memory["system_total"]
    rows = [("this run", memory["rss"], total, BLUE), ("peak", memory["peak"], total, ORANGE)]
    rows.append(("system", memory["system_used"], total, GREY))
    if "gpu_total" in memory:
        rows.append(("GPU", memory["gpu_used"], memory["gpu_total"], BLUE))
        rows.append(("GPU peak", memory["gpu_peak"], memory["gpu_total"], ORANGE))
    cells: list[list[object]] = [
        [
            span(name, style=f"color:{GREY};white-space:nowrap"),
            div(bar(used / limit, colour, 8), style="width:110px;margin-top:5px"),
            span(f"{used / 1e9:.1f} / {limit / 1e9:.0f} GB", style="white-space:nowrap"),
        ]
        for name, used, limit, colour in rows
    ]
    return div(grey("memory", size=11), table(cells, align="llr"))


def about(run: RunFolder, summary: Summary, *, brief: bool = True) -> list[Html]:
    """Say in quiet lines what is trained, on what; briefly while it is drawn again and again."""
    plan = summary.plan
    if not plan:
        return []
    recipe = plan["recipe"]
    share = 100 * plan["trainable_parameters"] / plan["parameters"]
    rank = f" r={recipe['method']['r']}" if "r" in recipe["method"] else ""
    trainable, parameters = words.count(plan["trainable_parameters"]), words.count(plan["parameters"])
    data = recipe["data"]["train"].rsplit("/", 1)[-1]
    classes = plan.get("objective", {}).get("classes")
    lines = [
        f"{f'{len(classes)} classes · ' if classes else ''}{recipe['method']['name']}{rank} · {trainable} of {parameters} parameters ({share:.1f} %)",
        f"{recipe['model'].rstrip('/').rsplit('/', 1)[-1]} · {data} · {plan['train_rows']} rows, "
        f"{plan['held_out_rows']} held out",
        plan["model"]["note"],
    ]
    if plan["engine_note"]:
        lines.append(plan["engine_note"] if plan["packed"] else f"rows are padded: {plan['engine_note']}")
    rows = [f"{name}: {value}" for name, value in made_of(plan)]
    lines += [" · ".join(clean(row, _MADE_OF) for row in rows)] if brief else rows
    lines += [f"memory: {text}" for text in memory_words(plan)]
    longest = _ABOUT if brief else 3 * _ABOUT
    return [div(grey(escape(text, longest), size=11)) for text in lines if text]


def memory_words(plan: dict[str, Any]) -> list[str]:
    """Say what was changed for memory's sake, and, where nothing the recipe allows fits, the cheapest way out."""
    found, recipe = plan.get("memory"), plan["recipe"]
    if not found:
        return []
    changes = _changes(found, recipe)
    lines = [f"{changes}, to fit"] if changes else []
    if not found["fits"]:
        needed = f"{words.size(found['peak_bytes'])} are needed, {words.size(found['room'])} are there"
        out = "lower `max_length`, take a smaller model or train fewer parameters"
        if found["cheapest"]:
            out = f"what would fit: {_changes(found['cheapest'], recipe)}"
        lines.append(f"{needed}; {out}")
    return lines


def _changes(option: dict[str, Any], recipe: dict[str, Any]) -> str:
    """Return how an option differs from the recipe, and what it costs."""
    found = []
    if option["microbatch_tokens"] < recipe["microbatch_tokens"]:
        found.append(f"`microbatch_tokens: {option['microbatch_tokens']}`")
    if option["gradient_checkpointing"] and not recipe["gradient_checkpointing"]:
        found.append("`gradient_checkpointing: true`")
    slower = f" ({100 * (option['slowdown'] - 1):.0f} % slower)" if found and option["slowdown"] > 1.005 else ""
    return " and ".join(found) + slower


def _doing(summary: Summary, state: State) -> str:
    total = summary.plan.get("total_steps")
    word = _TITLE_STATES.get(state, state)
    if state == "starting":
        return _starting(summary.progress)
    if state == "queued":
        return _waiting(summary)
    if state == "running" and not summary.steps:
        return "scoring the base model" if summary.plan.get("base_first") else "training · first step"
    if not summary.steps:
        return word
    epoch = summary.steps[summary.step].get("epoch")
    reach = summary.budget.get("steps")
    limit = f" · time for about {reach}" if reach and reach < total else ""
    return f"{word} · step {summary.step} of {total}" + (f" · epoch {epoch:.2f}" if epoch is not None else "") + limit


def _starting(progress: Event) -> str:
    """Say what is done before the first step."""
    if progress.get("stage"):
        total = f" of {progress['total']:,}" if progress.get("total") else " so far"
        return f"{progress['stage']} · {progress['done']:,}{total}"
    if progress:
        return f"computing the frozen layers once · {progress['done']} of {progress['total']} rows"
    return "starting · loading data and model"


def _waiting(summary: Summary) -> str:
    """Say whom a queued run waits for."""
    ahead = [clean(run["name"] or run["id"], 60) for run in summary.outcome.get("ahead", [])]
    others = f" and {len(ahead) - 1} more" if len(ahead) > 1 else ""
    return f"queued · {words.ordinal(len(ahead) + 1)} in line, after {ahead[0]}{others}" if ahead else "queued"


def _expected(summary: Summary) -> str:
    """Say when a queued run should start, as far as the runs before it tell."""
    expected = summary.outcome.get("expected")
    if expected is None:
        return ""
    return f"starts {'after' if summary.outcome['at_least'] else 'about'} {words.clock(expected)}"


def _remaining(summary: Summary) -> str:
    if summary.state == "queued":
        return _expected(summary)
    left = summary.seconds_left()
    if left is None or summary.state != "running":
        return ""
    return f"{words.duration(left)} left · ends {words.clock(time.time() + left)}"


def _share(summary: Summary) -> float:
    total = summary.plan.get("total_steps")
    return summary.step / total if total else 0.0


def latest_numbers(summary: Summary) -> list[tuple[str, str]]:
    """Return (name, value) of the numbers that matter now."""
    if not summary.steps:
        return []
    steps = sorted(summary.steps)
    last = summary.steps[steps[-1]]
    seconds = sum(summary.steps[step]["seconds"] for step in steps[-20:])
    tokens = sum(summary.steps[step]["tokens"] for step in steps[-20:])
    found = [("train loss", words.value(smooth([number(summary.steps[s]["loss"]) for s in steps])[-1]))]
    if summary.evaluations:
        newest = summary.evaluations[max(summary.evaluations)]
        found += [
            (f"held-out {key}", words.value(number(newest[key]))) for key in ("loss", "accuracy") if key in newest
        ]
    return [
        *found,
        ("learning rate", words.rate(last["learning_rate"])),
        ("gradient norm", words.value(number(last["grad_norm"]))),
        ("tokens / s", f"{tokens / seconds:.0f}" if seconds else "–"),
    ]


def _spoken(summary: Summary) -> str:
    return ", ".join(f"{name} {text}" for name, text in latest_numbers(summary)[:2])


def _numbers(summary: Summary) -> Html | None:
    found = latest_numbers(summary)
    if not found:
        return None
    cells = [div(div(grey(name, size=11)), div(text, style="font-size:15px")) for name, text in found]
    return div(*cells, style="display:flex;flex-wrap:wrap;gap:4px 24px;margin:8px 0 2px")


def _middle(run: RunFolder, summary: Summary, state: State, picture: Html | None, *, interruptible: bool) -> Html:
    name = run.name or run.id
    command = code(f"%tune stop {clean(name, 60)}")
    stop = div(grey("stop: ■ Interrupt, or " if interruptible else "stop: ", size=11), command, style="margin-top:8px")
    now = div(grey("start it now: ", size=11), code(f"%tune resume {clean(name, 60)}")) if state == "queued" else None
    right = [memory_gauges(summary.memory), *about(run, summary), now, stop]
    left = div(picture, style="flex:2 1 380px;min-width:0") if picture else None
    return div(left, div(*right, style="flex:1 1 260px;min-width:0"), style="display:flex;flex-wrap:wrap;gap:4px 20px")


def diagnosis(found: Diagnosis) -> Html:
    """Return what a curve means as a part of a frame or card, with the recipe line to paste."""
    mark = span("◆ ", style=f"color:{BLUE}")
    if found.change is None:
        return rule(mark, escape(found.says, 300), " ", grey(escape(found.why, 300), size=13))
    return rule(mark, escape(found.says, 300), " Try ", code(found.change), grey(f": {found.why}", size=13))


def warning(event: dict[str, Any]) -> Html:
    """Return a warning as a part of a frame or card."""
    return rule(span("▲ ", style=f"color:{ORANGE}"), escape(event["message"], 300))
