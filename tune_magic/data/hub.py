"""Rows of the Hugging Face hub: fetched once, then a file like any other.

What was fetched is kept as Parquet in the user's cache, so the same recipe is the same run, offline as well, whatever
happens on the hub since. Deleting that file fetches anew.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune_magic import files
from tune_magic.data.read import SUFFIXES
from tune_magic.errors import DataError
from tune_magic.storage import fingerprint, places

# ID, ID:SPLIT, ID@SUBSET or ID@SUBSET:SPLIT; a split may have colons of its own, as in train[:80%]
_REFERENCE = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(?:@(?P<subset>[^:/\\]+))?(?::(?P<split>.+))?", re.ASCII)
_SHOWN_NAMES = 20


@dataclass(frozen=True)
class HubRows:
    """Rows of a data set on the hub.

    Attributes:
        id: Owner and name of the data set.
        subset: Which configuration; None: its only one, or its default.
        split: A split expression of `datasets`, such as ``train[:80%]`` or ``train+test``.
    """

    id: str
    subset: str | None = None
    split: str = "train"

    def __str__(self) -> str:
        subset = "" if self.subset is None else f"@{self.subset}"
        return f"{self.id}{subset}:{self.split}"


def parse(reference: str) -> HubRows | None:
    """Return the rows a reference names if it has the form of a hub id, else None.

    Example:
        >>> print(parse("nyu-mll/glue@sst2"))
        nyu-mll/glue@sst2:train
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None or match["id"].lower().endswith(SUFFIXES):
        return None
    return HubRows(match["id"], match["subset"], match["split"] or "train")


def is_hub(reference: str) -> bool:
    """Return whether a reference means the hub: it has the form of a hub id, and nothing here is called so."""
    rows = parse(reference)
    # os, because pathlib raises where a name is too long to be a file's
    return rows is not None and not any(os.path.exists(name) for name in (reference, rows.id))  # noqa: PTH110


def cached_path(reference: str) -> Path:
    """Return the file in which the rows of a hub reference are kept, whether it is there or not."""
    rows = parse(reference)
    assert rows is not None
    name = re.sub(r"[^\w.-]+", "-", str(rows), flags=re.ASCII).strip("-")[:100]
    return places.cache_folder() / "data" / f"{name}-{fingerprint.of_text(str(rows))[:8]}.parquet"


def fetch(reference: str) -> Path:
    """Return the file with the rows of a hub reference, fetched when it is not there yet.

    Code from the hub is never run.

    Raises:
        DataError: Saying what the hub does not have, or why it could not be asked.
    """
    import pyarrow.parquet as pq

    path, rows = cached_path(reference), parse(reference)
    if not path.is_file():
        assert rows is not None
        table = _load(rows)
        files.make_folder(path.parent)
        files.produce(path, lambda temporary: pq.write_table(table, temporary))
    return path


def parquet_of(dataset: Any) -> bytes:
    """Return a `datasets` object as a Parquet file, classes by their names; one that streams is read to its end."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    if isinstance(dataset, datasets.IterableDataset):
        dataset = datasets.Dataset.from_list(list(dataset), features=dataset.features)
    written = pa.BufferOutputStream()
    pq.write_table(_named_classes(dataset), written)
    return bytes(written.getvalue())


def _load(rows: HubRows) -> Any:
    """Return the rows as an Arrow table, classes by their names.

    These are the steps of `datasets.load_dataset`, taken one by one because each fails for reasons of its own.
    """
    import datasets

    with _without_bars():
        try:
            builder = datasets.load_dataset_builder(rows.id, rows.subset)
            builder.download_and_prepare()
        except Exception as error:
            raise _refusal(rows, error) from error
        try:
            dataset = builder.as_dataset(split=rows.split)
        except ValueError as error:
            raise DataError(
                f"The data set `{rows.id}` has no split `{rows.split}`.",
                hint=f"Its splits: {_shown(builder.info.splits)}. Also parts, `train[:80%]`, and sums, `train+test`.",
            ) from error
        return _named_classes(dataset)


def _refusal(rows: HubRows, error: Exception) -> DataError:
    """Say why a data set cannot be had, and what to do."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError

    problem = f"The data set `{rows.id}` could not be fetched: {error.__cause__ or error}."
    hint = "Its files may be broken, or the network."
    subsets = re.search(r"vailable(?: configs)?: \[(.*)\]", str(error))  # what follows "Available", in a ValueError
    if isinstance(error, DatasetNotFoundError | HFValidationError):
        problem = f"There is no file {rows.id}, and the hub has no data set `{rows.id}` that you may read."
        hint = "Is the name right? A private one needs `hf auth login`, a gated one your consent on its page."
    elif isinstance(error, ConnectionError):
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        problem = f"There is no file {rows.id}, and the data set `{rows.id}` was not fetched yet: {reason}."
        hint = f"Fetch it once with a network; it is kept in {places.cache_folder() / 'data'}."
    elif isinstance(error, RuntimeError) and "scripts" in str(error):
        problem = f"The data set `{rows.id}` needs code of its own, which is never run."
        hint = "Look for a copy in Parquet, or convert it once and name the file."
    elif isinstance(error, ValueError) and subsets:
        names = re.findall(r"'([^']+)'", subsets[1])
        wrong = "has several subsets" if rows.subset is None else f"has no subset `{rows.subset}`"
        problem = f"The data set `{rows.id}` {wrong}."
        hint = f"Its subsets: {_shown(names)}. Name one: `{rows.id}@{names[0]}`."
    return DataError(problem, hint=hint)


def _shown(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - _SHOWN_NAMES} more" if len(every) > _SHOWN_NAMES else ""
    return ", ".join(every[:_SHOWN_NAMES]) + more


def _named_classes(dataset: Any) -> Any:
    """Return a dataset as an Arrow table, with the names of classes in the place of their numbers."""
    import pyarrow as pa
    from datasets import ClassLabel, List

    table = dataset.with_format("arrow")[:]
    for index, (column, feature) in enumerate(dataset.features.items()):
        if isinstance(feature, ClassLabel):
            named = [_name(value, feature.names) for value in table[column].to_pylist()]
            table = table.set_column(index, column, pa.array(named, pa.string()))
        elif isinstance(feature, List) and isinstance(feature.feature, ClassLabel):
            names = feature.feature.names
            lists = [value and [_name(item, names) for item in value] for value in table[column].to_pylist()]
            table = table.set_column(index, column, pa.array(lists, pa.list_(pa.string())))
    return table.replace_schema_metadata(None)  # which would still call the names numbers


def _name(number: int | None, names: list[str]) -> str | None:
    """Return the name of a class; -1 stands for one that is not told, as in the test splits of competitions."""
    return None if number is None or number < 0 else names[number]


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """While inside, `datasets` and the hub's client show no progress bars."""
    import datasets
    from huggingface_hub import utils

    shown = [library for library in (datasets, utils) if not library.are_progress_bars_disabled()]
    for library in shown:
        library.disable_progress_bars()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bars()
