"""The table of registered models."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from tune_magic.storage.versions import Version
from tune_magic.view import words
from tune_magic.view.html import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    Bundle,
    box,
    bundle,
    clean,
    code,
    details,
    div,
    grey,
    note_bundle,
    span,
    table,
)

COLUMNS = ("model", "stage", "scores", "note", "registered", "run")
_COLOURS = {"production": GREEN, "staging": ORANGE, "archived": GREY, "candidate": BLUE}
_HIDDEN = ("base_held_out_loss", "train_loss")
_MOST_SCORES = 3


def models_card(found: Sequence[Version], *, with_lineage: bool = False) -> Bundle:
    """Return versions as a table, in their order.

    Args:
        found: The versions.
        with_lineage: Show of each what it was made of, too.
    """
    if not found:
        return note_bundle("No model is registered yet. `%tune register RUN --as NAME` registers one.")
    rows = [_row(version) for version in found]
    cells: list[list[object]] = [[grey(name) for name in COLUMNS]]
    for version, row in zip(found, rows, strict=True):
        stage = span(
            "● ",
            span(version.stage, style="color:inherit"),
            style=f"color:{_COLOURS[version.stage]};white-space:nowrap",
        )
        cells.append([row[0], stage, *row[2:5], code(row[5])])
    widths = [max(len(line[i]) for line in (COLUMNS, *rows)) for i in range(len(COLUMNS))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (COLUMNS, *rows)
    ]
    shown = [version for version in found if with_lineage]
    below = [details(f"{one.reference}: where it comes from", *(div(line) for line in _story(one))) for one in shown]
    text += [line for one in shown for line in ("", f"{one.reference}:", *(f"  {said}" for said in _story(one)))]
    return bundle(box(table(cells), *below), text)


def _row(version: Version) -> list[str]:
    gone = "" if version.is_there else " (gone)"
    what = f" {version.export}" if version.export else ""
    return [
        version.reference, version.stage, scores(version.metrics), clean(version.note or "", 60), words.ago(time.time() - version.created),
        f"{version.run}{what}{gone}",
    ]  # fmt: skip


def scores(metrics: Mapping[str, float]) -> str:
    """Return the first scores in one line."""
    shown = [(name, value) for name, value in metrics.items() if name not in _HIDDEN][:_MOST_SCORES]
    return ", ".join(f"{name.replace('_', ' ')} {words.value(value)}" for name, value in shown)


def _story(version: Version) -> list[str]:
    stages = ", ".join(f"{stage} since {words.clock(when, day=True)}" for stage, when in version.history)
    return [*version.lineage, stages]
