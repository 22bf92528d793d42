"""Metrics of classifiers: from classes chosen and given, and from how likely each class was."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np

from tune_magic.evaluation.metrics import ClassMetric, OutputMetric, ProbabilityMetric

_BINS = 10  # of probability, for calibration


class _OfEachClass(ClassMetric):
    """Base of metrics that average a score of each class."""

    def statistic(self, chosen: np.ndarray, given: np.ndarray) -> np.ndarray:
        """Return the mean in [0, 1] over the classes that count, by their weights."""
        total, weights = np.zeros(chosen.shape[:-1]), np.zeros(chosen.shape[:-1])
        for number in np.union1d(chosen, given):
            is_chosen, is_given = chosen == number, given == number
            both = (is_chosen & is_given).sum(-1)
            score, weight = self._score(both, is_chosen.sum(-1), is_given.sum(-1))
            total += score * weight
            weights += weight
        return np.asarray(total / np.maximum(weights, 1))

    @abc.abstractmethod
    def _score(self, both: np.ndarray, chosen: np.ndarray, given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the score of a class and its weight, each (...), from counts of rows."""


class MacroPrecision(_OfEachClass):
    """Share of a class's choices that are right, averaged over the classes that were given or chosen."""

    title = "macro precision"

    def _score(self, both: np.ndarray, chosen: np.ndarray, given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return both / np.maximum(chosen, 1), (chosen + given > 0).astype(float)


class MacroRecall(_OfEachClass):
    """Share of a class's rows that are found, averaged over the classes that were given or chosen."""

    title = "macro recall"

    def _score(self, both: np.ndarray, chosen: np.ndarray, given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return both / np.maximum(given, 1), (chosen + given > 0).astype(float)


class BalancedAccuracy(_OfEachClass):
    """Share of a class's rows that are found, averaged over the classes that were given."""

    title = "balanced accuracy"

    def _score(self, both: np.ndarray, chosen: np.ndarray, given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return both / np.maximum(given, 1), (given > 0).astype(float)


class WeightedF1(_OfEachClass):
    """F1 of each class, averaged by how many rows have it."""

    title = "weighted F1"

    def _score(self, both: np.ndarray, chosen: np.ndarray, given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return 2 * both / np.maximum(chosen + given, 1), given.astype(float)


class MatthewsCorrelation(ClassMetric):
    """Correlation of chosen and given classes; 0 for any constant choice (Matthews 1975, for many classes Gorodkin 2004)."""

    title = "MCC"

    def statistic(self, chosen: np.ndarray, given: np.ndarray) -> np.ndarray:
        """Return the correlation in [-1, 1]; 0 where one side is constant."""
        rows = chosen.shape[-1]
        right = (chosen == given).sum(-1).astype(float)
        products, of_chosen, of_given = (np.zeros(chosen.shape[:-1]) for _ in range(3))
        for number in np.union1d(chosen, given):
            is_chosen, is_given = (chosen == number).sum(-1), (given == number).sum(-1)
            products += is_chosen * is_given
            of_chosen += is_chosen**2
            of_given += is_given**2
        spread = np.sqrt((rows**2 - of_chosen) * (rows**2 - of_given))
        return np.asarray(np.where(spread > 0, (right * rows - products) / np.maximum(spread, 1e-12), 0.0))


class _OfRanks(ProbabilityMetric):
    """Base of metrics that ask how well a class's probability ranks its own rows before the others, class by class."""

    def values(self, probabilities: np.ndarray, given: np.ndarray) -> np.ndarray:
        """Return the class given and the probability of each class, (rows, 1 + classes)."""
        return np.concatenate([given[:, None], probabilities], axis=-1)

    def statistic(self, values: np.ndarray) -> np.ndarray:
        """Return the mean over the classes that some rows have and some have not; 0.5 where there is none."""
        total, present = np.zeros(values.shape[:-2]), np.zeros(values.shape[:-2])
        for number in range(values.shape[-1] - 1):
            own = values[..., 0] == number
            counts = own.any(-1) & ~own.all(-1)
            total += np.where(counts, self._score(values[..., number + 1], own), 0.0)
            present += counts
        return np.asarray(np.where(present > 0, total / np.maximum(present, 1), 0.5))

    def of_label(self, values: np.ndarray) -> np.ndarray:
        """Return the score of having the class; NaN where all rows have it, or none."""
        own = values[..., 0] == 1
        return np.where(own.any(-1) & ~own.all(-1), self._score(values[..., 2], own), np.nan)

    @abc.abstractmethod
    def _score(self, scores: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Return the score of a class, (...), from scores and whether a row is of the class, each (..., rows)."""


class RocAuc(_OfRanks):
    """Area under the ROC curve: how often a row of the class is ranked before one of another, ties half."""

    title = "ROC AUC"

    def _score(self, scores: np.ndarray, own: np.ndarray) -> np.ndarray:
        from scipy.stats import rankdata

        number = own.sum(-1)
        others = own.shape[-1] - number
        above = (rankdata(scores, axis=-1) * own).sum(-1) - number * (number + 1) / 2
        return np.asarray(above / np.maximum(number * others, 1))


class AveragePrecision(_OfRanks):
    """Area under the precision-recall curve, as a sum over the class's own rows of the precision down to each."""

    title = "average precision"

    def _score(self, scores: np.ndarray, own: np.ndarray) -> np.ndarray:
        from scipy.stats import rankdata

        down_to = rankdata(-scores, method="max", axis=-1)
        own_down_to = rankdata(np.where(own, -scores, np.inf), method="max", axis=-1)
        return np.asarray((own * own_down_to / down_to).sum(-1) / np.maximum(own.sum(-1), 1))


class BrierScore(ProbabilityMetric):
    """Squared distance of the probabilities from 1 for the class given and 0 for all others (Brier 1950)."""

    title = "Brier score"
    higher_is_better = False

    def values(self, probabilities: np.ndarray, given: np.ndarray) -> np.ndarray:
        """Return the sum over classes, in [0, 2], (rows, 1)."""
        wanted = np.arange(probabilities.shape[-1]) == given[:, None]
        distance: np.ndarray = ((probabilities - wanted) ** 2).sum(-1, keepdims=True)
        return distance


class TopThree(ProbabilityMetric):
    """Share of rows whose class is among the three likeliest."""

    title = "right among three"
    reads_labels = False

    def values(self, probabilities: np.ndarray, given: np.ndarray) -> np.ndarray:
        """Return 1 or 0, (rows, 1)."""
        likelier = (probabilities > np.take_along_axis(probabilities, given[:, None], axis=-1)).sum(-1, keepdims=True)
        found: np.ndarray = (likelier < 3).astype(float)
        return found


class CalibrationError(ProbabilityMetric):
    """How far the probability of what was chosen is from how often it is right, over ten bins (Guo et al. 2017)."""

    title = "calibration error"
    higher_is_better = False

    def values(self, probabilities: np.ndarray, given: np.ndarray) -> np.ndarray:
        """Return the probability of the choice, and whether it is right, (rows, 2)."""
        return np.stack([probabilities.max(-1), probabilities.argmax(-1) == given], axis=-1)

    def statistic(self, values: np.ndarray) -> np.ndarray:
        """Return the mean gap in [0, 1], bins weighted by their rows."""
        sure, gap = values[..., 0], values[..., 1] - values[..., 0]
        bins = np.minimum((sure * _BINS).astype(int), _BINS - 1)
        total = sum(np.abs(np.where(bins == number, gap, 0.0).sum(-1)) for number in range(_BINS))
        return np.asarray(total / values.shape[-2])


class OfEachLabel(OutputMetric):
    """A metric of probabilities where rows have any number of classes: label by label, then the mean over labels.

    Args:
        metric: What is computed of a label.
    """

    def __init__(self, metric: ProbabilityMetric) -> None:
        self.metric = metric
        self.title, self.higher_is_better = metric.title, metric.higher_is_better  # type: ignore[misc]
        self._each = metric.values(np.array([[0.5, 0.5]]), np.array([0])).shape[-1]

    def values(self, found: Sequence[Any], given: Sequence[Any]) -> np.ndarray:
        """Return what counts of each label, one behind the other, (rows, labels k).

        Args:
            found: Of each row, the probability of each label.
            given: Of each row, 1 or 0 for each label.
        """
        likely, has = np.stack(found), np.stack(given).astype(int)
        parts = [
            self.metric.values(np.stack([1 - own, own], axis=-1), wanted)
            for own, wanted in zip(likely.T, has.T, strict=True)
        ]
        return np.concatenate(parts, axis=-1)

    def statistic(self, values: np.ndarray) -> np.ndarray:
        """Return the mean over the labels that have a score; 0.5 where none has."""
        labels = np.split(values, values.shape[-1] // self._each, axis=-1)
        scores = np.stack([self.metric.of_label(own) for own in labels], axis=-1)
        counts = (~np.isnan(scores)).sum(-1)
        return np.asarray(np.where(counts > 0, np.nansum(scores, axis=-1) / np.maximum(counts, 1), 0.5))
