"""Slices: the same scores over the rows that have a column's value, so that no average hides a weak spot."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tune_magic.evaluation.compare import compare
from tune_magic.evaluation.measures import Measure, is_read

OTHERS = "others"
_MOST_VALUES = 12  # of a column; rarer ones are one slice
_RESAMPLES = 2000
_QUARTERS = (25, 50, 75)


def titled(measure: Measure, part: str) -> Measure:
    """Return a measure that says of which part of the rows it is."""
    return replace(measure, title=f"{measure.title} · {part}")


def compare_slices(
    measures: Mapping[str, Measure],
    base: Mapping[str, np.ndarray],
    tuned: Mapping[str, np.ndarray],
    columns: Mapping[str, Sequence[Any]],
) -> list[dict[str, Any]]:
    """Return column, value, number of rows and each measure of both, slice by slice.

    Args:
        measures: By name.
        base: The base model's numbers of each row, by measure.
        tuned: The tuned model's.
        columns: Values of all rows, by column.
    """
    found = []
    for column, values in columns.items():
        names = sliced(values)
        for name in dict.fromkeys(_ordered(names)):
            within = np.array([own == name for own in names])
            metrics = {
                key: compare(measures[key], base[key][within], own[within], resamples=_RESAMPLES).to_dict()
                for key, own in tuned.items()
                if (is_read(own) & is_read(base[key]) & within).any()
            }
            found.append({"column": column, "value": name, "rows": int(within.sum()), "metrics": metrics})
    return found


def sliced(values: Sequence[Any]) -> list[str]:
    """Return the slice of each row: its value, the quarter that its number is in, or that its value is rare.

    Example:
        >>> sliced(["de", "en", None])
        ['de', 'en', 'none']
    """
    kinds = Counter(map(_word, values))
    if len(kinds) <= _MOST_VALUES:
        return [_word(value) for value in values]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return _quarters(np.array(values, dtype=float))
    common = {name for name, _ in kinds.most_common(_MOST_VALUES - 1)}
    return [_word(value) if _word(value) in common else OTHERS for value in values]


def _quarters(numbers: np.ndarray) -> list[str]:
    edges = np.unique(np.nanpercentile(numbers, _QUARTERS))
    names = [f"up to {edges[0]:g}", *(f"{a:g} to {b:g}" for a, b in itertools.pairwise(edges)),
             f"above {edges[-1]:g}"]  # fmt: skip
    return [names[place] for place in np.searchsorted(edges, numbers, side="left").tolist()]


def _ordered(names: Sequence[str]) -> list[str]:
    """Return slices, those of most rows first, what is rare last."""
    counts = Counter(names)
    return sorted(counts, key=lambda name: (name == OTHERS, -counts[name], name))


def _word(value: Any) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "none"
    return str(value)
