"""Rows made of training rows, as a recipe's `augment` says. What was made is kept in the run folder, for people and for a resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tune_magic import files, plugins
from tune_magic.augmenters.base import Augmenter
from tune_magic.data.content import Content, asked, from_plain, to_plain, with_asked
from tune_magic.recipe.schema import AugmentOptions, Recipe

FILE = "augmented.jsonl"
_STREAM = 15_485_863  # keeps these random numbers apart from those of order and split
_SHOWN = 3


@dataclass(frozen=True)
class Made:
    """A row that was made.

    Attributes:
        row: Number of the row it was made of, from 0.
        kind: What made it.
        content: Its normal form.
    """

    row: int
    kind: str
    content: Content


def draw(options: Sequence[AugmentOptions], rows: np.ndarray, seed: int) -> list[np.ndarray]:
    """Return the rows that each augmenter gets, drawn by the seed; each as often as the others, to within one.

    Args:
        options: A recipe's `augment`.
        rows: Numbers of the training rows.
        seed: The recipe's.
    """
    drawn = []
    for number, one in enumerate(options):
        source, count = np.random.default_rng([seed, _STREAM, number]), round(one.share * len(rows))
        passes = [source.permutation(rows) for _ in range(-(-count // max(1, len(rows))))]
        drawn.append(np.concatenate([np.empty(0, dtype=np.int64), *passes])[:count])
    return drawn


def make(
    recipe: Recipe, drawn: Sequence[np.ndarray], contents: Mapping[int, Content], tell: Callable[[int, int], None]
) -> list[Made]:
    """Return the rows that were made; where there is no other wording, none is.

    Args:
        recipe: Whose `augment` says how.
        drawn: The rows of each augmenter, as `draw` gives them.
        contents: Those rows in normal form, by number.
        tell: Called with the texts done and their total; may raise to break off.
    """
    made: list[Made] = []
    for number, (one, rows) in enumerate(zip(recipe.data.augment, drawn, strict=True)):
        asks = getattr(one, "model", "") is None  # a model, and names none
        options = one.model_copy(update={"model": recipe.model}) if asks else one
        augmenter: Augmenter = plugins.get("augmenter", one.kind)(options)
        known = [int(row) for row in rows if int(row) in contents]
        changed = _changed(augmenter, [contents[row] for row in known], recipe.seed + number, tell)
        found = ((row, _with(contents[row], changed)) for row in known)
        made += [Made(row, one.kind, content) for row, content in found if content is not None]
    return made


def _changed(
    augmenter: Augmenter, contents: Sequence[Content], seed: int, tell: Callable[[int, int], None]
) -> Iterator[str | None]:
    """Return another wording of each text of rows, one behind the other."""
    said = [text for content in contents for text in asked(content)]
    source = np.random.default_rng([seed, _STREAM, 1])
    return iter(augmenter.change(said, source, lambda done: tell(done, len(said))))


def _with(content: Content, changed: Iterator[str | None]) -> Content | None:
    """Return a row with the next wordings, one for each of its texts; None where none of them is another."""
    new = with_asked(content, lambda text: next(changed) or text)
    return None if new == content else new


def write(folder: Path, made: Sequence[Made]) -> None:
    """Keep what was made in the run folder."""
    files.write_json_lines(
        folder / FILE, ({"row": one.row + 1, "by": one.kind, **to_plain(one.content)} for one in made)
    )


def read(folder: Path) -> list[Made] | None:
    """Return what was made at an earlier start, None where there was none."""
    try:
        rows = files.read_json_lines(folder / FILE)
    except OSError:
        return None
    return [Made(row.pop("row") - 1, row.pop("by"), from_plain(row)) for row in rows]


def facts(made: Sequence[Made], contents: Mapping[int, Content]) -> list[dict[str, Any]]:
    """Return how many rows each augmenter made, and the first ones beside what they were made of, JSON-ready."""
    found: dict[str, dict[str, Any]] = {}
    for one in made:
        about = found.setdefault(one.kind, {"kind": one.kind, "rows": 0, "shown": []})
        about["rows"] += 1
        if len(about["shown"]) < _SHOWN and one.row in contents:
            pairs = zip(asked(contents[one.row]), asked(one.content), strict=True)
            about["shown"].append(next([old[:300], new[:300]] for old, new in pairs if old != new))
    return list(found.values())
