"""The card of a run that was made of runs: of which, by which weights, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tune_magic.evaluation.comparison import Comparison
from tune_magic.recipe.combination import WAYS
from tune_magic.storage.folder import RunFolder
from tune_magic.storage.state import State
from tune_magic.view import words
from tune_magic.view.card import comparison_line, next_commands, scores_table
from tune_magic.view.frame import COLOURS
from tune_magic.view.html import BLUE, Bundle, box, bundle, clean, div, escape, grey, heading, table, ticked

_NEXT = ("%evaluate {}", "%tune chat {}", "%export {} --to adapter")
_FAR = 0.02  # from the weighted sum, as a share of it, before a card speaks of it


def merge_card(
    run: RunFolder, comparisons: Mapping[str, Comparison] | None = None, banner: str | None = None
) -> Bundle:
    """Return the card of a merged run.

    Args:
        run: The run.
        comparisons: Of its newest evaluation, when there is one.
        banner: A line above it.
    """
    state, result = run.status, run.summary().result
    name, about = run.name or run.id, run.info["merge"]
    title = f"{'merged' if state == 'finished' else state} · {_way(run)}"
    rows = [_row(source["name"], about["combination"]["weights"], result) for source in about["sources"]]
    header = ["made of", "weight", *(["cosine", "distance"] if result else [])]
    remarks = [banner, run.meta.get("note"), *_remarks(run, result, about), *_failure(run, state)]
    lines = [clean(text, 400) for text in remarks if text]
    cells: list[list[object]] = [[grey(text) for text in header]]
    cells += [[escape(row[0], 80), *row[1:]] for row in rows]
    body = [
        heading(COLOURS.get(state, BLUE), name, title, f"run {run.id}"),
        table(cells, align="lrrr"),
        scores_table(comparisons or {}),
        *(div(grey(ticked(line))) for line in lines),
        next_commands(name, _NEXT) if state == "finished" else None,
    ]
    text = [f"{name}: {title} (run {run.id})", *("  " + _spoken(row) for row in rows), *(f"  {line}" for line in lines)]
    text += [f"  {comparison_line(comparison)}" for comparison in (comparisons or {}).values()]
    text += ["  next: " + " · ".join(command.format(name) for command in _NEXT)] if state == "finished" else []
    return bundle(box(*(part for part in body if part)), text)


def _way(run: RunFolder) -> str:
    """Say how it was made, and its rank."""
    chosen = run.info["merge"]["combination"]
    parts = [chosen["how"], f"r={run.info['recipe']['method']['r']}"]
    if chosen["density"] is not None:
        parts.insert(1, f"density {chosen['density']:g}")
    if "dare" in chosen["how"]:
        parts.append(f"seed {chosen['seed']}")
    return ", ".join(parts)


def _row(name: str, weights: Mapping[str, float], result: Mapping[str, Any]) -> list[str]:
    found = result.get("sources", {}).get(name)
    measured = [_number(found["cosine"]), _number(found["distance"])] if found else []
    return [name, f"{weights[name]:g}", *measured]


def _spoken(row: list[str]) -> str:
    name, weight, *measured = row
    more = f": cosine {measured[0]} to the merged update, which is {measured[1]} of its length away" if measured else ""
    return clean(f"{weight} {name}{more}", 300)


def _number(value: float | None) -> str:
    return "–" if value is None else words.value(value)


def _remarks(run: RunFolder, result: Mapping[str, Any], about: Mapping[str, Any]) -> list[str]:
    found = [WAYS.get(about["combination"]["how"], "")]
    between = [f"{one} and {other} {_number(cosine)}" for one, other, cosine in result.get("between", [])]
    if between:
        found.append(f"cosines between the updates: {', '.join(between)}; near 0 they hardly touch each other")
    apart = result.get("from_sum")
    if apart is not None and apart > _FAR:
        found.append(f"{100 * apart:.0f} % away from the weighted sum of the updates, which `--how cat` gives exactly")
    if len({source.get("data") for source in about["sources"]}) > 1:
        found.append(f"held-out rows are those of {about['sources'][0]['name']}; `--data` names others")
    return found


def _failure(run: RunFolder, state: State) -> list[str]:
    outcome = run.summary().outcome
    return [str(outcome[key]) for key in ("error", "cause", "hint") if outcome.get(key)] if state == "failed" else []
