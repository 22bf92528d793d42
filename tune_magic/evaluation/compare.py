"""Paired comparison: how much better, and how sure.

Both models answer the same rows, so the rows are resampled together (paired bootstrap: Efron and Tibshirani 1993,
chapter 16; for language tasks Koehn 2004).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tune_magic.evaluation.comparison import Comparison

RESAMPLES = 10_000
CONFIDENCE = 0.95
_CELLS_A_CHUNK = 1 << 22
Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the mean over the last axis."""
    mean: np.ndarray = (values * weights).sum(-1) / weights.sum(-1)
    return mean


def perplexity(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return exp of the mean loss over the last axis."""
    raised: np.ndarray = np.exp(weighted_mean(values, weights))
    return raised


def compare(
    title: str,
    base: np.ndarray,
    tuned: np.ndarray,
    *,
    shared: np.ndarray | None = None,
    statistic: Statistic = weighted_mean,
    higher_is_better: bool = True,
    seed: int = 0,
) -> Comparison:
    """Compare two models row by row.

    Args:
        title: Name of the metric.
        base: Values of the base model, shape (rows, ...).
        tuned: Values of the tuned model for the same rows, of the same shape.
        shared: What both have in common of each row, shape (rows,): its weight in a mean (its number of tokens, for a
            loss), or the class it was given. Default: weight 1.
        statistic: From values and what is shared, of rows that were drawn again many times, to the metric of each time.
        higher_is_better: Which way is good.
        seed: Of the resampling, so that the same rows give the same interval.

    Example:
        >>> compare("exact match", np.zeros(50), np.ones(50)).verdict
        'better'
    """
    shared = np.ones(len(base)) if shared is None else shared
    generator = np.random.default_rng(seed)
    count = len(base)
    per_chunk = max(1, _CELLS_A_CHUNK // base.size)
    differences = []
    for start in range(0, RESAMPLES, per_chunk):
        rows = generator.integers(0, count, (min(per_chunk, RESAMPLES - start), count))
        differences.append(statistic(tuned[rows], shared[rows]) - statistic(base[rows], shared[rows]))
    tail = (1 - CONFIDENCE) / 2 * 100
    low, high = np.percentile(np.concatenate(differences), [tail, 100 - tail])
    value_base, value_tuned = float(statistic(base, shared)), float(statistic(tuned, shared))
    return Comparison(
        title, value_base, value_tuned, value_tuned - value_base, float(low), float(high), higher_is_better
    )  # fmt: skip
