"""One source of rows: read, recognised, mended, encoded, or taken from what was encoded before."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tune_magic import collector
from tune_magic.data import cleaning, kept, normalise
from tune_magic.data.content import Content
from tune_magic.data.example import Example
from tune_magic.data.locate import read, source_name
from tune_magic.data.read import Row, RowFaults
from tune_magic.data.render import Part, Renderer
from tune_magic.data.table import Table, TableWriter
from tune_magic.errors import DataError, TuneError
from tune_magic.objectives.base import Objective
from tune_magic.recipe.schema import DataOptions, SourceOptions
from tune_magic.storage.events import EventLog

_PART_ROWS = 4096  # read, recognised and encoded at once
_HEAD_ROWS = 64  # kept for people to look at
_SECONDS_BETWEEN = 2.0  # lines on the progress of reading
LENGTH = "length"  # of a row in tokens, where no column is called so
_MOST_SKIPPED_SHARE = 0.5  # of the rows; with more, it is the recipe that does not fit

Watch = Callable[[Sequence[Content], Sequence[int]], None]


@dataclass
class Source:
    """The rows behind a reference, encoded.

    Attributes:
        name: What people call it.
        table: Its examples.
        recognised: Name of its format, and what told it.
        head: The first rows in normal form.
        groups: Number of the group of each example, None where each stands alone.
        skipped: Bad rows that were left out: place and problem of the first, and how many.
        mended: Rows that were changed before they were encoded, by what was done.
    """

    name: str
    table: Table
    recognised: tuple[str, str]
    head: list[Content | None]
    groups: np.ndarray | None
    skipped: tuple[list[tuple[str, str]], int]
    mended: dict[str, list[int]]


class Reading:
    """The rows of a source, the first ones looked at before the others.

    Args:
        reference: Names the source.
        folder: The job folder, which holds tables given as objects.
        data: The recipe's word on all sources.
        options: Its word on this one.

    Attributes:
        first: The first rows, until `parts` is called.
        faults: Takes bad rows.
    """

    def __init__(self, reference: str, folder: Path, data: DataOptions, options: SourceOptions) -> None:
        self.faults = RowFaults(source_name(reference), skips=data.on_bad_rows == "skip")
        self._options = options
        self._rows = read(reference, folder, self.faults)
        self.first = list(itertools.islice(self._rows, _PART_ROWS))
        self._normaliser: normalise.Normaliser | None = None

    def normaliser(self, known: Sequence[str], group_by: str | None = None) -> normalise.Normaliser:
        """Return what brings the rows to normal form.

        Args:
            known: Formats that the objective learns from.
            group_by: A column that must be there too.
        """
        if not self.first:
            self.faults.raise_if_any(whole=True)
        self._normaliser = normalise.Normaliser(self.first, self._options, self.faults, known, also=group_by)
        return self._normaliser

    def parts(self) -> Iterator[list[Row]]:
        """Yield all rows, many at a time, as they stand alone; `normaliser` comes first."""
        assert self._normaliser is not None
        rows = iter(self._normaliser.assemble(itertools.chain(self.first, self._rows)))
        self.first = []
        while part := list(itertools.islice(rows, _PART_ROWS)):
            yield part


class Encoder:
    """Encodes one source after the other; their examples are told apart by their numbers.

    Args:
        data: The recipe's word on all sources.
        folder: The job folder, on whose disk tokens are kept.
        renderer: Makes tokens of texts.
        look: Called now and then; may raise to break off.
        tell: Called with what is done, how much of it, and the whole where it is known.
    """

    def __init__(
        self, data: DataOptions, folder: Path, renderer: Renderer,
        look: Callable[[], None], tell: Callable[[str, int, int | None], None],
    ) -> None:  # fmt: skip
        self._data = data
        self._folder = folder
        self._renderer = renderer
        self._look = look
        self._tell = tell
        self._count = 0  # of examples so far
        self._read = 0  # of rows so far

    @collector.off()
    def source(
        self, reference: str, options: SourceOptions, objective: Objective, *,
        group_by: str | None = None, watch: Watch | None = None,
    ) -> Source:  # fmt: skip
        """Read, check and encode the rows behind a reference, or take them as they were encoded before.

        Args:
            reference: Names the source.
            options: The recipe's word on it.
            objective: Makes examples of rows.
            group_by: A column of rows that belong together.
            watch: Is shown the rows in normal form, with the number of each; nothing is taken from the cache then.

        Raises:
            DataError: Naming file, line, column and text of what is wrong.
        """
        key = kept.key(
            reference, options, data=self._data, job=self._folder, renderer=self._renderer, objective=objective
        )
        found = None if watch else kept.load(key, self._count)
        if found is None:
            return self._encoded(Reading(reference, self._folder, self._data, options), objective, key, group_by, watch)
        table, about = found
        self._count += len(table)
        return Source(source_name(reference), table, **about)

    def contents(self, reference: str, objective: Objective, wanted: set[int]) -> dict[int, Content]:
        """Return some rows of the training file in normal form, mended, by their numbers."""
        reading, place = Reading(reference, self._folder, self._data, self._data), 0
        normaliser, mending = reading.normaliser(objective.known_formats()), cleaning.Mending(self._data.clean)
        found: dict[int, Content] = {}
        for rows in reading.parts():
            chosen = [number for number in range(len(rows)) if place + number in wanted]
            contents = mending.mend(normaliser.contents([rows[number] for number in chosen]), place)
            pairs = zip(chosen, contents, strict=True)
            found |= {place + number: content for number, content in pairs if content is not None}
            place += len(rows)
        return found

    def columns(
        self, reference: str, objective: Objective, names: Sequence[str], wanted: set[int]
    ) -> dict[str, dict[int, Any]]:
        """Return the values of columns as they stand in a source, of some rows, by their numbers.

        Raises:
            DataError: There is no such column; that of ``length`` need not be there.
        """
        reading, place = Reading(reference, self._folder, self._data, self._data), 0
        known = {name for row in reading.first for name in row.values}
        for name in names:
            if name not in known and name != LENGTH:
                raise DataError(
                    f"{reading.faults.source} has no column `{name}`.", hint=f"Its columns: {', '.join(sorted(known))}."
                )
        reading.normaliser(objective.known_formats())
        found: dict[str, dict[int, Any]] = {name: {} for name in names if name in known}
        for rows in reading.parts():
            for number in wanted.intersection(range(place, place + len(rows))):
                for name, values in found.items():
                    values[number] = rows[number - place].values.get(name)
            place += len(rows)
        return found

    def table(self, part: Part, objective: Objective) -> Table:
        """Return rows that are at hand as examples."""
        with TableWriter(self._folder, offset=self._count) as writer:
            self._keep(objective.examples(part, self._renderer), writer)
            table = writer.table()
        self._count += len(table)
        return table

    def _encoded(
        self, reading: Reading, objective: Objective, key: str | None, group_by: str | None, watch: Watch | None
    ) -> Source:
        faults, normaliser = reading.faults, reading.normaliser(objective.known_formats(), group_by)
        mending, groups = cleaning.Mending(self._data.clean), _Groups(normaliser, group_by)
        head: list[Content | None] = []
        # one part is tokenised, which needs no interpreter, while the next is read
        with TableWriter(self._folder, offset=self._count) as writer, ThreadPoolExecutor(1) as encoder:
            place = 0
            encoded: Future[list[Example]] = encoder.submit(list)
            for rows in reading.parts():
                self._look()
                contents = mending.mend(normaliser.contents(rows), place)
                groups.add(rows)
                head += contents[: _HEAD_ROWS - len(head)]
                good = [number for number, content in enumerate(contents) if content is not None]
                part = Part(
                    [content for content in contents if content is not None],
                    [rows[number].place for number in good],
                    [place + number for number in good],
                    faults,
                )
                self._keep(encoded.result(), writer)
                if watch:
                    watch(part.contents, part.numbers)
                encoded = encoder.submit(objective.examples, part, self._renderer)
                place += len(rows)
                self._read += len(rows)
                self._tell("reading rows", self._read, None)
            self._keep(encoded.result(), writer)
            normaliser.raise_if_any()
            table = writer.table()
            faults.raise_if_any(whole=len(faults) > _MOST_SKIPPED_SHARE * place or not len(table))
            self._count += len(table)
            about: dict[str, Any] = {
                "recognised": (normaliser.recognised.name, normaliser.recognised.why),
                "head": head,
                "groups": groups.of(table),
                "skipped": (faults.listed, len(faults)),
                "mended": mending.done,
            }
            kept.save(key, writer, about)
        return Source(faults.source, table, **about)

    def _keep(self, examples: list[Example], writer: TableWriter) -> None:
        try:
            writer.add(examples)
        except OSError as error:
            raise TuneError(
                f"The rows cannot be kept as tokens in {self._folder}: {error.strerror}.",
                hint="Free some space, then resume the run.",
            ) from error


class Progress:
    """Logs how far the rows are, now and then, so that whoever waits sees that something happens.

    Args:
        log: Takes the `progress` events.
    """

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._told = time.monotonic()

    def tell(self, stage: str, done: int, total: int | None) -> None:
        """Note that so many are done of so many."""
        if time.monotonic() - self._told > _SECONDS_BETWEEN:
            self._told = time.monotonic()
            self._log.append("progress", stage=stage, done=done, total=total)


class _Groups:
    """Which rows belong together.

    Args:
        normaliser: Knows the format, which may say.
        group_by: The recipe's word, which wins.
    """

    def __init__(self, normaliser: normalise.Normaliser, group_by: str | None) -> None:
        self._column = group_by or normaliser.recognised.format.group
        self._numbers: dict[Any, int] = {}
        self._rows: list[int] = []

    def add(self, rows: Sequence[Row]) -> None:
        """Note the groups of rows."""
        if self._column is not None:
            numbers = self._numbers
            self._rows += [numbers.setdefault(str(row.values.get(self._column)), len(numbers)) for row in rows]

    def of(self, table: Table) -> np.ndarray | None:
        """Return the group of each example; examples of one row belong together in any case."""
        indices = table.indices
        if self._column is not None:
            numbers: np.ndarray = np.asarray(self._rows, dtype=np.int64)[indices]
            return numbers
        is_apart = len(indices) > 1 and bool((np.diff(indices) == 0).any())
        return np.asarray(indices) if is_apart else None
