"""What scores a model over rows: it is asked about some rows at a time, and what it said becomes numbers."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import numpy as np

from tune_magic.data.example import Example
from tune_magic.data.table import Table
from tune_magic.evaluation.measures import Measure
from tune_magic.storage.events import number
from tune_magic.training.tuned import Tuned

Said = dict[str, Any]  # what a model said of a row, as JSON can keep it


def known(losses: Sequence[Any]) -> np.ndarray:
    """Return losses as they were kept, (rows,); one that is no number is infinite, so that it is not left out."""
    found = np.array([number(loss) for loss in losses])
    return np.where(np.isnan(found), np.inf, found)


class Scorer(abc.ABC):
    """Asks models about rows and scores what they say; memory holds a few numbers of each row, never what was said.

    Args:
        tuned: The run's model with recipe, objective and method.
        rows: The rows.
        options: Of the evaluate job: metrics, max_new_tokens.
        advance: Called with the number of rows done, also with 0; may raise to break off.

    Attributes:
        measures: What is scored, by name.
        asked: What models are asked, beside the rows; together with those it decides what a model says. None: a plug-in
            without a version has a say.
        passes: How often `advance` is told of each row.
        at_once: How many rows are asked about at once; None: all, since rows are compared with each other.
    """

    passes = 1
    at_once: ClassVar[int | None] = 4096

    def __init__(self, tuned: Tuned, rows: Table, options: dict[str, Any], advance: Callable[[int], None]) -> None:
        self.tuned = tuned
        self.options = options
        self.advance = advance
        self.measures: dict[str, Measure] = {}
        self.asked: dict[str, Any] | None = {}
        self.prepare(rows)

    @abc.abstractmethod
    def prepare(self, rows: Table) -> None:
        """Set `measures` and what depends on the rows.

        Raises:
            TuneError: What was asked for cannot be measured of these rows.
        """

    def meet(self, rows: Table) -> None:  # noqa: B027 - most need not
        """Look at all rows of a side, by its tokens, before it is asked."""

    @abc.abstractmethod
    def ask(self, side: Tuned, examples: Sequence[Example]) -> list[Said]:
        """Return what a model says of every row.

        Where several examples are one row, ``place`` is the number of its first one among `examples`.

        Args:
            side: A model: the tuned one, its base, or another of its kind.
            examples: Rows, by the tokens of that model.
        """

    @abc.abstractmethod
    def values(self, said: Sequence[Said], examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Return the numbers of rows for each measure, (rows, k); NaN for rows that it does not read.

        Args:
            said: What a model said.
            examples: The rows it was asked about, by the tuned model's tokens.
        """

    @abc.abstractmethod
    def columns(self, said: Said) -> dict[str, Any]:
        """Return what readers are shown of what a model said; the answer itself under an empty name."""

    def unreadable(self, said: Iterable[Said]) -> dict[str, int]:
        """Return how many answers cannot be read by those metrics that read more than words."""
        return {}

    def parts(self, examples: Sequence[Example]) -> list[str] | None:
        """Return the part of the rows that each row is of, where parts are scored apart, too."""
        return None

    def about(self, rows: Table) -> dict[str, Any]:
        """Return what else a reader must know about the scores."""
        return {}

    def tables(self, said: Iterable[Said], rows: Table) -> dict[str, Any]:
        """Return what the report holds of the tuned model beside scores."""
        return {}

    def score(self, name: str, side: Tuned, examples: Sequence[Example]) -> float:
        """Return one score of a model over some rows."""
        return self.measures[name].of(self.values(self.ask(side, examples), examples)[name])
