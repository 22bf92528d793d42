"""Score a language model that chooses: the likeliest of the answers a row offers, without writing any."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tune_magic.data.example import Example, Segment
from tune_magic.data.table import Table
from tune_magic.errors import TuneError
from tune_magic.evaluation.likelihood import of_choices
from tune_magic.evaluation.measures import Measure
from tune_magic.evaluation.scorer import Said, Scorer
from tune_magic.training.tuned import Tuned

LIKELIEST = "likeliest"
RIGHT = Measure("likeliest answer right")
_MOST_CHOICES = 64
_DIGITS = 6


class ChoiceScorer(Scorer):
    """Rows of a prompt and branches, one for each answer to choose among; the row's label is the number of the right one."""

    def prepare(self, rows: Table) -> None:
        """There is one measure."""
        self.measures = {LIKELIEST: RIGHT}

    def ask(self, side: Tuned, examples: Sequence[Example]) -> list[Said]:
        """Return the log-likelihood of each answer."""
        return chosen(side, examples, self.advance)

    def values(self, said: Sequence[Said], examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Return 1 where the likeliest answer is the right one, else 0."""
        right = [float(np.argmax(row["choices"]) == example.label) for row, example in zip(said, examples, strict=True)]
        return {LIKELIEST: np.array(right)[:, None]}

    def columns(self, said: Said) -> dict[str, Any]:
        """Return the number of the likeliest answer."""
        return {"": int(np.argmax(said["choices"]))}


class Answers:
    """The answers that all rows have between them, for the metric that asks which of them a model finds likeliest.

    Args:
        rows: By the tuned model's tokens.

    Raises:
        TuneError: There are too many different ones, or rows have none.
    """

    def __init__(self, rows: Table) -> None:
        self.texts = sorted(_texts(rows))
        self._tails: dict[str, np.ndarray] = {}

    def meet(self, rows: Table) -> None:
        """Learn the answers' tokens of rows that were made by another tokenizer."""
        self._tails = {}
        for example in rows:
            if example.reference not in self._tails and not example.num_cut:
                assert example.reference is not None
                self._tails[example.reference] = example.trunk.tokens[example.answer_start :]

    def offered(self, example: Example) -> Example:
        """Return a row with every answer as a branch of its prompt."""
        prompt = Segment(example.prompt, np.zeros(example.answer_start, dtype=np.float32))
        tails = (self._tails[text] for text in self.texts)
        return Example(prompt, tuple(Segment(tail, np.ones(len(tail), dtype=np.float32)) for tail in tails))

    def right(self, said: Sequence[Said], examples: Sequence[Example]) -> np.ndarray:
        """Return 1 where the likeliest answer is the row's own, else 0, (rows, 1)."""
        pairs = zip(said, examples, strict=True)
        return np.array([[float(self.likeliest(row) == example.reference)] for row, example in pairs])

    def likeliest(self, said: Said) -> str:
        """Return the likeliest answer."""
        return self.texts[int(np.argmax(said["choices"]))]


def chosen(side: Tuned, examples: Sequence[Example], advance: Any) -> list[Said]:
    """Return the log-likelihood of each branch, row by row, as it is kept."""
    return [{"choices": np.round(own, _DIGITS).tolist()} for own in of_choices(side, examples, advance)]


def _texts(rows: Iterable[Example]) -> set[str]:
    found: set[str] = set()
    for example in rows:
        if example.reference is None or not example.answer_start:
            raise TuneError(f"`{LIKELIEST}` needs rows with a prompt and an answer; these are plain texts.")
        if not example.num_cut:
            found.add(example.reference)
        if len(found) > _MOST_CHOICES:
            raise TuneError(
                f"`{LIKELIEST}` chooses among the answers that the rows have, and these have more than {_MOST_CHOICES}.",
                hint="It is for rows whose answer is one of a few, such as a class; exact_match reads what is written.",
            )
    return found
