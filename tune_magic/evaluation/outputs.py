"""Score what a model finds in rows, whatever it is: measures, sets of classes, tags, spans, nearness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tune_magic import plugins
from tune_magic.data.example import Example
from tune_magic.errors import TuneError
from tune_magic.evaluation.compare import Statistic, compare
from tune_magic.evaluation.comparison import Comparison
from tune_magic.evaluation.metrics import OutputMetric
from tune_magic.evaluation.scorer import Scorer
from tune_magic.training.outputs import outputs_of
from tune_magic.training.tuned import Tuned


@dataclass
class Findings:
    """One model over all rows.

    Attributes:
        said: Each row's first example, and what the model found, in words.
        values: By metric, what it counts of each row, (rows, k).
    """

    said: list[tuple[Example, str]]
    values: dict[str, np.ndarray]


def _unshared(metric: OutputMetric) -> Statistic:
    return lambda values, _: metric.statistic(values)


class OutputScorer(Scorer):
    """One pass over the rows in length-sorted batches."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        wanted = self.options.get("metrics") or self.tuned.objective.metrics
        self.metrics: dict[str, OutputMetric] = {name: plugins.get("metric", name)() for name in wanted}
        wrong = [name for name, metric in self.metrics.items() if not isinstance(metric, OutputMetric)]
        if wrong:
            raise TuneError(
                f"`{wrong[0]}` does not score what this run finds.",
                hint=f"By default it is scored by: {', '.join(self.tuned.objective.metrics)}.",
            )
        self.total = 2 * len(self.examples)

    def score(self, side: Tuned, examples: Sequence[Example]) -> Findings:
        """Return what a model finds in every row."""
        objective = side.objective
        outputs = outputs_of(side.engine(), objective, examples, done=self.advance)
        found, given = objective.judged(outputs, examples)
        values = {name: metric.values(found, given) for name, metric in self.metrics.items()}
        return Findings(objective.spoken(outputs, examples), values)

    def rows(self, base: Findings, tuned: Findings) -> list[dict[str, Any]]:
        """Return each row, with what both found and the metrics that are one number a row."""
        return [
            {
                **self.about_row(example), "base": base.said[number][1], "tuned": text,
                **self._scores(number, base, tuned),
            }
            for number, (example, text) in enumerate(tuned.said)
        ]  # fmt: skip

    def row(self, number: int, base: Findings, tuned: Findings) -> dict[str, Any]:
        """Not asked for: a row may be several examples."""
        raise NotImplementedError

    def compare(self, base: Findings, tuned: Findings) -> dict[str, Comparison]:
        """Compare every metric that was asked for."""
        return {
            name: compare(
                metric.title,
                base.values[name],
                tuned.values[name],
                statistic=_unshared(metric),
                higher_is_better=metric.higher_is_better,
            )
            for name, metric in self.metrics.items()
        }

    def _scores(self, number: int, base: Findings, tuned: Findings) -> dict[str, float]:
        return {
            f"{name}_{side}": float(scored.values[name][number, 0])
            for name in self.metrics
            for side, scored in (("base", base), ("tuned", tuned))
            if scored.values[name].shape[1] == 1
        }
