"""Where a recipe's rows are, and the fingerprints of what it reads. No torch in here."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tune_magic import cell_code
from tune_magic.data import hub
from tune_magic.data.read import Row, RowFaults, kind_of, read_rows
from tune_magic.errors import DataError
from tune_magic.recipe.schema import Recipe
from tune_magic.storage import fingerprint

TRAINING_ROWS = "train"  # as a corpus
_SLICE = re.compile(r"\s*(?:(?P<start>\d+)(?P<a>%?))?\s*:\s*(?:(?P<stop>\d+)(?P<b>%?))?\s*")


def references(recipe: Recipe) -> dict[str, str]:
    """Return the files, ``$names`` and hub ids a run trains and chooses on, by role."""
    data = recipe.data
    roles = {"train": data.train, "held_out": data.held_out, "replay": data.replay, "ewc_data": recipe.retain.ewc_data}
    roles |= {f"mix_{number}": source.data for number, source in enumerate(data.mix, start=1)}
    roles["corpus"] = None if recipe.vocabulary.corpus == TRAINING_ROWS else recipe.vocabulary.corpus
    return {role: reference for role, reference in roles.items() if isinstance(reference, str)}


@dataclass(frozen=True)
class Slice:
    """Some rows of a source: ``[:80%]``, ``[100:]``, ``[10%:20%]``; from the first up to before the second."""

    start: int = 0
    stop: int | None = None
    is_share: bool = False

    def bounds(self, count: int) -> tuple[int, int]:
        """Return the numbers of the first row and of the one after the last, of so many rows."""
        start, stop = self.start, self.stop
        if self.is_share:
            start, stop = round(count * start / 100), None if stop is None else round(count * stop / 100)
        return min(start, count), count if stop is None else min(stop, count)


def parse(reference: str) -> tuple[str, Slice | None]:
    """Return a reference without its slice, and the slice; a file that is called so, or the hub's own, is not cut.

    Raises:
        DataError: Brackets that are no slice.

    Example:
        >>> parse("rows.jsonl[:80%]")
        ('rows.jsonl', Slice(start=0, stop=80, is_share=True))
    """
    bare, bracket, inside = reference.removesuffix("]").rpartition("[")
    if not bracket or not reference.endswith("]") or hub.is_hub(reference) or os.path.exists(reference):  # noqa: PTH110
        return reference, None
    match = _SLICE.fullmatch(inside)
    if match is None or (match["start"] and match["stop"] and bool(match["a"]) != bool(match["b"])):
        raise DataError(
            f"`[{inside}]` names no rows of {bare}.", hint="Rows are named as [:80%], [80%:], [:1000] or [10:20]."
        )
    numbers = [int(match[name]) if match[name] else None for name in ("start", "stop")]
    return bare, Slice(numbers[0] or 0, numbers[1], bool(match["a"] or match["b"]))


def read(reference: str, folder: Path, faults: RowFaults | None = None) -> Iterator[Row]:
    """Yield the rows a reference names, fetched from the hub if need be.

    Raises:
        DataError: See `read_rows`; or the slice holds none.
    """
    path, part = ensure(reference, folder), parse(reference)[1]
    if part is None:
        yield from read_rows(path, faults)
        return
    count = _count(path) if part.is_share else sys.maxsize
    start, stop = part.bounds(count)
    rows = itertools.islice(read_rows(path, faults), start, stop)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{source_name(reference)} has no rows{f': the file has {count}' if part.is_share else ''}.")
    yield first
    yield from rows


def _count(path: Path) -> int:
    """Return the number of rows of a file that can be read."""
    if kind_of(path) == ".parquet":
        import pyarrow.parquet as pq

        return int(pq.read_metadata(path).num_rows)
    return sum(1 for _ in read_rows(path, RowFaults(path.name, skips=True)))


def data_path(reference: str, folder: Path) -> Path:
    """Return the file behind a path, a ``$name`` (under the job's inputs) or a hub id (in the cache, once fetched)."""
    reference = parse(reference)[0]
    if hub.is_hub(reference):
        return hub.cached_path(reference)
    if not reference.startswith("$"):
        return Path(reference).expanduser()
    found = sorted((folder / "inputs").glob(f"{reference[1:]}.*"))
    if not found:
        raise DataError(f"The run has no table `{reference}`.")
    return found[0]


def ensure(reference: str, folder: Path) -> Path:
    """Return the file behind a reference, fetched from the hub if need be: for workers, never for a kernel."""
    reference = parse(reference)[0]
    return hub.fetch(reference) if hub.is_hub(reference) else data_path(reference, folder)


def held_out_source(recipe: Recipe) -> str:
    """Return the reference of the held-out rows: their own, or that of the training rows they are a share of."""
    return recipe.data.held_out if isinstance(recipe.data.held_out, str) else recipe.data.train


def source_name(reference: str) -> str:
    """Return what messages call a source: a file by its name, all else as the user wrote it."""
    return reference if reference.startswith("$") or hub.is_hub(reference) else Path(reference).name


def identity(recipe: Recipe, prints: dict[str, str]) -> str:
    """Return the identity of a run: what is trained, on what.

    A table given as an object counts by its content alone, whatever the variable was called.
    """
    content = recipe.normalised()
    for role, reference in references(recipe).items():
        if reference.startswith("$"):
            part = parse(reference)[1]
            name = f"${role}" if part is None else f"${role}{part}"
            mixed = role.removeprefix("mix_")
            if mixed != role:
                content["data"]["mix"][int(mixed) - 1]["data"] = name
            elif role == "corpus":
                content["vocabulary"]["corpus"] = name
            elif role == "ewc_data":
                content["retain"]["ewc_data"] = name
            else:
                content["data"][role] = name
    return fingerprint.identity(content, prints)


def fingerprints(recipe: Recipe, model: Path, locate: Callable[[str], Path]) -> dict[str, str]:
    """Return the SHA-256 of each file the result depends on, by role, and of each plug-in that a cell defines.

    Args:
        recipe: Names the files.
        model: The model's folder or file.
        locate: From a reference to its file.
    """
    found = {role: fingerprint.of_file(locate(reference)) for role, reference in references(recipe).items()}
    return found | {"model": fingerprint.of_model(model)} | cell_code.prints(recipe)
