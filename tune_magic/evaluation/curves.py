"""Curves of a classifier over its probabilities: ROC, precision against recall, calibration."""

from __future__ import annotations

from typing import Any

import numpy as np

_MOST_CLASSES = 6  # those of most rows
_MOST_POINTS = 32
_BINS = 10


def curves_of(probabilities: np.ndarray, given: np.ndarray, classes: list[str]) -> dict[str, Any]:
    """Return the curves of each class against all others, and how often the model is right by how sure it is.

    Args:
        probabilities: (rows, classes).
        given: Number of the class of each row, (rows,).
        classes: Names.

    Returns:
        ``roc`` and ``precision_recall``: by class, points (x, y); ``calibration``: mean probability of what was chosen,
        share that is right, and number of rows, for each tenth of probability that has rows.
    """
    from sklearn.metrics import precision_recall_curve, roc_curve

    counts = np.bincount(given, minlength=len(classes))
    shown = [
        number
        for number in np.argsort(-counts, kind="stable")[:_MOST_CLASSES].tolist()
        if 0 < counts[number] < len(given)
    ]
    roc, precision_recall = {}, {}
    for number in shown:
        own, likely = given == number, probabilities[:, number]
        false, true, _ = roc_curve(own, likely)
        precision, recall, _ = precision_recall_curve(own, likely)
        roc[classes[number]] = _thinned(false, true)
        precision_recall[classes[number]] = _thinned(recall[::-1], precision[::-1])
    return {"roc": roc, "precision_recall": precision_recall, "calibration": _calibration(probabilities, given)}


def _calibration(probabilities: np.ndarray, given: np.ndarray) -> list[list[float]]:
    sure, right = probabilities.max(-1), probabilities.argmax(-1) == given
    bins = np.minimum((sure * _BINS).astype(int), _BINS - 1)
    within = [bins == number for number in range(_BINS)]
    return [[float(sure[own].mean()), float(right[own].mean()), int(own.sum())] for own in within if own.any()]


def _thinned(x: np.ndarray, y: np.ndarray) -> list[list[float]]:
    """Return points at even distances along a curve, both ends among them."""
    way = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
    wanted = np.linspace(0, way[-1], _MOST_POINTS)
    places = np.unique(np.searchsorted(way, wanted).clip(max=len(way) - 1))
    return np.round(np.stack([x[places], y[places]], axis=-1), 4).tolist()  # type: ignore[no-any-return]
