"""What scores a model over rows: by its answers, or by the classes it chooses."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

from tune_magic.data.example import Example
from tune_magic.evaluation.comparison import Comparison
from tune_magic.training.tuned import Tuned


class Scorer(abc.ABC):
    """Scores a model over rows.

    Args:
        tuned: The run's model with recipe, objective and method.
        examples: The rows.
        options: Of the evaluate job: metrics, max_new_tokens.
        advance: Called with the number of rows done, also with 0; may raise to break off.

    Attributes:
        total: Rows that `advance` will have been told for base and tuned together.
    """

    total: int

    def __init__(
        self, tuned: Tuned, examples: Sequence[Example], options: dict[str, Any], advance: Callable[[int], None]
    ) -> None:
        self.tuned = tuned
        self.examples = examples
        self.options = options
        self.advance = advance

    @abc.abstractmethod
    def score(self, side: Tuned, examples: Sequence[Example]) -> Any:
        """Return what a model does with every row.

        Args:
            side: The tuned model or its base.
            examples: The rows, by the tokens of that model.
        """

    def about_row(self, example: Example) -> dict[str, Any]:
        """Return the columns that tell a row."""
        return {"row": example.index, "question": example.question, "reference": example.reference}

    @abc.abstractmethod
    def rows(self, base: Any, tuned: Any) -> list[dict[str, Any]]:
        """Return every row with what both models made of it."""

    @abc.abstractmethod
    def compare(self, base: Any, tuned: Any) -> dict[str, Comparison]:
        """Return each metric of both with the interval of their difference."""

    def about(self) -> dict[str, Any]:
        """Return what else a reader must know about the scores."""
        return {}

    def tables(self, base: Any, tuned: Any) -> dict[str, Any]:
        """Return what the report holds beside metrics."""
        return {}


class ExampleScorer(Scorer):
    """Base of scorers of which each example is a row."""

    def rows(self, base: Any, tuned: Any) -> list[dict[str, Any]]:
        """Return every example with what both models made of it."""
        return [
            {**self.about_row(example), **self.row(number, base, tuned)} for number, example in enumerate(self.examples)
        ]

    @abc.abstractmethod
    def row(self, number: int, base: Any, tuned: Any) -> dict[str, Any]:
        """Return the columns of an example, each for base and tuned."""
