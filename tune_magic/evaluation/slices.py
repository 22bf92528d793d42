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

OTHERS, NONE = "others", "none"
_MOST_VALUES = 12  # of a column; rarer ones are one slice
_MOST_NUMBERS = 6  # that are slices of their own
_RESAMPLES = 2000
_QUARTERS = (25, 50, 75)
_DIGITS = 6  # of their edges


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
        names, order = sliced(values)
        for name in order:
            within = np.array([own == name for own in names])
            metrics = {
                key: compare(measures[key], base[key][within], own[within], resamples=_RESAMPLES).to_dict()
                for key, own in tuned.items()
                if (is_read(own) & is_read(base[key]) & within).any()
            }
            found.append({"column": column, "value": name, "rows": int(within.sum()), "metrics": metrics})
    return found


def sliced(values: Sequence[Any]) -> tuple[list[str], list[str]]:
    """Return the slice of each row, and the slices in order, those of most rows first; of numbers, upwards.

    A slice is a value, the quarter that a number is in, or all that is rare.

    Example:
        >>> sliced(["de", "en", None, "en"])
        (['de', 'en', 'none', 'en'], ['en', 'de', 'none'])
    """
    names = [_word(value) for value in values]
    kinds = Counter(names)
    numbers = [_number(value) for value in values]
    if all(name == NONE or number is not None for name, number in zip(names, numbers, strict=True)):
        if len(kinds) > _MOST_NUMBERS:
            return _quarters(np.array([np.nan if number is None else number for number in numbers]))
        by_number = {name: np.inf if number is None else number for name, number in zip(names, numbers, strict=True)}
        return names, sorted(kinds, key=lambda name: by_number[name])
    if len(kinds) <= _MOST_VALUES:
        return names, _ordered(kinds)
    common = {name for name, _ in kinds.most_common(_MOST_VALUES - 1)}
    names = [name if name in common else OTHERS for name in names]
    return names, _ordered(Counter(names))


def _quarters(numbers: np.ndarray) -> tuple[list[str], list[str]]:
    edges = np.unique(np.nanpercentile(numbers, _QUARTERS)).tolist()
    said = [f"{edge:.{_DIGITS}g}" for edge in edges]
    said = said if len(set(said)) == len(said) else [repr(edge) for edge in edges]
    names = [f"up to {said[0]}", *(f"{a} to {b}" for a, b in itertools.pairwise(said)), f"above {said[-1]}", NONE]
    places = np.where(np.isnan(numbers), len(names) - 1, np.searchsorted(edges, numbers, side="left")).tolist()
    return [names[place] for place in places], [name for place, name in enumerate(names) if place in set(places)]


def _ordered(counts: Counter[str]) -> list[str]:
    """Return slices, those of most rows first, what is rare last."""
    return sorted(counts, key=lambda name: (name == OTHERS, -counts[name], name))


def _word(value: Any) -> str:
    is_missing = value is None or value == "" or (isinstance(value, float) and np.isnan(value))
    return NONE if is_missing else str(value)


def _number(value: Any) -> float | None:
    """Return a value as a number, as csv files write it, too; None where it is none."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
