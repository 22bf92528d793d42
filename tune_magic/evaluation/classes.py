"""Score a classifier: classes chosen against classes given, as a whole and class by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tune_magic import plugins
from tune_magic.data.example import Example
from tune_magic.errors import TuneError
from tune_magic.evaluation.compare import compare, weighted_mean
from tune_magic.evaluation.comparison import Comparison
from tune_magic.evaluation.metrics import ClassMetric
from tune_magic.evaluation.report import PER_CLASS
from tune_magic.evaluation.scorer import ExampleScorer
from tune_magic.training.outputs import outputs_of
from tune_magic.training.tuned import Tuned

DEFAULT_METRICS = ("accuracy", "macro_f1", "loss")


@dataclass
class Choices:
    """One model over all rows.

    Attributes:
        losses: -log p of the given class, shape (rows,).
        chosen: Number of the likeliest class, shape (rows,).
        probability: Its probability, shape (rows,).
    """

    losses: np.ndarray
    chosen: np.ndarray
    probability: np.ndarray


class ClassScorer(ExampleScorer):
    """One pass over the rows in length-sorted batches."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.classes: list[str] = self.tuned.objective.facts()["classes"]
        self.given = np.array([example.label for example in self.examples])
        self.wanted = self.options.get("metrics") or DEFAULT_METRICS
        self.metrics: dict[str, ClassMetric] = {
            name: plugins.get("metric", name)() for name in self.wanted if name != "loss"
        }
        wrong = [name for name, metric in self.metrics.items() if not isinstance(metric, ClassMetric)]
        if wrong:
            raise TuneError(f"`{wrong[0]}` compares answers; this run chooses classes.")
        self.total = 2 * len(self.examples)

    def score(self, side: Tuned, examples: Sequence[Example]) -> Choices:
        """Return what a model chooses and how sure it is."""
        logits = np.stack(outputs_of(side.engine(), side.objective, examples, done=self.advance))
        log_p = torch.log_softmax(torch.from_numpy(logits), -1).numpy()
        chosen = log_p.argmax(-1)
        rows = np.arange(len(chosen))
        return Choices(-log_p[rows, self.given], chosen, np.exp(log_p[rows, chosen]))

    def row(self, number: int, base: Choices, tuned: Choices) -> dict[str, Any]:
        """Return the class, its probability, whether it is right, and the loss, for both."""
        columns: dict[str, Any] = {}
        for side, scored in (("base", base), ("tuned", tuned)):
            columns[side] = self.classes[scored.chosen[number]]
            columns[f"probability_{side}"] = round(float(scored.probability[number]), 6)
            columns[f"accuracy_{side}"] = float(scored.chosen[number] == self.given[number])
            columns[f"loss_{side}"] = float(scored.losses[number])
        return columns

    def compare(self, base: Choices, tuned: Choices) -> dict[str, Comparison]:
        """Compare every metric that was asked for."""
        found = {
            name: compare(
                metric.title,
                base.chosen,
                tuned.chosen,
                shared=self.given,
                statistic=metric.statistic,
                higher_is_better=metric.higher_is_better,
            )
            for name, metric in self.metrics.items()
        }
        if "loss" in self.wanted:
            found["loss"] = compare(
                "loss", base.losses, tuned.losses, statistic=weighted_mean, higher_is_better=False
            )  # fmt: skip
        return found

    def about(self) -> dict[str, Any]:
        """What guessing would score: always the class that most training rows have."""
        train: dict[str, int] = self.tuned.run.summary().plan.get("class_rows", {})
        if not train:
            return {}
        name = max(train, key=lambda name: train[name])
        share = float(np.mean(self.given == self.classes.index(name)))
        return {"most_frequent": {"class": name, "accuracy": share}}

    def tables(self, base: Choices, tuned: Choices) -> dict[str, Any]:
        """Return class names, each class's scores, and the tuned model's confusion matrix, rows given, columns chosen."""
        from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

        numbers = list(range(len(self.classes)))
        table: np.ndarray = np.stack(
            precision_recall_fscore_support(self.given, tuned.chosen, labels=numbers, zero_division=0.0)
        )
        per_class = [
            {"class": name, **dict(zip(PER_CLASS, scores, strict=True))}
            for name, scores in zip(self.classes, table.T.tolist(), strict=True)
        ]
        matrix = confusion_matrix(self.given, tuned.chosen, labels=numbers)
        return {"classes": self.classes, "per_class": per_class, "confusion": matrix.tolist()}
