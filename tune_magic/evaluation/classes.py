"""Score a classifier: classes chosen against classes given, as a whole and class by class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from tune_magic.data.example import Example
from tune_magic.data.table import Table
from tune_magic.errors import TuneError
from tune_magic.evaluation.by_evaluate import metric_called
from tune_magic.evaluation.curves import curves_of
from tune_magic.evaluation.measures import Measure, measure_of
from tune_magic.evaluation.metrics import Accuracy, ClassMetric, ProbabilityMetric
from tune_magic.evaluation.report import PER_CLASS
from tune_magic.evaluation.scorer import Said, Scorer, known
from tune_magic.training.outputs import outputs_of
from tune_magic.training.tuned import Tuned

DEFAULT_METRICS = ("accuracy", "macro_f1", "loss")
_DIGITS = 6  # of a probability that is kept


class ClassScorer(Scorer):
    """One pass over the rows in length-sorted batches."""

    def prepare(self, rows: Table) -> None:
        """Choose the metrics."""
        self.classes: list[str] = self.tuned.objective.facts()["classes"]
        wanted = self.options.get("metrics") or DEFAULT_METRICS
        self.metrics = {name: metric_called(name, of_classes=True) for name in wanted if name != "loss"}
        wrong = [name for name, m in self.metrics.items() if not isinstance(m, ClassMetric | ProbabilityMetric)]
        if wrong:
            raise TuneError(f"`{wrong[0]}` compares answers; this run chooses classes.")
        self.measures = {name: _measure(metric) for name, metric in self.metrics.items()}
        if "loss" in wanted:
            self.measures["loss"] = Measure("loss", higher_is_better=False)
        self._needs_all = any(isinstance(metric, ProbabilityMetric) for metric in self.metrics.values())
        self.asked = {"probabilities": self._needs_all}

    def ask(self, side: Tuned, examples: Sequence[Example]) -> list[Said]:
        """Return the number of the likeliest class of each row, how likely it is, and -log p of the given one."""
        logits = np.stack(outputs_of(side.engine(), side.objective, examples, done=self.advance))
        log_p = torch.log_softmax(torch.from_numpy(logits), -1).numpy()
        chosen, rows = log_p.argmax(-1), np.arange(len(examples))
        given = np.array([example.label for example in examples])
        likely = np.exp(log_p)
        columns: dict[str, list[Any]] = {
            "class": chosen.tolist(),
            "probability": np.round(likely[rows, chosen], _DIGITS).tolist(),
            "loss": (-log_p[rows, given]).tolist(),
        }
        if self._needs_all:
            columns["log_p"] = np.round(log_p.astype(float), _DIGITS).tolist()  # whose tails are told apart
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def values(self, said: Sequence[Said], examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Return of each row the class chosen and the one given, or what a metric makes of probabilities."""
        given = np.array([example.label for example in examples])
        chosen = np.array([row["class"] for row in said])
        found = {}
        for name, metric in self.metrics.items():
            if isinstance(metric, ProbabilityMetric):
                found[name] = metric.values(np.exp([row["log_p"] for row in said]), given)
            elif isinstance(metric, Accuracy):
                found[name] = (chosen == given).astype(float)[:, None]
            else:
                found[name] = np.stack([chosen, given], axis=-1)
        return found | ({"loss": known([row["loss"] for row in said])[:, None]} if "loss" in self.measures else {})

    def columns(self, said: Said) -> dict[str, Any]:
        """Return the class and its probability."""
        return {"": self.classes[said["class"]], "probability": said["probability"]}

    def about(self, rows: Table) -> dict[str, Any]:
        """What guessing would score: always the class that most training rows have."""
        train: dict[str, int] = self.tuned.run.summary().plan.get("class_rows", {})
        if not train or rows.labels is None:
            return {}
        name = max(train, key=lambda name: train[name])
        share = float(np.mean(rows.labels == self.classes.index(name)))
        return {"most_frequent": {"class": name, "accuracy": share}}

    def tables(self, said: Iterable[Said], rows: Table) -> dict[str, Any]:
        """Return class names, each class's scores, and the tuned model's confusion matrix, rows given, columns chosen.

        Where a metric reads probabilities, the curves over them, too.
        """
        from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

        lines = list(said)
        numbers, chosen = list(range(len(self.classes))), np.array([row["class"] for row in lines])
        table: np.ndarray = np.stack(
            precision_recall_fscore_support(rows.labels, chosen, labels=numbers, zero_division=0.0)
        )
        per_class = [
            {"class": name, **dict(zip(PER_CLASS, scores, strict=True))}
            for name, scores in zip(self.classes, table.T.tolist(), strict=True)
        ]
        matrix = confusion_matrix(rows.labels, chosen, labels=numbers)
        found = {"classes": self.classes, "per_class": per_class, "confusion": matrix.tolist()}
        if self._needs_all:
            likely = np.exp(np.array([row["log_p"] for row in lines], dtype=np.float32))
            assert rows.labels is not None
            found["curves"] = curves_of(likely, rows.labels, self.classes)
        return found


def _measure(metric: ClassMetric | ProbabilityMetric) -> Measure:
    if isinstance(metric, Accuracy):  # a mean of rows that are right or wrong, for which there is an exact test
        return Measure(metric.title)
    if isinstance(metric, ProbabilityMetric):
        return measure_of(metric)

    def statistic(values: np.ndarray) -> np.ndarray:
        return metric.statistic(values[..., 0], values[..., 1])

    return Measure(metric.title, statistic, metric.higher_is_better, getattr(metric, "resamples", None))
