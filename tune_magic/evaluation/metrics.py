"""Metrics: of answers against references, one number a row, and of classes and other findings, one over rows."""

from __future__ import annotations

import abc
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np


class Metric(abc.ABC):
    """Base class of metrics, and their contract: a score a row, averaged over rows.

    Attributes:
        title: What cards call it.
        higher_is_better: Which way is good.
    """

    title: ClassVar[str]
    higher_is_better: ClassVar[bool] = True

    @abc.abstractmethod
    def score(self, answer: str, reference: str) -> float:
        """Return the score of one answer."""

    def parses(self, answer: str) -> bool:
        """Return whether an answer can be read; reports count those that cannot."""
        return True


class ClassMetric(abc.ABC):
    """Base class of metrics over classes, and their contract: one score from all rows.

    Attributes:
        title: What cards call it.
        higher_is_better: Which way is good.
    """

    title: ClassVar[str]
    higher_is_better: ClassVar[bool] = True

    @abc.abstractmethod
    def statistic(self, chosen: np.ndarray, given: np.ndarray) -> np.ndarray:
        """Return the score, shape (...), from class numbers, each (..., rows); called on many resamples at once."""


class ProbabilityMetric(abc.ABC):
    """Base class of metrics over how likely classes are, and their contract: numbers of each row, one score from all.

    Attributes:
        title: What cards call it.
        higher_is_better: Which way is good.
        reads_labels: Whether it makes sense of a single class that rows have or have not.
    """

    title: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    reads_labels: ClassVar[bool] = True

    @abc.abstractmethod
    def values(self, probabilities: np.ndarray, given: np.ndarray) -> np.ndarray:
        """Return what counts of each row, (rows, k), from probabilities, (rows, classes), and class numbers, (rows,)."""

    def statistic(self, values: np.ndarray) -> np.ndarray:
        """Return the score, shape (...), from (..., rows, k); called on many resamples at once. Default: the mean."""
        return np.asarray(values[..., 0].mean(-1))

    def of_label(self, values: np.ndarray) -> np.ndarray:
        """Return the score of a class that rows have or have not, (...); NaN where there is none. Default: as of two."""
        return self.statistic(values)


class OutputMetric(abc.ABC):
    """Base class of metrics over what else models find, and their contract: numbers of each row, one score from all.

    Attributes:
        title: What cards call it.
        higher_is_better: Which way is good.
        reads_texts: Whether what models answer is scored by it too: texts, each with the one that was wanted.
    """

    title: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    reads_texts: ClassVar[bool] = False

    @abc.abstractmethod
    def values(self, found: Sequence[Any], given: Sequence[Any]) -> np.ndarray:
        """Return what counts of each row, (rows, k).

        Args:
            found: What the model found in each row, as `Objective.judged` says it.
            given: What each row was given.
        """

    def reads(self, given: Any) -> bool:
        """Return whether what a row was given is of the kind that is scored; others are left out."""
        return True

    def statistic(self, values: np.ndarray) -> np.ndarray:
        """Return the score, shape (...), from (..., rows, k); called on many resamples at once. Default: the mean."""
        return np.asarray(values[..., 0].mean(-1))


class Accuracy(ClassMetric):
    """Share of rows whose class is right."""

    title = "accuracy"

    def statistic(self, chosen: np.ndarray, given: np.ndarray) -> np.ndarray:
        """Return the share in [0, 1]."""
        return np.asarray((chosen == given).mean(-1))


class MacroF1(ClassMetric):
    """F1 of each class, averaged over the classes that were given or chosen, as scikit-learn does."""

    title = "macro F1"

    def statistic(self, chosen: np.ndarray, given: np.ndarray) -> np.ndarray:
        """Return the mean in [0, 1]."""
        total, present = np.zeros(chosen.shape[:-1]), np.zeros(chosen.shape[:-1])
        for number in np.union1d(chosen, given):
            is_chosen, is_given = chosen == number, given == number
            both = (is_chosen & is_given).sum(-1)
            either = is_chosen.sum(-1) + is_given.sum(-1)
            total += 2 * both / np.maximum(either, 1)
            present += either > 0
        return np.asarray(total / present)


class ExactMatch(Metric):
    """1 where the answer is the reference, white space at both ends aside."""

    title = "exact match"

    def score(self, answer: str, reference: str) -> float:
        """Return 1.0 or 0.0."""
        return float(answer.strip() == reference.strip())


class RougeL(Metric):
    """F-measure of the longest common subsequence of words (Lin 2004, ROUGE), by the rouge-score package."""

    title = "ROUGE-L"

    def score(self, answer: str, reference: str) -> float:
        """Return the F-measure in [0, 1]."""
        return float(_scorer().score(reference, answer)["rougeL"].fmeasure)


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)
