"""The table of runs."""

from __future__ import annotations

import time
from collections.abc import Sequence

from tune_magic.errors import TuneError
from tune_magic.storage.cell import has_changed
from tune_magic.storage.events import number
from tune_magic.storage.folder import RunFolder
from tune_magic.view import words
from tune_magic.view.frame import COLOURS
from tune_magic.view.html import BLUE, Bundle, Html, box, bundle, clean, code, grey, note_bundle, span, table
from tune_magic.view.since import changes, previous_run

COLUMNS = ("name", "state", "step", "held-out loss", "time", "started", "size", "since the run before", "id")
_STATE, _CHANGES, _ID = 1, 7, 8


def runs_table(runs: Sequence[RunFolder], num_more: int = 0) -> Bundle:
    """Return the runs as a table in their order; `num_more` older ones are not in it."""
    if not runs:
        return note_bundle("There are no runs yet. `%%finetune NAME` starts one.")
    rows = [_row(run) for run in runs]
    cells: list[list[object]] = [[grey(name) for name in COLUMNS]]
    cells += [
        [
            _state(c) if i == _STATE else code(c) if i == _ID else grey(c) if i == _CHANGES else c
            for i, c in enumerate(row)
        ]
        for row in rows
    ]
    lines = [COLUMNS, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    more = f"and {num_more:,} older: `--limit N` shows more" if num_more else ""
    return bundle(
        box(table(cells, align="llrrrlrll"), *([grey(more)] if more else [])), [*text, more] if more else text
    )


def _row(run: RunFolder) -> list[str]:
    try:
        state, summary = run.status, run.summary()
    except TuneError:  # its run.json is damaged, or from a newer version: the other runs are shown all the same
        return ["", "damaged", "", "", "", "", words.size(run.size_bytes()), "", run.id]
    total = summary.plan.get("total_steps", "")
    best = summary.best
    note, seconds = run.meta.get("note"), sum(event["seconds"] for event in summary.steps.values())
    return [
        clean(f"{run.name or ''} · {note}" if note else run.name or "", 80),
        f"{state} · the cell has changed" if has_changed(run.link) else state,
        f"{summary.step} / {total}" if total else "",
        words.value(number(best["loss"])) if best else "",
        words.duration(seconds) if summary.steps else "",
        words.ago(time.time() - run.info["created"]),
        words.size(run.size_bytes()),
        _changes(run),
        run.id,
    ]


def _changes(run: RunFolder) -> str:
    """Return how the recipe differs from that of the run before in the same cell."""
    before = previous_run(run)
    try:
        return clean(", ".join(changes(before, run)), 120) if before is not None else ""
    except TuneError:  # that one's run.json is damaged
        return ""


def _state(state: str) -> Html:
    colour = COLOURS.get(state.partition(" ")[0], BLUE)
    return span("● ", span(state, style="color:inherit"), style=f"color:{colour};white-space:nowrap")
