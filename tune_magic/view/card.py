"""The card a run leaves behind: static, small, the same from disk on any later day."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tune_magic.diagnosis import diagnose
from tune_magic.evaluation.comparison import Comparison
from tune_magic.storage.cell import has_changed
from tune_magic.storage.folder import RunFolder
from tune_magic.storage.state import State
from tune_magic.storage.summary import Summary, scores_of
from tune_magic.view import words
from tune_magic.view.frame import COLOURS, about, curve, diagnosis, warning
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
    rule,
    span,
    table,
    tag,
)  # fmt: skip
from tune_magic.view.rows import made_of
from tune_magic.view.samples import samples
from tune_magic.view.since import since

_NEXT = {
    "finished": ("%evaluate {}", "%export {} --to merged", "%tune show {}"),
    "stopped": ("%tune resume {}", "%evaluate {}"),
    "lost": ("%tune resume {}",),
    "failed": ("%tune resume {}",),
}
VERDICTS = {"better": GREEN, "worse": RED, "unclear": GREY}


def card(run: RunFolder, comparisons: Mapping[str, Comparison] | None = None, banner: str | None = None) -> Bundle:
    """Return the card of a run.

    Args:
        run: The run.
        comparisons: Of its newest evaluation, when there is one.
        banner: A line above it, such as why nothing was trained now.
    """
    state, summary = run.status, run.summary()
    name = run.name or run.id
    colour = COLOURS.get(state, BLUE)
    total = summary.plan.get("total_steps") or 0
    share = summary.step / total if total else 0.0
    picture = curve(summary)
    scores = scores_table(_with_loss(summary, comparisons or {}), base_name(summary, evaluated=bool(comparisons)))
    facts = [
        scores,
        div(grey(facts_line), style="margin-top:8px") if (facts_line := _facts(summary)) else None,
        *about(run, summary, brief=False),
    ]
    body = [
        _banner(banner),
        heading(colour, name, outcome(run, state, summary), _when(run, summary)),
        *(div(grey(line)) for line in _remarks(run)),
        bar(1.0 if state == "finished" else share, colour),
        div(
            div(picture, style="flex:2 1 380px;min-width:0") if picture else None,
            div(*facts, style="flex:1 1 300px;min-width:0"),
            style="display:flex;flex-wrap:wrap;gap:4px 20px;margin-top:8px",
        ),
        samples(summary),
        *(warning(event) for event in [*summary.warnings[-3:], *summary.diagnoses]),
        *map(diagnosis, diagnose(summary)),
        _failure(summary) if state == "failed" else None,
        _next(name, state),
    ]
    return bundle(box(*(part for part in body if part)), [card_text(run, state, comparisons, banner)])


def _banner(banner: str | None) -> Html | None:
    return div(banner, style=f"border-left:3px solid {ORANGE};padding-left:8px;margin-bottom:8px") if banner else None


def _remarks(run: RunFolder) -> list[str]:
    """The run's note, what changed since the run before, whether its cell has, and what it needs of other cells."""
    stale = "the cell has changed since this run" if has_changed(run.link) else None
    note = clean(run.meta["note"], 300) if run.meta.get("note") else None
    return [line for line in (note, since(run), stale, _cell_code(run)) if line]


def _cell_code(run: RunFolder) -> str | None:
    """Say which plug-ins of notebook cells it was made with."""
    codes = [f"{code['kind']} `{clean(code['name'], 40)}`" for code in run.info.get("cell_code", [])]
    return f"from a notebook cell: {', '.join(codes)}; `run.cell_code` has the source" if codes else None


def scores_table(comparisons: Mapping[str, Comparison], base: str = "base") -> Html | None:
    """Return base, tuned and difference of each metric; `base` is what the first model is called."""
    if not comparisons:
        return None
    tested = any(comparison.p is not None for comparison in comparisons.values())
    rows: list[list[object]] = [["", grey(base), grey("tuned"), grey("difference"), *([grey("p")] if tested else [])]]
    for comparison in comparisons.values():
        known = not math.isnan(comparison.low)  # a single loss has no interval
        interval = f" ({words.signed(comparison.low)} to {words.signed(comparison.high)})" if known else ""
        colour = VERDICTS[comparison.verdict] if known else GREY
        rows.append([
            span(comparison.title, style=f"color:{GREY}"),
            words.value(comparison.base),
            tag("b", words.value(comparison.tuned)),
            span(words.signed(comparison.difference) + interval, style=f"color:{colour}"),
            *([grey("" if comparison.p is None else words.chance(comparison.p))] if tested else []),
        ])  # fmt: skip
    return table(rows, align="lrrlr")


def outcome(run: RunFolder, state: State, summary: Summary) -> str:
    """Say in a few words how the run ended."""
    total, best = summary.plan.get("total_steps"), summary.best
    ended = f", ended by `{clean(summary.outcome['by'], 40)}`" if summary.outcome.get("by") else ""
    match state:
        case "finished" if best and best["step"] != summary.step:
            return f"finished · {summary.step} steps{ended}, the best kept (step {best['step']})"
        case "finished":
            return "merged" if run.kind == "merge" else f"finished · {summary.step} steps{ended}"
        case "stopped" | "lost" | "failed" if summary.steps:
            kept = max(summary.checkpoints, default=None)
            by = "its time was up" if summary.outcome.get("reason") == "budget" else state
            where = f"{by} at step {summary.step} of {total}"
            return f"{where} · checkpoint of step {kept}" if kept else f"{where} · no checkpoint"
        case "stopped" if summary.outcome.get("reason") == "budget":
            return "its time was up before the first step"
        case "damaged":
            return f"{run.damage} · was {summary.state}"
    return state


def card_text(
    run: RunFolder, state: State, comparisons: Mapping[str, Comparison] | None = None, banner: str | None = None
) -> str:
    """Return the card as plain text."""
    summary = run.summary()
    lines = [banner] if banner else []
    lines.append(f"{run.name or run.id}: {outcome(run, state, summary)} ({_when(run, summary)})")
    lines += [f"  {line}" for line in _remarks(run)]
    base = base_name(summary, evaluated=bool(comparisons)) if "compress" in summary.plan else "base"
    lines += [f"  {comparison_line(found, base)}" for found in _with_loss(summary, comparisons or {}).values()]
    lines += [f"  {fact}" for fact in (_facts(summary),) if fact]
    lines += [f"  {name}: {value}" for name, value in made_of(summary.plan)]
    lines += [f"  ! {event['message']}" for event in [*summary.warnings[-3:], *summary.diagnoses]]
    lines += [f"  * {found.text}" for found in diagnose(summary)]
    if state == "failed":
        lines.append(f"  {summary.outcome.get('error')}")
    if state in _NEXT:
        lines.append("  next: " + " · ".join(line.format(run.name or run.id) for line in _NEXT[state]))
    return "\n".join(lines)


def comparison_line(comparison: Comparison, base: str = "base") -> str:
    """Return a metric as one line of text; `base` is what the first model is called."""
    change = words.signed(comparison.difference)
    interval = f" ({words.signed(comparison.low)} to {words.signed(comparison.high)})"
    known = not math.isnan(comparison.low)
    values = f"{base} {words.value(comparison.base)}, tuned {words.value(comparison.tuned)}"
    p = "" if comparison.p is None else f", p {words.chance(comparison.p)}"
    return f"{comparison.title}: {values}, {change}{interval if known else ''}{p}"


def _with_loss(summary: Summary, comparisons: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """Scores of the newest evaluation; before there is one, the held-out loss of step 0 and of the best step."""
    if comparisons or summary.best is None or 0 not in summary.evaluations:
        return dict(comparisons)
    unknown = float("nan")
    found: dict[str, Comparison] = {}
    scores = scores_of(summary.best)
    for name, base in scores_of(summary.evaluations[0]).items():
        if name in scores:  # without an interval nothing is called better, so that no score needs to say which way is
            change = scores[name] - base
            found[name] = Comparison(
                f"held-out {name}", base, scores[name], change, unknown, unknown, higher_is_better=False
            )
    return found


def base_name(summary: Summary, *, evaluated: bool = False) -> str:
    """Say what the untuned side is: a new head only guesses before training.

    Of a compressed model, that is what was left of it before training, unless it was `evaluated`, beside the whole base.
    """
    plan = summary.plan
    if "compress" in plan and not evaluated:
        return "compressed"
    return "untrained head" if plan.get("new_head") or "classes" in plan.get("objective", {}) else "base"


def _facts(summary: Summary) -> str:
    found = []
    if summary.memory:
        peak = summary.memory.get("gpu_peak") or summary.memory["peak"]
        found.append(f"peak memory {words.size(peak)}")
    if summary.steps:
        tokens = sum(event["tokens"] for event in summary.steps.values())
        seconds = sum(event["seconds"] for event in summary.steps.values())
        found += [f"{tokens / seconds:.0f} tokens / s" if seconds else "", f"{words.count(tokens)} tokens trained"]
    return " · ".join(filter(None, found))


def _when(run: RunFolder, summary: Summary) -> str:
    ended = summary.ended or summary.last_t or run.info["created"]
    took = f"{words.duration(ended - summary.started)} · " if summary.started else ""
    return f"{took}{words.clock(ended, day=True)} · run {run.id}"


def _failure(summary: Summary) -> Html:
    outcome_event = summary.outcome
    parts: list[object] = [tag("b", escape(outcome_event.get("error") or "failed", 600), style="white-space:pre-wrap")]
    parts += [div(escape(extra, 300)) for extra in (outcome_event.get("cause"), outcome_event.get("hint")) if extra]
    return rule(*parts)


def _next(name: str, state: State) -> Html | None:
    return next_commands(name, _NEXT[state]) if state in _NEXT else None


def next_commands(name: str, commands: Sequence[str]) -> Html:
    """Return the line of what may be done next, each command with the name of a run."""
    parts: list[object] = [grey("next: ")]
    for number_of, command in enumerate(commands):
        parts += [grey(" · ") if number_of else None, code(command.format(clean(name, 60)))]
    return div(*parts, style="margin-top:8px;font-size:12px")
