"""Score what a model finds in rows, whatever it is: measures, sets of classes, tags, spans, nearness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tune_magic import plugins
from tune_magic.data.example import Example
from tune_magic.errors import DataError, TuneError
from tune_magic.evaluation.compare import Statistic, compare
from tune_magic.evaluation.comparison import Comparison
from tune_magic.evaluation.metrics import OutputMetric
from tune_magic.evaluation.scorer import Scorer
from tune_magic.training.outputs import outputs_of
from tune_magic.training.tuned import Tuned


@dataclass
class Values:
    """What a metric counts of the rows it reads.

    Attributes:
        places: Of these rows among all.
        numbers: (rows, k).
    """

    places: np.ndarray
    numbers: np.ndarray

    def of(self, places: np.ndarray) -> np.ndarray:
        """Return the numbers of those rows that are among some places."""
        return self.numbers[np.isin(self.places, places)]


@dataclass
class Findings:
    """One model over all rows.

    Attributes:
        said: Each row's first example, and what the model found, in words.
        values: What each metric counts.
    """

    said: list[tuple[Example, str]]
    values: dict[str, Values]


class OutputScorer(Scorer):
    """One pass over the rows in length-sorted batches; where rows are of several parts, each is scored apart as well."""

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
        """Return what a model finds in every row.

        Raises:
            DataError: No row can be scored by any metric.
        """
        objective = side.objective
        outputs = outputs_of(side.engine(), objective, examples, done=self.advance)
        found, given = objective.judged(outputs, examples)
        values = {}
        for name, metric in self.metrics.items():
            places = [place for place, answer in enumerate(given) if answer is not None and metric.reads(answer)]
            if places:
                numbers = metric.values([found[place] for place in places], [given[place] for place in places])
                values[name] = Values(np.array(places), numbers)
        if not values:
            raise DataError("No row says what would have been right, so nothing can be scored.")
        return Findings(objective.spoken(outputs, examples), values)

    def rows(self, base: Findings, tuned: Findings) -> list[dict[str, Any]]:
        """Return each row, with what both found and the metrics that are one number a row."""
        rows = [
            {**self.about_row(example), "base": said, "tuned": text}
            for (_, said), (example, text) in zip(base.said, tuned.said, strict=True)
        ]
        for name, values in tuned.values.items():
            if values.numbers.shape[1] == 1 and len(values.places) == len(rows):
                for number, row in enumerate(rows):
                    row[f"{name}_base"] = float(base.values[name].numbers[number, 0])
                    row[f"{name}_tuned"] = float(values.numbers[number, 0])
        return rows

    def compare(self, base: Findings, tuned: Findings) -> dict[str, Comparison]:
        """Compare every metric that was asked for, over all rows and over each part of them."""
        groups = self.tuned.objective.groups(self.examples)
        found = {}
        for name in tuned.values:
            everywhere = np.arange(len(self.examples))
            parts = {"": everywhere}
            if groups is not None and len(set(groups)) > 1:
                parts |= {f" · {group}": everywhere[np.array(groups) == group] for group in sorted(set(groups))}
            for part, places in parts.items():
                sides = base.values[name].of(places), tuned.values[name].of(places)
                if len(sides[0]):
                    found[f"{name}{part}"] = self._comparison(name, part, *sides)
        return found

    def _comparison(self, name: str, part: str, base: np.ndarray, tuned: np.ndarray) -> Comparison:
        metric = self.metrics[name]
        return compare(
            f"{metric.title}{part}", base, tuned, statistic=_unshared(metric), higher_is_better=metric.higher_is_better
        )


def _unshared(metric: OutputMetric) -> Statistic:
    return lambda values, _: metric.statistic(values)
