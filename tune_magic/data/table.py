"""Examples on disk, mapped into memory: a million rows cost some bytes each of memory, whatever their length.

A table is columns in files without a name, which the system removes with the process. What every row is asked for
(lengths, weights, classes) stays in memory; an `Example` is made when it is looked at.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from tune_magic import files
from tune_magic.data.example import Example, Segment

_NONE = -1
# where a row's tokens, branches and texts begin, and what else it has
_ROW = np.dtype([
    ("token", "<i8"), ("branch", "<i8"), ("text", "<i8"), ("target", "<i8"), ("medium", "<i8"), ("trunk", "<i4"),
    ("branches", "<i4"), ("answer_start", "<i4"), ("question", "<i4"), ("reference", "<i4"), ("targets", "<i4"),
    ("media", "<i4"),
])  # fmt: skip
_FACTS_FILE = "facts"
_FACTS = np.dtype([("length", "<i4"), ("weight", "<f4"), ("label", "<i4"), ("num_cut", "<i4"), ("index", "<i4")])
_COLUMNS: dict[str, Any] = {
    "rows": _ROW, "tokens": "<i4", "weights": "<f4", "branches": "<i4", "texts": "u1", "targets": "<f4", "media": "u1",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Store:
    """All examples of one source.

    Attributes:
        columns: Each column's content by its name, mapped from a file.
        facts: What stays in memory of each row.
        offset: Added to a row's number, so that examples of several stores are told apart.
    """

    columns: dict[str, np.ndarray]
    facts: np.ndarray
    offset: int = 0

    def __len__(self) -> int:
        return len(self.facts)


class Table(Sequence[Example]):
    """Examples of one source or of several, in their order, or some of them.

    Args:
        stores: Where they are.
        numbers: Of the rows that are in, in their order, counted through all stores; None: all.
    """

    def __init__(self, stores: Sequence[Store], numbers: np.ndarray | None = None) -> None:
        self._stores = tuple(stores)
        self._numbers = numbers
        self._starts = np.cumsum([0, *map(len, self._stores)])

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._numbers is None else len(self._numbers)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        size = len(self)
        if not -size <= place < size:
            raise IndexError(place)
        place %= size
        return self._example(place if self._numbers is None else int(self._numbers[place]))

    def take(self, places: Sequence[int] | np.ndarray) -> Table:
        """Return the rows at these places, in this order; nothing is copied."""
        chosen = np.asarray(places, dtype=np.int64)
        return Table(self._stores, chosen if self._numbers is None else self._numbers[chosen])

    def joined(self, others: Sequence[Table]) -> Table:
        """Return the rows of this table and then those of others; nothing is copied."""
        tables = [self, *others]
        starts = np.cumsum([0, *(table._starts[-1] for table in tables)])
        numbers = [table._all_numbers() + start for table, start in zip(tables, starts, strict=False)]
        return Table([store for table in tables for store in table._stores], np.concatenate(numbers))

    def _all_numbers(self) -> np.ndarray:
        return np.arange(self._starts[-1]) if self._numbers is None else self._numbers

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, (rows,) int32."""
        return self._facts("length")

    @property
    def weights(self) -> np.ndarray:
        """Weight of each example, (rows,) float32."""
        return self._facts("weight")

    @property
    def labels(self) -> np.ndarray | None:
        """Class number of each example, (rows,) int32; None where rows have no classes."""
        labels = self._facts("label")
        return None if not len(labels) or labels[0] == _NONE else labels

    @property
    def has_branches(self) -> bool:
        """Whether some example is more than a trunk."""
        return any(len(store.columns["branches"]) for store in self._stores)

    @property
    def num_cut(self) -> np.ndarray:
        """Tokens cut off each example, (rows,) int32."""
        return self._facts("num_cut")

    @property
    def indices(self) -> np.ndarray:
        """Number of each example's row in its source, (rows,) int32; several examples may be of one row."""
        return self._facts("index")

    def _facts(self, name: str) -> np.ndarray:
        return self._column([store.facts[name] for store in self._stores])

    def _column(self, parts: list[np.ndarray]) -> np.ndarray:
        column = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return column if self._numbers is None else column[self._numbers]

    def _example(self, number: int) -> Example:
        which = int(np.searchsorted(self._starts, number, side="right")) - 1 if len(self._stores) > 1 else 0
        store, number = self._stores[which], number - int(self._starts[which])
        columns = store.columns
        (token, branch, text, target, medium, trunk, branches, answer_start, question, reference, targets, media) = (
            columns["rows"][number].item()
        )
        length, _, label, num_cut, index = store.facts[number].item()
        tokens, weights = (columns[name][token : token + length] for name in ("tokens", "weights"))
        ends = [trunk, *(trunk + np.cumsum(columns["branches"][branch : branch + branches])).tolist()]
        return Example(
            trunk=Segment(tokens[:trunk], weights[:trunk]),
            branches=tuple(Segment(tokens[a:b], weights[a:b]) for a, b in itertools.pairwise(ends)),
            answer_start=answer_start,
            question=_text(columns["texts"], text, question),
            reference=_text(columns["texts"], text + max(0, question), reference),
            num_cut=num_cut,
            index=index,
            label=None if label == _NONE else label,
            targets=None if targets == _NONE else columns["targets"][target : target + targets],
            media=None if media == _NONE else columns["media"][medium : medium + media].tobytes(),
            number=store.offset + number,
        )


def _text(texts: np.ndarray, start: int, size: int) -> str | None:
    return None if size == _NONE else texts[start : start + size].tobytes().decode()


def table_of_files(folder: Path, offset: int = 0) -> Table:
    """Return the table that a writer copied to a folder, its columns mapped.

    Raises:
        OSError: It is not there, or damaged.
    """
    columns = {name: _mapped(folder / name, dtype) for name, dtype in _COLUMNS.items()}
    facts = np.fromfile(folder / _FACTS_FILE, dtype=_FACTS)
    if len(facts) != len(columns["rows"]) or int(facts["length"].sum(dtype=np.int64)) != len(columns["tokens"]):
        raise OSError(f"{folder} is damaged")
    return Table([Store(columns, facts, offset)])


def _mapped(path: Path, dtype: Any) -> np.ndarray:
    if not path.stat().st_size:
        return np.empty(0, dtype=dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="c"))


class TableWriter:
    """Takes examples and becomes a table.

    Args:
        folder: On a disk with room for them.
        offset: As in `Store`.
    """

    def __init__(self, folder: Path, offset: int = 0) -> None:
        self._offset = offset
        self._open = contextlib.ExitStack()
        self._scratch = {name: self._open.enter_context(files.scratch(folder)) for name in _COLUMNS}
        self._ends = dict.fromkeys(("tokens", "branches", "texts", "targets", "media"), 0)
        self._facts: list[np.ndarray] = []

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self._open.close()

    def add(self, examples: Sequence[Example]) -> None:
        """Append examples.

        Raises:
            OSError: The disk is full.
        """
        if not examples:
            return
        segments = [segment for example in examples for segment in (example.trunk, *example.branches)]
        weights = np.concatenate([segment.weights for segment in segments]).astype("<f4", copy=False)
        texts = [[text.encode() if text else text for text in (e.question, e.reference)] for e in examples]
        lengths = np.array([len(example) for example in examples])
        self._facts.append(_facts(examples, lengths, weights))
        self._append("rows", self._rows(examples, lengths, texts))
        self._append("tokens", np.concatenate([segment.tokens for segment in segments]).astype("<i4", copy=False))
        self._append("weights", weights)
        self._append("branches", np.array([len(b) for example in examples for b in example.branches], dtype="<i4"))
        self._scratch["texts"].append(b"".join(text for pair in texts for text in pair if text))
        targets = [example.targets for example in examples if example.targets is not None]
        self._append("targets", np.concatenate([np.empty(0), *targets]).astype("<f4"))
        self._scratch["media"].append(b"".join(example.media for example in examples if example.media))

    def _rows(self, examples: Sequence[Example], lengths: np.ndarray, texts: list[list[Any]]) -> np.ndarray:
        rows = np.empty(len(examples), dtype=_ROW)
        rows["trunk"] = [len(example.trunk) for example in examples]
        rows["branches"] = [len(example.branches) for example in examples]
        rows["answer_start"] = [example.answer_start for example in examples]
        for place, name in enumerate(("question", "reference")):
            rows[name] = [_NONE if pair[place] is None else len(pair[place]) for pair in texts]
        for name, values in (("targets", [e.targets for e in examples]), ("media", [e.media for e in examples])):
            rows[name] = [_NONE if value is None else len(value) for value in values]
        text_sizes = np.maximum(rows["question"], 0).astype(np.int64) + np.maximum(rows["reference"], 0)
        for name, column, sizes in (
            ("token", "tokens", lengths), ("branch", "branches", rows["branches"]), ("text", "texts", text_sizes),
            ("target", "targets", np.maximum(rows["targets"], 0)), ("medium", "media", np.maximum(rows["media"], 0)),
        ):  # fmt: skip
            ends = self._ends[column] + np.cumsum(sizes, dtype=np.int64)
            rows[name] = ends - sizes
            self._ends[column] = int(ends[-1])
        return rows

    def _append(self, name: str, column: np.ndarray) -> None:
        self._scratch[name].append(column.tobytes())

    @property
    def count(self) -> int:
        """Examples added so far."""
        return sum(map(len, self._facts))

    @property
    def num_bytes(self) -> int:
        """Bytes of the tokens added so far; the whole takes a few times as many."""
        size: int = np.dtype(_COLUMNS["tokens"]).itemsize
        return size * self._ends["tokens"]

    def copy_to(self, folder: Path) -> None:
        """Write everything added so far as files of a folder, for `table_of_files`.

        Raises:
            OSError: The disk is full.
        """
        for name, scratch in self._scratch.items():
            scratch.copy_to(folder / name)
        files.write_bytes(folder / _FACTS_FILE, self._all_facts().tobytes(), durable=False)

    def table(self) -> Table:
        """Return everything added so far; call it inside the block, the table outlives it."""
        columns = {name: np.frombuffer(self._scratch[name].map(), dtype) for name, dtype in _COLUMNS.items()}
        return Table([Store(columns, self._all_facts(), self._offset)])

    def _all_facts(self) -> np.ndarray:
        self._facts = [np.concatenate([np.empty(0, dtype=_FACTS), *self._facts])]
        return self._facts[0]


def _facts(examples: Sequence[Example], lengths: np.ndarray, weights: np.ndarray) -> np.ndarray:
    facts = np.empty(len(examples), dtype=_FACTS)
    ends = np.cumsum(lengths)
    sums = np.concatenate([[0.0], np.cumsum(weights, dtype=np.float64)])
    facts["length"] = lengths
    facts["label"] = [_NONE if example.label is None else example.label for example in examples]
    facts["num_cut"] = [example.num_cut for example in examples]
    facts["index"] = [example.index for example in examples]
    weight, has_targets = sums[ends] - sums[ends - lengths], [example.targets is not None for example in examples]
    facts["weight"] = np.where((facts["label"] != _NONE) | (np.array(has_targets) & (weight == 0)), 1.0, weight)
    return facts
