"""Score what a model finds in rows, whatever it is: measures, sets of classes, tags, spans, nearness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tune_magic.data.example import Example
from tune_magic.data.table import Table
from tune_magic.errors import DataError, TuneError
from tune_magic.evaluation.by_evaluate import PREFIX, metric_called
from tune_magic.evaluation.class_metrics import OfEachLabel
from tune_magic.evaluation.measures import measure_of
from tune_magic.evaluation.metrics import OutputMetric, ProbabilityMetric
from tune_magic.evaluation.scorer import Said, Scorer
from tune_magic.objectives.base import Objective
from tune_magic.training.outputs import outputs_of
from tune_magic.training.tuned import Tuned


class OutputScorer(Scorer):
    """One pass over the rows in length-sorted batches; where rows are of several parts, each is scored apart as well."""

    at_once = None  # a right text is ranked among all of them

    def prepare(self, rows: Table) -> None:
        """Choose the metrics."""
        wanted = self.options.get("metrics") or self.tuned.objective.metrics
        self.metrics: dict[str, OutputMetric] = {name: self._fitting(metric_called(name)) for name in wanted}
        wrong = [name for name, metric in self.metrics.items() if not isinstance(metric, OutputMetric)]
        if wrong:
            raise TuneError(
                f"`{wrong[0]}` does not score what this run finds.",
                hint=f"By default it is scored by: {', '.join(self.tuned.objective.metrics)}.",
            )
        self.measures = {name: measure_of(metric) for name, metric in self.metrics.items()}
        inner = [metric.metric if isinstance(metric, OfEachLabel) else metric for metric in self.metrics.values()]
        ours = all(type(metric).__module__.startswith("tune_magic.") for metric in inner)
        theirs = any(name.startswith(PREFIX) for name in self.metrics)  # their numbers mean nothing to another job
        self.asked = {"metrics": list(self.metrics)} if ours and not theirs else None

    def _fitting(self, metric: Any) -> Any:
        """Return a metric of probabilities as one that reads labels, where rows have labels."""
        has_labels = type(self.tuned.objective).likely is not Objective.likely
        reads = isinstance(metric, ProbabilityMetric) and metric.reads_labels
        return OfEachLabel(metric) if has_labels and reads else metric

    def ask(self, side: Tuned, examples: Sequence[Example]) -> list[Said]:
        """Return what a model finds in every row, in words, and the numbers that metrics make of it.

        Raises:
            DataError: No row can be scored by any metric.
        """
        objective = side.objective
        outputs = outputs_of(side.engine(), objective, examples, done=self.advance)
        found, given = objective.judged(outputs, examples)
        likely: Any = objective.likely(outputs)
        targets = [example.targets for example in examples]
        places = {example.number: place for place, example in enumerate(examples)}
        said: list[Said] = [
            {"text": text, "place": places[example.number], "values": {}}
            for example, text in objective.spoken(outputs, examples)
        ]
        for name, metric in self.metrics.items():
            read = [row for row, answer in enumerate(given) if answer is not None and metric.reads(answer)]
            if read:
                theirs = (likely, targets) if isinstance(metric, OfEachLabel) else (found, given)
                numbers = metric.values(*([one[row] for row in read] for one in theirs))
                for row, own in zip(read, numbers.tolist(), strict=True):
                    said[row]["values"][name] = own
        if not any(row["values"] for row in said):
            raise DataError("No row says what would have been right, so nothing can be scored.")
        return said

    def values(self, said: Sequence[Said], examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Return what each metric counts of the rows it reads."""
        found = {}
        for name in self.measures:
            read = {row: own["values"][name] for row, own in enumerate(said) if name in own["values"]}
            if read:
                found[name] = np.full((len(said), len(next(iter(read.values())))), np.nan)
                found[name][list(read)] = list(read.values())
        return found

    def columns(self, said: Said) -> dict[str, Any]:
        """Return what was found, in words."""
        return {"": said["text"]}

    def parts(self, examples: Sequence[Example]) -> list[str] | None:
        """Return the task or the domain of each row."""
        return self.tuned.objective.groups(examples)
