"""The rows a recipe names, as examples on disk."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tune_magic import collector, plugins
from tune_magic.data import cleaning, kept, lens, mixture, normalise
from tune_magic.data.content import Content
from tune_magic.data.example import Example
from tune_magic.data.locate import read, source_name
from tune_magic.data.read import Row, RowFaults
from tune_magic.data.render import Part, Renderer
from tune_magic.data.split import split
from tune_magic.data.table import Table, TableWriter
from tune_magic.errors import DataError, TuneError
from tune_magic.objectives.base import Objective
from tune_magic.recipe.schema import DataOptions, Recipe, SourceOptions
from tune_magic.storage.events import EventLog
from tune_magic.training import augment

_PART_ROWS = 4096  # read, recognised and encoded at once
_HEAD_ROWS = 64  # of the training rows, kept for people to look at
_LEAST_TRAINED = 2.0  # tokens a row, on average: an end mark alone teaches nothing
_SECONDS_BETWEEN = 2.0  # lines on the progress of reading
_MOST_SKIPPED_SHARE = 0.5  # of the rows; with more, it is the recipe that does not fit


@dataclass
class Dataset:
    """The examples of a run.

    Attributes:
        train: What is trained on, in file order, one source behind the other.
        held_out: What is only scored.
        draws: How many rows of which part an epoch has; empty: each training row once.
    """

    train: Table
    held_out: Table
    draws: list[mixture.Draw] = field(default_factory=list)


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


class Rows:
    """Reads, recognises and encodes rows, some at a time.

    Attributes:
        sources: What was read so far.
        cleaned: What was left out of the training rows, by kind and source.
        augmented: What was made of training rows, by augmenter.
        held_out_rows: Numbers of the rows that a share held out of the training file, from 1; None: no share did.

    Args:
        recipe: Names them.
        folder: The job folder, which holds tables given as objects.
        tokenizer: The model's.
        max_length: Longest example in tokens.
        objective: What was trained, for rows that come after it; None: by the recipe and the training rows.
        look: Called now and then; may raise to break off.
        tell: Called with what is done ("reading rows", "making rows"), how much of it, and the whole where it is known.
        watch: Is shown the training rows in normal form, with the number of each; nothing is taken from the cache then.
        preview: So many rows are made by each augmenter, to be looked at and not trained; None: as the recipe says.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, tokenizer: Any, max_length: int, objective: Objective | None = None, *,
        look: Callable[[], None] = lambda: None,
        tell: Callable[[str, int, int | None], None] = lambda stage, done, total: None,
        watch: Callable[[Sequence[Content], Sequence[int]], None] | None = None,
        preview: int | None = None,
    ) -> None:  # fmt: skip
        self.recipe = recipe
        self.folder = folder
        self.renderer = Renderer(tokenizer, chat_template=recipe.data.chat_template, max_length=max_length)
        self.objective_name = ""
        self.sources: list[Source] = []
        self.cleaned: list[dict[str, Any]] = []
        self.held_out_rows: np.ndarray | None = None
        self._objective = objective
        self._look = look
        self._tell = tell
        self._watch = watch
        self._preview = preview
        self.augmented: list[dict[str, Any]] = []
        self._count = 0  # of examples so far
        self._read = 0  # of rows so far

    @property
    def objective(self) -> Objective:
        """What is minimised; known once the training rows were read."""
        assert self._objective is not None
        return self._objective

    def examples(self, reference: str) -> Table:
        """Read, check and encode the rows behind a reference, as the recipe's training rows are.

        Raises:
            DataError: Naming file, line, column and text of what is wrong.
        """
        return self._source(reference, self.recipe.data).table

    def dataset(self) -> Dataset:
        """Return training and held-out examples.

        Raises:
            DataError: Something is wrong with them, or too little is left.
        """
        data = self.recipe.data
        train, held_out = self._split()
        more = mixture.more_sources(data)
        others = [self._source(source.data, source).table for source in more]
        sources = np.repeat(np.arange(1 + len(others)), [len(train), *map(len, others)])
        joined = train.joined(others) if others else train
        names = [source.name for source in self._trained()]
        stays, self.cleaned = cleaning.clean(joined, held_out, data.clean, sources, names)
        if len(stays) < len(joined):
            joined, sources = joined.take(stays), sources[stays]
        if not (sources == 0).any():
            why = "Every row was cleaned away." if self.cleaned else "No row is left for training."
            raise DataError(why, hint="Lower `data.held_out`, clean less, or add rows.")
        if data.augment:
            made = self._made(np.unique(joined.indices[sources == 0]))
        if data.augment and not self._preview:
            joined, sources = joined.joined([made]), np.concatenate([sources, np.zeros(len(made), dtype=sources.dtype)])
        return Dataset(joined, held_out, mixture.draws(data, more, sources, joined.labels))

    def held_out(self) -> Table:
        """Return the rows that training only scores."""
        return self._split()[1]

    def _split(self) -> tuple[Table, Table]:
        """Return the rows of `train` that are trained on, and those that are held out."""
        data = self.recipe.data
        main = self._source(data.train, data, is_main=True)
        self._refuse_untrained(main.table)
        if isinstance(data.held_out, str):
            return main.table, self._source(data.held_out, data).table
        groups, labels = main.groups, main.table.labels
        places, held_out_places = split(len(main.table), data.held_out, self.recipe.seed, labels, groups)
        self.held_out_rows = np.unique(main.table.indices[held_out_places]) + 1
        return main.table.take(places), main.table.take(held_out_places)

    def _made(self, rows: np.ndarray) -> Table:
        """Return the rows that `augment` makes of training rows; those of an earlier attempt, where there was one."""
        data, seed = self.recipe.data, self.recipe.seed
        drawn = augment.draw(data.augment, rows, seed)
        planned = {one.kind: len(some) for one, some in zip(data.augment, drawn, strict=True)}
        if self._preview:
            drawn = [some[: self._preview] for some in drawn]
        contents = self._contents({int(row) for some in drawn for row in some})
        made = augment.read(self.folder)
        if made is None:
            made = augment.make(self.recipe, drawn, contents, self._tell_made)
            augment.write(self.folder, made)
            made = augment.read(self.folder) or []  # as a resumed run will see them
        self.augmented = augment.facts(made, contents)
        if self._preview:
            self.augmented = [{**about, "rows": planned[about["kind"]], "is_preview": True} for about in self.augmented]
        faults = RowFaults("augmented rows", skips=True)  # a wording may be too long
        places = [f"row {one.row + 1}" for one in made]
        part = Part([one.content for one in made], places, [one.row for one in made], faults)
        with TableWriter(self.folder, offset=self._count) as writer:
            self._keep(self.objective.examples(part, self.renderer), writer)
            table = writer.table()
        self._count += len(table)
        return table

    def _tell_made(self, done: int, total: int) -> None:
        self._look()
        self._tell("making rows", done, total)

    def _contents(self, wanted: set[int]) -> dict[int, Content]:
        """Return rows of `train` in normal form, by their numbers."""
        data, place = self.recipe.data, 0
        reading = _Reading(data.train, self.folder, RowFaults(source_name(data.train), skips=True), data)
        normaliser, mending = reading.normaliser(self.objective.formats, data), cleaning.Mending(data.clean)
        found: dict[int, Content] = {}
        for rows in reading.parts():
            chosen = [number for number in range(len(rows)) if place + number in wanted]
            contents = mending.mend(normaliser.contents([rows[number] for number in chosen]), place)
            for number, content in zip(chosen, contents, strict=True):
                if content is not None:
                    found[place + number] = content
            place += len(rows)
        return found

    def facts(self, dataset: Dataset) -> dict[str, Any]:
        """Return the rows in numbers, and the first ones as the model sees them, JSON-ready."""
        train = dataset.train
        skipped = {source.name: source.skipped for source in self.sources if source.skipped[1]}
        epoch = mixture.epoch_weights(dataset.draws, len(train))
        return {
            "objective": {"name": self.objective_name, **self.objective.facts()},
            **({"class_rows": self._class_rows(train.labels)} if train.labels is not None else {}),
            "format": self.sources[0].recognised[0],
            "recognised_by": self.sources[0].recognised[1],
            "train_rows": len(train),
            "held_out_rows": len(dataset.held_out),
            "tokens_per_epoch": round(float((train.lengths * epoch).sum(dtype=np.float64))),
            "trained_tokens_per_epoch": round(float((train.weights * epoch).sum(dtype=np.float64))),
            "longest_row_tokens": int(train.lengths.max()),
            "cut_rows": int((train.num_cut > 0).sum()),
            "max_length": self.renderer.max_length,
            "chat_template": self.renderer.uses_template and not self.objective.scores_rows,
            "lens": self._lens(train),
            **({"augmented": self.augmented} if self.augmented else {}),
            **(
                {"mixture": mixture.facts(dataset.draws, self.objective.facts().get("classes", ()))}
                if dataset.draws
                else {}
            ),
            **({"skipped": {name: _skipped(*found) for name, found in skipped.items()}} if skipped else {}),
            **({"cleaned": self._cleaned()} if self._cleaned() else {}),
        }

    def _trained(self) -> list[Source]:
        """Return the sources that are trained on: all but held-out rows of their own, which come second."""
        has_own = isinstance(self.recipe.data.held_out, str)
        return [source for number, source in enumerate(self.sources) if not (has_own and number == 1)]

    def _cleaned(self) -> list[dict[str, Any]]:
        """Return what was mended and what was left out, source by source."""
        mended = [
            {"kind": kind, "source": source.name, **_some(rows)}
            for source in self.sources
            for kind, rows in source.mended.items()
            if rows
        ]
        return [*mended, *self.cleaned]

    def _lens(self, train: Table) -> list[dict[str, Any]]:
        head = self.sources[0].head
        first = [example for example in train[:_HEAD_ROWS] if example.index < len(head)]
        shown = lens.rows_to_show(first)
        return [lens.lens(example, head[example.index], self.renderer) for example in shown]

    def _class_rows(self, labels: np.ndarray) -> dict[str, int]:
        """Return the number of training rows of each class that has some, the largest first."""
        names = self.objective.facts()["classes"]
        numbers, counts = np.unique(labels, return_counts=True)
        ordered = sorted(zip(counts.tolist(), numbers.tolist(), strict=True), key=lambda pair: -pair[0])
        return {names[number]: count for count, number in ordered}

    def _refuse_untrained(self, rows: Table) -> None:
        """Refuse rows of which next to nothing would be learned.

        Raises:
            DataError: With the share, and what usually causes it.
        """
        least = self.recipe.data.min_trained_share
        if self.objective.scores_rows or not len(rows) or least == 0:
            return
        trained, tokens = float(rows.weights.sum(dtype=float)), int(rows.lengths.sum(dtype=int))
        share, each = trained / tokens, trained / len(rows)
        if share >= least and each >= _LEAST_TRAINED:
            return
        cut = int((rows.num_cut > 0).sum())
        hint = "Are the columns the right way round? `%finetune --dry-run` shows what is trained."
        if cut > len(rows) / 2:
            hint = f"{cut} of {len(rows)} rows are cut at max_length ({self.renderer.max_length}); raise it."
        hint += " `min_trained_share: 0` under `data:` trains all the same."
        raise DataError(
            f"Next to nothing would be learned: {trained:.0f} of {tokens} tokens are trained ({100 * share:.2f} %, "
            f"{each:.1f} a row).",
            hint=hint,
        )

    def _source(self, reference: str, options: SourceOptions, *, is_main: bool = False) -> Source:
        """Read, check and encode the rows behind a reference."""
        with collector.off():
            if self._objective is None:
                self._objective = self._new_objective(reference)
            watch = self._watch if is_main else None
            key = kept.key(
                reference, options,
                data=self.recipe.data, job=self.folder, renderer=self.renderer, objective=self.objective,
            )  # fmt: skip
            source = None if watch else self._kept(key, reference)
            if source is None:
                source = self._encoded(reference, options, watch, key)
            self.sources.append(source)
            return source

    def _kept(self, key: str | None, reference: str) -> Source | None:
        """Return a source as it was encoded before, None when it was not."""
        found = kept.load(key, self._count)
        if found is None:
            return None
        table, about = found
        self._count += len(table)
        return Source(source_name(reference), table, **about)

    def _encoded(
        self, reference: str, options: SourceOptions,
        watch: Callable[[Sequence[Content], Sequence[int]], None] | None, key: str | None,
    ) -> Source:  # fmt: skip
        name, data = source_name(reference), self.recipe.data
        reading = _Reading(reference, self.folder, RowFaults(name, skips=data.on_bad_rows == "skip"), options)
        normaliser = reading.normaliser(self.objective.formats, data)
        mending = cleaning.Mending(data.clean)
        head: list[Content | None] = []
        # one part is tokenised, which needs no interpreter, while the next is read
        with TableWriter(self.folder, offset=self._count) as writer, ThreadPoolExecutor(1) as encoder:
            place, groups = 0, _Groups(normaliser, data)
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
                    reading.faults,
                )
                self._keep(encoded.result(), writer)
                if watch:
                    watch(part.contents, part.numbers)
                encoded = encoder.submit(self.objective.examples, part, self.renderer)
                place += len(rows)
                self._read += len(rows)
                self._tell("reading rows", self._read, None)
            self._keep(encoded.result(), writer)
            normaliser.raise_if_any()
            table = writer.table()
            reading.faults.raise_if_any(whole=len(reading.faults) > _MOST_SKIPPED_SHARE * (place + 1) or not len(table))
            self._count += len(table)
            about: dict[str, Any] = {
                "recognised": (normaliser.recognised.name, normaliser.recognised.why),
                "head": head,
                "groups": groups.of(table),
                "skipped": (reading.faults.listed, len(reading.faults)),
                "mended": mending.done,
            }
            kept.save(key, writer, about)
        return Source(name, table, **about)

    def _keep(self, examples: list[Example], writer: TableWriter) -> None:
        try:
            writer.add(examples)
        except OSError as error:
            raise TuneError(
                f"The rows cannot be kept as tokens in {self.folder}: {error.strerror}.",
                hint="Free some space, then resume the run.",
            ) from error

    def _new_objective(self, reference: str) -> Objective:
        """Return the objective of the recipe, or of the first rows, with what it learns of all of them."""
        data, name = self.recipe.data, source_name(reference)
        faults = RowFaults(name, skips=data.on_bad_rows == "skip")
        reading = _Reading(reference, self.folder, faults, data)
        self.objective_name = self.recipe.objective or self._default_objective(reading)
        objective: Objective = plugins.get("objective", self.objective_name)()
        if objective.learns:
            normaliser = reading.normaliser(objective.formats, data)

            def contents() -> Iterator[Content]:
                for rows in reading.parts():
                    self._look()
                    yield from (content for content in normaliser.contents(rows) if content is not None)
                normaliser.raise_if_any()
                faults.raise_if_any()

            objective.learn(contents(), name)
        return objective

    def _default_objective(self, reading: _Reading) -> str:
        """Return what learns from rows of this format.

        Raises:
            DataError: Nothing that is installed does.
        """
        found = normalise.recognise(reading.first, self.recipe.data)
        if found is None:
            return "sft"  # whose formats the error will name
        if found.format.objective not in plugins.names("objective"):
            raise normalise.unlearned(found, reading.faults.source)
        return found.format.objective


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


class _Reading:
    """The rows of a source, the first ones looked at before the others."""

    def __init__(self, reference: str, folder: Path, faults: RowFaults, options: SourceOptions) -> None:
        self.faults = faults
        self._options = options
        self._rows = read(reference, folder, faults)
        self.first = list(itertools.islice(self._rows, _PART_ROWS))
        self._normaliser: normalise.Normaliser | None = None

    def normaliser(self, known: Sequence[str], data: DataOptions) -> normalise.Normaliser:
        """Return what brings the rows to normal form."""
        if not self.first:
            self.faults.raise_if_any(whole=True)
        group_by = data.group_by if self._options is data else None
        self._normaliser = normalise.Normaliser(self.first, self._options, self.faults, known, also=group_by)
        return self._normaliser

    def parts(self) -> Iterator[list[Row]]:
        """Yield all rows, many at a time, as they stand alone."""
        assert self._normaliser is not None
        rows = iter(self._normaliser.assemble(itertools.chain(self.first, self._rows)))
        self.first = []
        while part := list(itertools.islice(rows, _PART_ROWS)):
            yield part


class _Groups:
    """Which rows belong together.

    Args:
        normaliser: Knows the format, which may say.
        data: The recipe's word, which wins.
    """

    def __init__(self, normaliser: normalise.Normaliser, data: DataOptions) -> None:
        self._column = data.group_by or normaliser.recognised.format.group
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


def _some(rows: Sequence[int]) -> dict[str, Any]:
    return {"count": len(rows), "rows": [row + 1 for row in rows[: cleaning.LISTED]]}


def _skipped(listed: Sequence[tuple[str, str]], count: int) -> dict[str, Any]:
    return {"count": count, "rows": [{"place": place, "problem": problem} for place, problem in listed]}
