"""The rows a recipe names, as examples on disk: what is trained on, what is held out, how often which rows come."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tune_magic import plugins
from tune_magic.data import cleaning, lens, mixture, normalise
from tune_magic.data.content import Content
from tune_magic.data.locate import source_name
from tune_magic.data.read import RowFaults
from tune_magic.data.render import Part, Renderer
from tune_magic.data.split import split
from tune_magic.data.table import Table
from tune_magic.errors import DataError
from tune_magic.models.teacher import Teacher
from tune_magic.objectives.base import Objective
from tune_magic.recipe.schema import MixedSource, Recipe, SourceOptions
from tune_magic.training import augment, taught
from tune_magic.training.source import Encoder, Reading, Source, Watch

_LEAST_TRAINED = 2.0  # tokens a row, on average: an end mark alone teaches nothing


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


class Rows:
    """Reads, recognises and encodes the rows of a recipe.

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
        teacher: Who answers the training prompts, where the objective asks for that; None: the rows stay as they are.
        most_taught: Most prompts that the teacher is asked; the rest of the rows is left out then.

    Attributes:
        sources: What was read so far.
        cleaned: What was left out of the training rows, by kind and source.
        augmented: What was made of training rows, by augmenter.
        taught: What a teacher answered training prompts with.
        held_out_rows: Numbers of the rows that a share held out of the training file, from 1; None: no share did.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, tokenizer: Any, max_length: int, objective: Objective | None = None, *,
        look: Callable[[], None] = lambda: None,
        tell: Callable[[str, int, int | None], None] = lambda stage, done, total: None,
        watch: Watch | None = None,
        preview: int | None = None,
        teacher: Teacher | None = None,
        most_taught: int | None = None,
    ) -> None:  # fmt: skip
        self.recipe = recipe
        self.folder = folder
        self.renderer = Renderer(tokenizer, chat_template=recipe.data.chat_template, max_length=max_length)
        self.objective_name = ""
        self.sources: list[Source] = []
        self.cleaned: list[dict[str, Any]] = []
        self.augmented: list[dict[str, Any]] = []
        self.taught: dict[str, Any] = {}
        self.held_out_rows: np.ndarray | None = None
        self._encoder = Encoder(recipe.data, folder, self.renderer, look, tell)
        self._objective = objective
        self._look = look
        self._tell = tell
        self._watch = watch
        self._preview = preview
        self._teacher = teacher
        self._most_taught = most_taught

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

    def earlier(self, reference: str) -> Table:
        """Read, check and encode rows of an earlier training, in whatever format they are.

        Raises:
            DataError: See `examples`.
        """
        return self._source(reference, MixedSource.model_validate({"data": reference})).table

    def dataset(self) -> Dataset:
        """Return training and held-out examples.

        Raises:
            DataError: Something is wrong with them, or too little is left.
        """
        data = self.recipe.data
        train, held_out = self._split()
        if self._teacher is not None and self.objective.learns_answers_of_teacher:
            train = self._taught(train, self._teacher)
            if not len(train):
                raise DataError("All that the teacher answered is empty.", hint="Look at what it says: is it trained?")
        more = mixture.more_sources(data)
        if len(train) and not (more or data.clean or data.augment or data.balance != "none"):
            return Dataset(train, held_out)
        others = [self._source(source.data, source) for source in more]
        sources = np.repeat(np.arange(1 + len(others)), [len(train), *(len(other.table) for other in others)])
        joined = train.joined([other.table for other in others]) if others else train
        names = [source.name for source in (self.sources[0], *others)]
        stays, self.cleaned = cleaning.clean(joined, held_out, data.clean, sources, names)
        if len(stays) < len(joined):
            joined, sources = joined.take(stays), sources[stays]
        if not (sources == 0).any():
            why = "Every row was cleaned away." if self.cleaned else "No row is left for training."
            raise DataError(why, hint="Lower `data.held_out`, clean less, or add rows.")
        if data.augment:
            made = self._made(np.unique(joined.indices[sources == 0]))
            joined, sources = joined.joined([made]), np.concatenate([sources, np.zeros(len(made), dtype=sources.dtype)])
        return Dataset(joined, held_out, mixture.draws(data, more, sources, joined.labels))

    def training(self) -> Table:
        """Return the rows of `train` that are trained on, before anything is cleaned, added or drawn."""
        return self._split()[0]

    def held_out(self) -> Table:
        """Return the rows that training only scores."""
        return self._split()[1]

    def training_numbers(self) -> list[int]:
        """Return the numbers of the rows of `train` that are trained on, in order."""
        numbers: list[int] = np.unique(self._split()[0].indices).tolist()
        return numbers

    def contents(self, reference: str, numbers: Sequence[int]) -> dict[int, Content]:
        """Return some rows of a source in normal form, by their numbers."""
        return self._encoder.contents(reference, self.objective, set(numbers))

    def read_again(
        self, reference: str, rows: Table, change: Callable[[Content], Content] = lambda content: content
    ) -> tuple[Table, np.ndarray]:
        """Encode rows that were encoded by another tokenizer.

        Rows that one of the two cuts, or makes more examples of, are left out, so that both are of the same texts.

        Args:
            reference: Their source.
            rows: The examples that the other tokenizer made.
            change: Makes another question of a row.

        Returns:
            This tokenizer's examples, and the place among `rows` of the one that each is the same as.
        """
        contents = self.contents(reference, rows.indices.tolist())
        order = sorted(contents)
        faults = RowFaults(source_name(reference), skips=True)  # a row may be too long by this one
        part = Part([change(contents[number]) for number in order], [f"row {n + 1}" for n in order], order, faults)
        again = self._encoder.table(part, self.objective)
        ours, theirs = _whole_rows(again), _whole_rows(rows)
        same = [index for index in theirs if len(ours.get(index, ())) == len(theirs[index])]
        found = again.take([place for index in same for place in ours[index]])
        return found, np.array([place for index in same for place in theirs[index]], dtype=np.int64)

    def columns(self, reference: str, names: Sequence[str], rows: Table) -> dict[str, list[Any]]:
        """Return the values of columns of a source, as they stand there, for rows that were read of it.

        Args:
            reference: The source.
            names: Of the columns; ``length``, where there is no such column, is the number of tokens.
            rows: The rows.

        Raises:
            DataError: There is no such column.
        """
        places = rows.indices.tolist()
        found = self._encoder.columns(reference, self.objective, names, set(places))
        return {
            name: [found[name].get(place) for place in places] if name in found else rows.lengths.tolist()
            for name in names
        }

    def _split(self) -> tuple[Table, Table]:
        """Return the rows of `train` that are trained on, and those that are held out."""
        data = self.recipe.data
        main = self._source(data.train, data, group_by=data.group_by, watch=self._watch)
        self._refuse_untrained(main.table)
        if isinstance(data.held_out, str):
            return main.table, self._source(data.held_out, data).table
        groups, labels = main.groups, main.table.labels
        places, held_out_places = split(len(main.table), data.held_out, self.recipe.seed, labels, groups)
        self.held_out_rows = np.unique(main.table.indices[held_out_places]) + 1
        return main.table.take(places), main.table.take(held_out_places)

    def _made(self, rows: np.ndarray) -> Table:
        """Return the rows that `augment` makes of training rows; those of an earlier attempt, where there was one.

        For a preview some are made, and none is returned.
        """
        data = self.recipe.data
        drawn = augment.draw(data.augment, rows, self.recipe.seed)
        planned = {one.kind: len(some) for one, some in zip(data.augment, drawn, strict=True)}
        drawn = [some[: self._preview] for some in drawn]
        contents = self._encoder.contents(data.train, self.objective, {int(row) for some in drawn for row in some})
        made = augment.read(self.folder)
        if made is None:
            made = augment.make(self.recipe, drawn, contents, self._tell_made)
            augment.write(self.folder, made)
            made = augment.read(self.folder) or []  # as a resumed run will see them
        self.augmented = augment.facts(made, contents)
        if self._preview is not None:
            self.augmented = [{**about, "rows": planned[about["kind"]], "is_preview": True} for about in self.augmented]
            made = []
        faults = RowFaults("augmented rows", skips=True)  # a wording may be too long
        places, numbers = [f"row {one.row + 1}" for one in made], [one.row for one in made]
        return self._encoder.table(Part([one.content for one in made], places, numbers, faults), self.objective)

    def _taught(self, rows: Table, teacher: Teacher) -> Table:
        """Return training rows with a teacher's answers; those it had no answer to are left out.

        Raises:
            DataError: They have no prompts, or `augment` would make rows of what they were.
        """
        data = self.recipe.data
        if data.augment:
            raise DataError("`augment` makes rows with the answers of the file, and these get the teacher's.",
                            hint="Leave out `augment`.")  # fmt: skip
        made = taught.read(self.folder)
        if made is None:
            rows = taught.drawn(rows, self._most_taught, self.recipe.seed)
            contents = self._encoder.contents(data.train, self.objective, set(rows.indices.tolist()))
            asking = taught.Asking(teacher, self.recipe, self.folder, self._look, self._tell)
            made = taught.answered(asking, contents, source_name(data.train))
            taught.write(self.folder, made)
            made = taught.read(self.folder) or []  # as a resumed run will see them: without secrets
        kept = [one for one in made if one.content is not None]
        self.taught = taught.facts(made)
        head = self.sources[0].head
        for one in kept:
            if one.row < len(head):
                head[one.row] = one.content
        faults = RowFaults("answers of the teacher", skips=True)  # one may be too long
        places, numbers = [f"row {one.row + 1}" for one in kept], [one.row for one in kept]
        contents_kept = [one.content for one in kept if one.content is not None]
        return self._encoder.table(Part(contents_kept, places, numbers, faults), self.objective)

    def _tell_made(self, done: int, total: int) -> None:
        self._look()
        self._tell("making rows", done, total)

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
            "scores_rows": self.objective.scores_rows,
            **({"new_head": True} if self.objective.new_head else {}),
            "chat_template": self.renderer.uses_template and not self.objective.scores_rows,
            "lens": self._lens(train),
            **({"taught": self.taught} if self.taught else {}),
            **({"augmented": self.augmented} if self.augmented else {}),
            **(
                {"mixture": mixture.facts(dataset.draws, self.objective.facts().get("classes", ()))}
                if dataset.draws
                else {}
            ),
            **({"skipped": {name: _skipped(*found) for name, found in skipped.items()}} if skipped else {}),
            **({"cleaned": self._cleaned()} if self._cleaned() else {}),
        }

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
        first = [example for example in train[: len(head)] if example.index < len(head)]
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

    def _source(
        self, reference: str, options: SourceOptions, *, group_by: str | None = None, watch: Watch | None = None
    ) -> Source:
        """Read, check and encode the rows behind a reference."""
        if self._objective is None:
            self._objective = self._new_objective(reference)
        source = self._encoder.source(reference, options, self._objective, group_by=group_by, watch=watch)
        self.sources.append(source)
        return source

    def _new_objective(self, reference: str) -> Objective:
        """Return the objective of the recipe, or of the first rows, with what it learns of all of them."""
        reading = Reading(reference, self.folder, self.recipe.data, self.recipe.data)
        options = self.recipe.objective
        self.objective_name = options.name if options else self._default_objective(reading)
        objective: Objective = plugins.get("objective", self.objective_name)(options)
        if objective.learns:
            data = self.recipe.data
            others = mixture.more_sources(data) if objective.learns_from_mix else []
            readings = [reading, *(Reading(source.data, self.folder, data, source) for source in others)]
            contents = itertools.chain.from_iterable(self._contents(one, objective) for one in readings)
            objective.learn(contents, reading.faults.source)
        return objective

    def _contents(self, reading: Reading, objective: Objective) -> Iterator[Content]:
        """Yield the rows of a source in normal form."""
        normaliser, is_empty = reading.normaliser(objective.known_formats()), True
        for rows in reading.parts():
            self._look()
            for content in normaliser.contents(rows):
                if content is not None:
                    is_empty = False
                    yield content
        normaliser.raise_if_any()
        reading.faults.raise_if_any(whole=is_empty)

    def _default_objective(self, reading: Reading) -> str:
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


def _whole_rows(table: Table) -> dict[int, list[int]]:
    """Return the places of the examples of each row, by its number in its source; of rows that are cut, none."""
    found: dict[int, list[int]] = {}
    for place, index in enumerate(table.indices.tolist()):
        found.setdefault(index, []).append(place)
    cut = set(table.indices[table.num_cut > 0].tolist())
    return {index: places for index, places in found.items() if index not in cut}


def _some(rows: Sequence[int]) -> dict[str, Any]:
    return {"count": len(rows), "rows": [row + 1 for row in rows[: cleaning.LISTED]]}


def _skipped(listed: Sequence[tuple[str, str]], count: int) -> dict[str, Any]:
    return {"count": count, "rows": [{"place": place, "problem": problem} for place, problem in listed]}
