"""Metrics of the `evaluate` package by name: fetched from the Hub, or from a folder with the metric's script.

Such a metric gives one score for all rows, not a number for each, so that intervals cost a computation for every resample:
there are fewer of them. It keeps what it scores in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from tune_magic import plugins
from tune_magic.errors import TuneError
from tune_magic.evaluation.metrics import ClassMetric, OutputMetric

PREFIX = "evaluate:"
_KEY = "#"  # before the score that is meant, of a metric that gives several
_RESAMPLES = 100
_LOWER_IS_BETTER = frozenset(
    {"wer", "cer", "ter", "mse", "mae", "mape", "smape", "mase", "perplexity", "brier_score", "character"}
)


def metric_called(name: str, *, of_classes: bool = False) -> Any:
    """Return a metric: a plug-in, or one of `evaluate`, as ``evaluate:NAME``, ``evaluate:FOLDER`` or ``evaluate:rouge#rougeL``.

    Args:
        name: As the user wrote it.
        of_classes: Whether it is to score numbers of classes, as classification metrics of `evaluate` do.

    Raises:
        TuneError: There is none, or it cannot be loaded.
    """
    if not name.startswith(PREFIX):
        return plugins.get("metric", name)()
    which, _, key = name.removeprefix(PREFIX).partition(_KEY)
    loaded = _Loaded(which, key or None)
    return _OfClasses(loaded) if of_classes else _OfOutputs(loaded)


class _Loaded:
    """A metric of `evaluate`.

    Args:
        which: Name on the Hub, or a folder.
        key: Which of its scores.
    """

    def __init__(self, which: str, key: str | None) -> None:
        import evaluate

        try:
            self._metric = evaluate.load(which, keep_in_memory=True)
        except (OSError, ImportError, ValueError) as error:
            raise TuneError(
                f"`{PREFIX}{which}` cannot be loaded: {str(error).splitlines()[0]}",
                hint="The first time it is fetched from the Hub; a folder with the metric's script needs no network.",
            ) from error
        self._which, self._key = which, key
        self.name = PurePosixPath(which).name
        self.higher_is_better = self.name not in _LOWER_IS_BETTER
        features = self._metric.features
        wanted = (features[0] if isinstance(features, list) else features)["references"]
        self._takes_several = not hasattr(wanted, "dtype") or wanted.dtype == "list"  # right answers to one row

    def compute(self, found: Sequence[Any], given: Sequence[Any]) -> float:
        """Return the score of rows.

        Raises:
            TuneError: It cannot score these, or gives several scores.
        """
        references = [[one] for one in given] if self._takes_several else list(given)
        try:
            scores = self._metric.compute(predictions=list(found), references=references)
        except (TypeError, ValueError, KeyError) as error:
            raise TuneError(f"`{PREFIX}{self._which}` cannot score this: {str(error).splitlines()[0]}") from error
        numbers = {name: score for name, score in scores.items() if isinstance(score, int | float | np.number)}
        key = self._key or (self.name if self.name in numbers else next(iter(numbers)) if len(numbers) == 1 else None)
        if key not in numbers:
            examples = f"{PREFIX}{self._which}{_KEY}{next(iter(numbers), 'SCORE')}"
            raise TuneError(
                f"`{PREFIX}{self._which}` gives {', '.join(numbers) or 'no number'}.", hint=f"Say which: `{examples}`."
            )
        return float(numbers[key])

    def each(self, found: np.ndarray, given: np.ndarray) -> np.ndarray:
        """Return the score of each set of rows, (...), from objects, each (..., rows)."""
        flat = zip(found.reshape(-1, found.shape[-1]), given.reshape(-1, given.shape[-1]), strict=True)
        return np.array([self.compute(a.tolist(), b.tolist()) for a, b in flat]).reshape(found.shape[:-1])


class _OfOutputs(OutputMetric):
    """Texts, or whatever else is found. A row's number is its place in a list of what was found and what was given."""

    reads_texts = True
    resamples = _RESAMPLES

    def __init__(self, loaded: _Loaded) -> None:
        self._loaded = loaded
        self.title, self.higher_is_better = loaded.name, loaded.higher_is_better  # type: ignore[misc]
        self._pairs: list[tuple[Any, Any]] = []

    def values(self, found: Sequence[Any], given: Sequence[Any]) -> np.ndarray:
        """Return the places, (rows, 1)."""
        start = len(self._pairs)
        self._pairs += zip(found, given, strict=True)
        return np.arange(start, len(self._pairs), dtype=float)[:, None]

    def statistic(self, values: np.ndarray) -> np.ndarray:
        """Return the metric's own score of each set of rows."""
        places = values[..., 0].astype(int)
        found, given = (np.empty(len(self._pairs), dtype=object) for _ in range(2))
        found[:], given[:] = ([pair[which] for pair in self._pairs] for which in range(2))
        return self._loaded.each(found[places], given[places])


class _OfClasses(ClassMetric):
    """Numbers of classes."""

    resamples = _RESAMPLES

    def __init__(self, loaded: _Loaded) -> None:
        self._loaded = loaded
        self.title, self.higher_is_better = loaded.name, loaded.higher_is_better  # type: ignore[misc]

    def statistic(self, chosen: np.ndarray, given: np.ndarray) -> np.ndarray:
        """Return the metric's own score of each set of rows."""
        return self._loaded.each(chosen.astype(int), np.broadcast_to(given, chosen.shape).astype(int))
