"""The card of several runs side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tune_magic.storage.folder import RunFolder
from tune_magic.view import words
from tune_magic.view.card import outcome
from tune_magic.view.figure import overlaid_figure, svg
from tune_magic.view.frame import COLOURS
from tune_magic.view.html import (
    BLUE,
    GREEN,
    Bundle,
    box,
    bundle,
    clean,
    div,
    grey,
    heading,
    image,
    rule,
    span,
    table,
    tag,
)

_HIGHER_IS_WORSE = ("loss", "perplexity")
_TITLES = {
    "base_held_out_loss": "held-out loss of the base", "held_out_loss": "held-out loss", "train_loss": "train loss",
}  # fmt: skip
_LONGEST_VALUE = 60
_MOST_DIFFERENCES = 40


def comparison_card(
    names: Sequence[str],
    runs: Sequence[RunFolder],
    differences: Mapping[str, Sequence[Any]],
    metrics: Sequence[Mapping[str, float]],
) -> Bundle:
    """Return runs side by side.

    Args:
        names: What each is called.
        runs: The runs.
        differences: Keys of the recipes that differ, with each run's value.
        metrics: Scores of each run.
    """
    summaries = {name: run.summary() for name, run in zip(names, runs, strict=True)}
    heads: list[object] = ["", *(tag("b", clean(name, 40)) for name in names)]
    scores = [heads, *_states(runs), *_scores(metrics), *_costs(runs)]
    align = "l" * (len(names) + 1)
    spoken = ", ".join(names)
    drawn = any(summary.steps or summary.evaluations for summary in summaries.values())
    curves = image(svg(overlaid_figure(summaries)), f"loss by step of {spoken}") if drawn else None
    picture = div(curves, style="max-width:640px") if curves else None
    body = [
        heading(BLUE, " · ".join(names), f"{len(names)} runs", ""),
        picture,
        table(scores, align=align),
        rule(grey("what differs"), table([heads, *_differences(differences)], align=align))
        if differences
        else rule(grey("The recipes are the same.")),
    ]
    return bundle(box(*body), _text(names, runs, differences, metrics))


def _states(runs: Sequence[RunFolder]) -> list[list[object]]:
    cells = [
        span("● ", outcome(run, run.status, run.summary()), style=f"color:{COLOURS.get(run.status, BLUE)}")
        for run in runs
    ]
    return [[grey("state"), *cells]]


def _scores(metrics: Sequence[Mapping[str, float]]) -> list[list[object]]:
    """A row a metric, the best value of a row in green."""
    rows: list[list[object]] = []
    for key in dict.fromkeys(key for found in metrics for key in found):
        values = [found.get(key, math.nan) for found in metrics]
        best = _best(key, values)
        cells: list[object] = [
            "–" if math.isnan(value) else tag("b", words.value(value), style=f"color:{GREEN}") if value == best else words.value(value)
            for value in values
        ]  # fmt: skip
        rows.append([grey(_TITLES.get(key, key.replace("_", " "))), *cells])
    return rows


def _best(key: str, values: Sequence[float]) -> float | None:
    """Return the best of several different values; of the base, which is nobody's merit, none is."""
    known = [value for value in values if not math.isnan(value)]
    if len(set(known)) < 2 or key.startswith("base"):
        return None
    return min(known) if any(word in key for word in _HIGHER_IS_WORSE) else max(known)


def _costs(runs: Sequence[RunFolder]) -> list[list[object]]:
    rows: list[list[object]] = []
    summaries = [run.summary() for run in runs]
    for title, values in (
        ("time in steps", [words.duration(sum(e["seconds"] for e in s.steps.values())) for s in summaries]),
        (
            "peak memory",
            [words.size(s.memory.get("gpu_peak") or s.memory["peak"]) if s.memory else "–" for s in summaries],
        ),
        ("trained parameters", [words.count(s.plan["trainable_parameters"]) if s.plan else "–" for s in summaries]),
    ):
        rows.append([grey(title), *values])
    return rows


def _differences(differences: Mapping[str, Sequence[Any]]) -> list[list[object]]:
    rows: list[list[object]] = [
        [grey(key), *("–" if value is None else clean(value, _LONGEST_VALUE) for value in values)]
        for key, values in list(differences.items())[:_MOST_DIFFERENCES]
    ]
    hidden = len(differences) - _MOST_DIFFERENCES
    return [*rows, [grey(f"and {hidden} more")]] if hidden > 0 else rows


def _text(
    names: Sequence[str],
    runs: Sequence[RunFolder],
    differences: Mapping[str, Sequence[Any]],
    metrics: Sequence[Mapping[str, float]],
) -> list[str]:
    rows = [["", *names], ["state", *(outcome(run, run.status, run.summary()) for run in runs)]]
    keys = dict.fromkeys(key for found in metrics for key in found)
    rows += [[_TITLES.get(key, key), *(words.value(f[key]) if key in f else "–" for f in metrics)] for key in keys]
    rows += [[key, *("–" if value is None else str(value) for value in values)] for key, values in differences.items()]
    cells = [[clean(cell, _LONGEST_VALUE) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names) + 1)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
