"""Paired comparison: how much better, how sure, and whether chance would do as well.

Both models answer the same rows, so the rows are resampled together (paired bootstrap: Efron and Tibshirani 1993,
chapter 16; for language tasks Koehn 2004). The p value is that of McNemar's exact test where each row is right or wrong
(McNemar 1947), else of a permutation test that swaps the two models in each row at random (Noreen 1989).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tune_magic.evaluation.comparison import Comparison
from tune_magic.evaluation.measures import Measure, is_read, mean

RESAMPLES = 10_000
CONFIDENCE = 0.95
_LEAST_RESAMPLES = 300
_CELLS = 100_000_000  # drawn at most: with very many rows fewer resamples tell as much
_CELLS_A_CHUNK = 1 << 22


def compare(
    measure: Measure, base: np.ndarray, tuned: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES
) -> Comparison:
    """Compare two models row by row.

    Args:
        measure: What is compared.
        base: Numbers of the base model, (rows, k); rows of NaN, in one of the two, are left out of both.
        tuned: Numbers of the tuned model for the same rows.
        seed: Of resampling and swapping, so that the same rows give the same interval.
        resamples: At most so many; fewer where rows are very many.

    Example:
        >>> compare(Measure("exact match"), np.zeros((50, 1)), np.ones((50, 1))).verdict
        'better'
    """
    known = is_read(base) & is_read(tuned)
    base, tuned = base[known], tuned[known]
    generator = np.random.default_rng(seed)
    count = max(1, min(resamples, measure.resamples or resamples, max(_LEAST_RESAMPLES, _CELLS // max(1, base.size))))
    statistic = measure.statistic

    def resampled(times: int) -> np.ndarray:
        rows = generator.integers(0, len(base), (times, len(base)))
        return np.asarray(statistic(tuned[rows]) - statistic(base[rows]))

    def swapped(times: int) -> np.ndarray:
        swaps = generator.random((times, len(base)), dtype=np.float32)[..., None] < 0.5
        return np.asarray(statistic(np.where(swaps, base, tuned)) - statistic(np.where(swaps, tuned, base)))

    def many(draw: Callable[[int], np.ndarray]) -> np.ndarray:
        chunk = max(1, _CELLS_A_CHUNK // base.size)
        return np.concatenate([draw(min(chunk, count - start)) for start in range(0, count, chunk)])

    value_base, value_tuned = float(statistic(base)), float(statistic(tuned))
    difference = value_tuned - value_base
    if not np.isfinite(difference):  # a model that was ruined
        nan = float("nan")
        return Comparison(measure.title, value_base, value_tuned, difference, nan, nan, measure.higher_is_better)
    tail = (1 - CONFIDENCE) / 2 * 100
    low, high = np.percentile(many(resampled), [tail, 100 - tail])
    if statistic is mean and _is_right_or_wrong(base) and _is_right_or_wrong(tuned):
        test, p = "McNemar", _mcnemar(base[:, 0], tuned[:, 0])
    else:
        extreme = np.abs(many(swapped)) >= abs(difference) * (1 - 1e-9)
        test, p = "permutation", float((1 + extreme.sum()) / (1 + count))
    return Comparison(
        measure.title, value_base, value_tuned, difference, float(low), float(high), measure.higher_is_better, p, test
    )


def _is_right_or_wrong(values: np.ndarray) -> bool:
    return values.shape[1] == 1 and bool(np.isin(values, (0.0, 1.0)).all())


def _mcnemar(base: np.ndarray, tuned: np.ndarray) -> float:
    """Return the two-sided p value: of the rows that only one has right, does either have more than chance gives?"""
    from scipy.stats import binomtest

    gained, lost = int((tuned > base).sum()), int((tuned < base).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
