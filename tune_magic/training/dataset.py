"""The rows a recipe names, as examples on disk."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tune_magic import collector, plugins
from tune_magic.data import formats, lens, read
from tune_magic.data.example import Example
from tune_magic.data.locate import ensure, source_name
from tune_magic.data.render import Part, Renderer
from tune_magic.data.split import split
from tune_magic.data.table import Table, TableWriter
from tune_magic.errors import DataError, TuneError
from tune_magic.objectives.base import Objective
from tune_magic.recipe.schema import Recipe

_PART_ROWS = 4096  # read, recognised and encoded at once
_HEAD_ROWS = 64  # of the training rows, kept for people to look at
_LEAST_TRAINED = 2.0  # tokens a row, on average: an end mark alone teaches nothing


@dataclass
class Dataset:
    """The examples of a run, each table in file order."""

    train: Table
    held_out: Table


class Rows:
    """Reads, recognises and encodes rows, some at a time.

    Args:
        recipe: Names them.
        folder: The job folder, which holds tables given as objects.
        tokenizer: The model's.
        max_length: Longest example in tokens.
        objective: What was trained, for rows that come after it; None: by the recipe and the training rows.
        look: Called now and then; may raise to break off.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, tokenizer: Any, max_length: int, objective: Objective | None = None, *,
        look: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.recipe = recipe
        self.folder = folder
        self.renderer = Renderer(tokenizer, chat_template=recipe.data.chat_template, max_length=max_length)
        self.objective_name = ""
        self._head: list[formats.Content] = []
        self._objective = objective
        self._look = look
        self._count = 0  # of examples so far

    @property
    def objective(self) -> Objective:
        """What is minimised; known once the training rows were read."""
        assert self._objective is not None
        return self._objective

    def examples(self, reference: str) -> Table:
        """Read, check and encode the rows behind a reference.

        Raises:
            DataError: Naming file, line, column and text of what is wrong.
        """
        with collector.off():
            return self._examples(reference)

    def dataset(self) -> Dataset:
        """Return training and held-out examples."""
        rows = self.examples(self.recipe.data.train)
        self._refuse_untrained(rows)
        held_out = self.recipe.data.held_out
        if isinstance(held_out, str):
            return Dataset(rows, self.examples(held_out))
        train_rows, held_out_rows = split(len(rows), held_out, self.recipe.seed, rows.labels)
        if not len(train_rows):
            raise DataError("No row is left for training.", hint="Lower `data.held_out` or add rows.")
        return Dataset(rows.take(train_rows), rows.take(held_out_rows))

    def facts(self, dataset: Dataset) -> dict[str, Any]:
        """Return the rows in numbers, and the first ones as the model sees them, JSON-ready."""
        train = dataset.train
        return {
            "objective": {"name": self.objective_name, **self.objective.facts()},
            **({"class_rows": self._class_rows(train.labels)} if train.labels is not None else {}),
            "train_rows": len(train),
            "held_out_rows": len(dataset.held_out),
            "tokens_per_epoch": int(train.lengths.sum(dtype=np.int64)),
            "trained_tokens_per_epoch": int(train.weights.sum(dtype=np.float64)),
            "longest_row_tokens": int(train.lengths.max()),
            "cut_rows": int((train.num_cut > 0).sum()),
            "max_length": self.renderer.max_length,
            "chat_template": self.renderer.uses_template and not self.objective.scores_rows,
            "lens": self._lens(train),
        }

    def _lens(self, train: Table) -> list[dict[str, Any]]:
        first = [example for example in train[:_HEAD_ROWS] if example.index < len(self._head)]
        shown = lens.rows_to_show(first)
        return [lens.lens(example, self._head[example.index], self.renderer) for example in shown]

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

    def _examples(self, reference: str) -> Table:
        path, source = ensure(reference, self.folder), source_name(reference)
        parts = _parts(path)
        first = next(parts, [])
        if self._objective is None:
            self._objective = self._new_objective(first, path, source)
        normaliser = formats.Normaliser(first, self.recipe.data, source, self._objective.formats)
        faults = read.RowFaults(source)
        # one part is tokenised, which needs no interpreter, while the next is read
        with TableWriter(self.folder, offset=self._count) as writer, ThreadPoolExecutor(1) as encoder:
            place = 0
            encoded: Future[list[Example]] = encoder.submit(list)
            for rows in itertools.chain([first], parts):
                self._look()
                contents = normaliser.contents(rows)
                if not self._count and not place:
                    self._head = contents[:_HEAD_ROWS]
                self._keep(encoded.result(), writer)
                encoded = encoder.submit(list)
                if not normaliser.faults:  # otherwise it ends in an error anyway
                    part = Part(contents, [row.place for row in rows], place, faults)
                    encoded = encoder.submit(self._objective.examples, part, self.renderer)
                place += len(rows)
            self._keep(encoded.result(), writer)
            normaliser.raise_if_any()
            faults.raise_if_any()
            table = writer.table()
        self._count += len(table)
        return table

    def _keep(self, examples: list[Example], writer: TableWriter) -> None:
        try:
            writer.add(examples)
        except OSError as error:
            raise TuneError(
                f"The rows cannot be kept as tokens in {self.folder}: {error.strerror}.",
                hint="Free some space, then resume the run.",
            ) from error

    def _new_objective(self, first: list[read.Row], path: Path, source: str) -> Objective:
        """Return the objective of the recipe, or of the first rows, with what it learns of all of them."""
        is_labelled = formats.format_of(first, self.recipe.data) == "text_label"
        self.objective_name = self.recipe.objective or ("classify" if is_labelled else "sft")
        objective: Objective = plugins.get("objective", self.objective_name)()
        if objective.learns:
            normaliser = formats.Normaliser(first, self.recipe.data, source, objective.formats)

            def contents() -> Iterator[formats.Content]:
                for rows in _parts(path):
                    self._look()
                    yield from normaliser.contents(rows)
                normaliser.raise_if_any()

            objective.learn(contents(), source)
        return objective


def _parts(path: Path) -> Iterator[list[read.Row]]:
    """Yield the rows of a file, many at a time."""
    rows = read.read_rows(path)
    while part := list(itertools.islice(rows, _PART_ROWS)):
        yield part
