"""Metrics over what models find that is neither a text nor one class: measures, sets of classes, tags, spans, ranks."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from tune_magic.evaluation.metrics import OutputMetric

_ARTICLES = re.compile(r"\b(a|an|the)\b")


class _OfMeasures(OutputMetric):
    """Base of metrics over pairs of numbers."""

    def values(self, found: Sequence[Any], given: Sequence[Any]) -> np.ndarray:
        """Return what was found and what was given, (rows, 2)."""
        return np.stack([np.asarray(found, dtype=float), np.asarray(given, dtype=float)], axis=-1)


class MeanAbsoluteError(OutputMetric):
    """How far off, on average."""

    title = "mean absolute error"
    higher_is_better = False

    def values(self, found: Sequence[Any], given: Sequence[Any]) -> np.ndarray:
        """Return |found - given|, (rows, 1)."""
        off: np.ndarray = np.abs(np.asarray(found, dtype=float) - np.asarray(given, dtype=float))[:, None]
        return off

    def reads(self, given: Any) -> bool:
        """Numbers are."""
        return not isinstance(given, str)


class ClassAccuracy(OutputMetric):
    """Share of rows whose class is right."""

    title = "accuracy"

    def reads(self, given: Any) -> bool:
        """Names of classes are."""
        return isinstance(given, str)

    def values(self, found: Sequence[Any], given: Sequence[Any]) -> np.ndarray:
        """Return 1 or 0, (rows, 1)."""
        return np.array([[float(ours == theirs)] for ours, theirs in zip(found, given, strict=True)])


class RSquared(_OfMeasures):
    """Share of the variance that is explained: 1 - sum (found - given)^2 / sum (given - mean)^2."""

    title = "R²"

    def statistic(self, values: np.ndarray) -> np.ndarray:
        """Return it; 0 for always the mean, below 0 for worse."""
        found, given = values[..., 0], values[..., 1]
        spread = ((given - given.mean(-1, keepdims=True)) ** 2).sum(-1)
        return np.asarray(1 - ((found - given) ** 2).sum(-1) / np.maximum(spread, 1e-12))


class Pearson(_OfMeasures):
    """Linear correlation."""

    title = "Pearson"

    def statistic(self, values: np.ndarray) -> np.ndarray:
        """Return the correlation in [-1, 1]; 0 where one side is constant."""
        centred = values - values.mean(-2, keepdims=True)
        products = (centred[..., 0] * centred[..., 1]).sum(-1)
        norms = np.sqrt((centred**2).sum(-2)).prod(-1)
        return np.asarray(np.where(norms > 1e-12, products / np.maximum(norms, 1e-12), 0.0))


class Spearman(Pearson):
    """Correlation of ranks, ties by their mean rank."""

    title = "Spearman"

    def statistic(self, values: np.ndarray) -> np.ndarray:
        """Return the correlation in [-1, 1]."""
        from scipy.stats import rankdata

        return super().statistic(rankdata(values, axis=-2))


class SetF1(OutputMetric):
    """F1 over all decisions whether a row is of a class (micro average)."""

    title = "micro F1"

    def values(self, found: Sequence[Any], given: Sequence[Any]) -> np.ndarray:
        """Return counts of right, found and given classes, (rows, 3)."""
        pairs = [(set(ours), set(theirs)) for ours, theirs in zip(found, given, strict=True)]
        return np.array([[len(ours & theirs), len(ours), len(theirs)] for ours, theirs in pairs], dtype=float)

    def statistic(self, values: np.ndarray) -> np.ndarray:
        """Return 2 right / (found + given), 0 where there is neither."""
        right, found, given = np.moveaxis(values.sum(-2), -1, 0)
        return np.asarray(2 * right / np.maximum(found + given, 1))


class SetAccuracy(OutputMetric):
    """Share of rows all of whose classes are right, and no other."""

    title = "exact sets"

    def values(self, found: Sequence[Any], given: Sequence[Any]) -> np.ndarray:
        """Return 1 or 0, (rows, 1)."""
        return np.array([[float(set(a) == set(b))] for a, b in zip(found, given, strict=True)])


class EntityF1(SetF1):
    """F1 over whole entities: kind, first and last word must be right, as seqeval counts them."""

    title = "entity F1"

    def values(self, found: Sequence[Any], given: Sequence[Any]) -> np.ndarray:
        """Return counts of right, found and given entities, (rows, 3)."""
        from seqeval.metrics.sequence_labeling import get_entities

        return super().values(
            [get_entities(list(tags)) for tags in found], [get_entities(list(tags)) for tags in given]
        )


class TagAccuracy(OutputMetric):
    """Share of words whose tag is right."""

    title = "tag accuracy"

    def values(self, found: Sequence[Any], given: Sequence[Any]) -> np.ndarray:
        """Return counts of right tags and of words, (rows, 2)."""
        pairs = list(zip(found, given, strict=True))
        return np.array(
            [[sum(a == b for a, b in zip(ours, theirs, strict=True)), len(theirs)] for ours, theirs in pairs],
            dtype=float,
        )

    def statistic(self, values: np.ndarray) -> np.ndarray:
        """Return the share in [0, 1]."""
        right, words = np.moveaxis(values.sum(-2), -1, 0)
        return np.asarray(right / np.maximum(words, 1))


class SpanExactMatch(OutputMetric):
    """1 where the answer is one of the right ones, case, articles and punctuation aside (Rajpurkar et al. 2016)."""

    title = "exact match"

    def values(self, found: Sequence[Any], given: Sequence[Any]) -> np.ndarray:
        """Return 1 or 0, (rows, 1)."""
        pairs = zip(found, given, strict=True)
        return np.array([[float(any(_plain(ours) == _plain(one) for one in right))] for ours, right in pairs])


class SpanF1(OutputMetric):
    """F1 of the words of the answer and of the nearest right one (Rajpurkar et al. 2016, arXiv:1606.05250)."""

    title = "F1 of words"

    def values(self, found: Sequence[Any], given: Sequence[Any]) -> np.ndarray:
        """Return F1 in [0, 1], (rows, 1)."""
        pairs = zip(found, given, strict=True)
        return np.array([[max(word_f1(ours, one) for one in right)] for ours, right in pairs])


class ReciprocalRank(OutputMetric):
    """Mean of 1 / rank of the right text among all of them."""

    title = "reciprocal rank"

    def values(self, found: Sequence[Any], given: Sequence[Any]) -> np.ndarray:
        """Return 1 / rank, (rows, 1)."""
        reciprocal: np.ndarray = (1 / np.asarray(found, dtype=float))[:, None]
        return reciprocal


class FoundFirst(OutputMetric):
    """Share of rows whose right text is the nearest of all."""

    title = "found first"

    def values(self, found: Sequence[Any], given: Sequence[Any]) -> np.ndarray:
        """Return 1 or 0, (rows, 1)."""
        first: np.ndarray = (np.asarray(found)[:, None] == 1).astype(float)
        return first


def _plain(text: str) -> str:
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def word_f1(one: str, other: str) -> float:
    """Return F1 of the words of two texts in [0, 1], case, articles and punctuation aside."""
    ours, theirs = _plain(one).split(), _plain(other).split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))
