"""The rows of a receipt: which they are, and how a model that was written is judged over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune_magic.data.example import Example
from tune_magic.errors import TuneError
from tune_magic.evaluation.answers import longest_answer
from tune_magic.evaluation.metrics import ExactMatch
from tune_magic.evaluation.sides import rows_to_score
from tune_magic.exporters import parity
from tune_magic.exporters.parity import Limits, Measured, Reader
from tune_magic.storage.control import Control
from tune_magic.storage.events import EventLog
from tune_magic.training.tuned import Tuned

_ROWS = {True: 200, False: 8}  # by default; a classifier reads a row in milliseconds, a language model writes it out
_MOST_NEW_TOKENS = 48


class Comparison:
    """Held-out rows that readers are run over.

    Args:
        tuned: Whose rows they are.
        count: So many of them; default: 200 to classify, 8 to answer.
        advance: Called with 1 after each row; may raise to break off.

    Attributes:
        examples: The rows; none when the run's data is gone.
        split: What they are, or why there are none.
        new_tokens: Longest answer; None where no texts are written.
    """

    def __init__(self, tuned: Tuned, count: int | None, advance: Callable[[int], None]) -> None:
        self.examples: list[Example] = []
        try:
            table, self.split = rows_to_score(tuned, tuned.run.path)
            self.examples = table[: count or _ROWS[tuned.objective.scores_rows]]
        except TuneError as error:
            self.split = f"not compared: {error.message}"
        self.advance = advance
        self.new_tokens = None if tuned.objective.scores_rows else self._longest(tuned)
        self._right = _right(tuned, self.examples)
        self._has_loss = tuned.objective.engine != "outputs"

    def measure(self, reader: Reader) -> Measured | None:
        """Run a reader over the rows; None where there are none."""
        return parity.measure(reader, self.examples, self.new_tokens, self.advance) if self.examples else None

    def figures(self, trained: Measured, exported: Measured) -> dict[str, Any]:
        """Return what two models differ by."""
        targets = [parity.targets(example) for example in self.examples] if self._has_loss else None
        return parity.compare(trained, exported, self.examples, self._right, targets)

    def judged(self, trained: Measured | None, reader: Reader, limits: Limits) -> dict[str, Any]:
        """Return a receipt's figures and verdict; `ok` is None where there are no rows."""
        if trained is None:
            return {"ok": None, "complaints": [self.split]}
        exported = self.measure(reader)
        assert exported is not None
        figures = self.figures(trained, exported)
        wrong = parity.complaints(figures, limits)
        return {
            **figures, "split": self.split, "unit": "row" if self.new_tokens is None else "token",
            "computed_by": reader.computed_by, "limits": vars(limits), "ok": not wrong, "complaints": wrong,
        }  # fmt: skip

    def _longest(self, tuned: Tuned) -> int:
        longest = longest_answer(self.examples, tuned.tokenizer) if self.examples else _MOST_NEW_TOKENS
        return min(_MOST_NEW_TOKENS, longest)


@dataclass(frozen=True)
class Order:
    """What is to be written and how it is compared.

    Attributes:
        quantize: One of the exporter's quantizations, or None.
        rows: How many to compare on; None: by kind of model.
        limits: What may differ.
        target: The folder that becomes the export.
        advance: Told of each row.
    """

    quantize: str | None
    rows: int | None
    limits: Limits
    target: Path
    advance: Advance


class Advance:
    """Tells a job's log how many rows are done, and looks whether it is to stop.

    Args:
        log: Of the job.
        control: The job's ear.

    Attributes:
        total: Rows in all, set when it is known.
    """

    def __init__(self, log: EventLog, control: Control) -> None:
        self.total = 1
        self._log, self._control, self._done = log, control, 0

    def __call__(self, count: int) -> None:
        """Count rows that are done."""
        self._done += count
        self._log.append("progress", done=self._done, total=max(self.total, self._done))
        self._control.check()


def _right(tuned: Tuned, examples: list[Example]) -> Callable[[Example, list[int]], bool] | None:
    """Return how an answer is told to be right: the class, or an exact match; None for plain texts."""
    if tuned.objective.gives == "outputs":
        return None
    if tuned.objective.gives == "classes":
        return lambda example, answer: answer == [example.label]
    if any(example.reference is None for example in examples):
        return None
    metric, tokenizer = ExactMatch(), tuned.tokenizer

    def is_match(example: Example, answer: list[int]) -> bool:
        return bool(metric.score(tokenizer.decode(answer, skip_special_tokens=True), example.reference or ""))

    return is_match
