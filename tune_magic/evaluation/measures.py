"""A measure: one score over many rows, made of numbers of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tune_magic.evaluation.metrics import Metric, OutputMetric, ProbabilityMetric


def mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over rows, (...), of one number a row, (..., rows, 1)."""
    return np.asarray(values[..., 0].mean(-1))


def weighted_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over rows, (...), of a number and its weight a row, (..., rows, 2)."""
    numbers, weights = values[..., 0], values[..., 1]
    return np.asarray((numbers * weights).sum(-1) / weights.sum(-1))


def perplexity(values: np.ndarray) -> np.ndarray:
    """Return exp of the mean loss of a token, (...), from loss and weight a row, (..., rows, 2)."""
    return np.asarray(np.exp(weighted_mean(values)))


@dataclass(frozen=True)
class Measure:
    """How numbers of rows become a score.

    Attributes:
        title: What cards call it.
        statistic: From numbers, (..., rows, k), to scores, (...); called on many resamples at once.
        higher_is_better: Which way is good.
        resamples: Most of them for its interval; None: as many as usual.
    """

    title: str
    statistic: Callable[[np.ndarray], np.ndarray] = mean
    higher_is_better: bool = True
    resamples: int | None = None

    def of(self, values: np.ndarray) -> float:
        """Return the score of rows, (rows, k); those of NaN are not read by it, and NaN where it reads none."""
        read = values[is_read(values)]
        return float(self.statistic(read)) if len(read) else float("nan")


def measure_of(metric: Metric | ProbabilityMetric | OutputMetric) -> Measure:
    """Return the measure of a metric that gives numbers of each row."""
    own = getattr(type(metric), "statistic", None)
    if own in (None, ProbabilityMetric.statistic, OutputMetric.statistic):
        return Measure(metric.title, higher_is_better=metric.higher_is_better)
    resamples = getattr(metric, "resamples", None)
    return Measure(metric.title, metric.statistic, metric.higher_is_better, resamples)  # type: ignore[union-attr]


def is_read(values: np.ndarray) -> np.ndarray:
    """Return which rows, (rows,), have numbers."""
    return np.asarray(~np.isnan(values).any(-1))
