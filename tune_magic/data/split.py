"""Held-out rows: a fixed share, drawn by the seed alone; of each class its share, where rows have classes.

Rows that belong together, by a column or because one row became several examples, stay together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DEFAULT_SHARE = 0.1
_STREAM = 7919  # keeps the split's random numbers apart from those of the data order


def split(
    num_rows: int,
    share: float | None,
    seed: int,
    labels: Sequence[int] | np.ndarray | None = None,
    groups: Sequence[int] | np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of training and held-out rows, each in file order, int64.

    Args:
        num_rows: Rows in the file.
        share: Held-out share in [0, 1). None: 10%, at least 16 and at most 500 rows, never more than a third.
        seed: The recipe's seed.
        labels: Class of each row; every class then gives the same share, to the nearest row.
        groups: Number of the group of each row; a group is held out as a whole, so that the share is met only as nearly
            as whole groups allow.

    Example:
        >>> train, held_out = split(100, None, seed=0)
        >>> len(train), len(held_out)
        (84, 16)
    """
    if share is None:
        count = min(max(16, round(DEFAULT_SHARE * num_rows)), 500, num_rows // 3)
    else:
        count = round(share * num_rows)
        if share > 0:
            count = min(max(count, 1), num_rows - 1)
    if groups is not None:
        return _by_group(np.asarray(groups), None if labels is None else np.asarray(labels), count, seed)
    order = np.random.default_rng([seed, _STREAM]).permutation(num_rows)
    if labels is not None:
        order = _by_class(order, np.asarray(labels), count)
    return np.sort(order[count:]), np.sort(order[:count])


def _by_class(order: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Put the rows in an order whose first `count` hold each class by its share, the largest remainders rounded up.

    scikit-learn's stratified split refuses classes of one row; here such a row is trained on.
    """
    _, classes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    exact = sizes * count / len(labels)
    quota = np.floor(exact).astype(int)
    remainders = np.where(sizes > 1, exact - quota, -1.0)
    quota[np.argsort(-remainders, kind="stable")[: count - quota.sum()]] += 1
    chosen = np.zeros(len(order), dtype=bool)
    for number, wanted in enumerate(quota):
        chosen[np.flatnonzero(classes[order] == number)[:wanted]] = True
    return np.concatenate([order[chosen], order[~chosen]])


def _by_group(groups: np.ndarray, labels: np.ndarray | None, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out whole groups: of each class, counted by a group's first row, about its share; one group is trained on."""
    _, first, group_of, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    classes = np.zeros(len(sizes), dtype=int) if labels is None else np.unique(labels[first], return_inverse=True)[1]
    order = np.random.default_rng([seed, _STREAM]).permutation(len(sizes))
    held_out = np.zeros(len(sizes), dtype=bool)
    for number in range(classes.max(initial=-1) + 1):
        own = order[classes[order] == number]
        wanted = sizes[own].sum() * count / len(groups)
        middle = np.cumsum(sizes[own]) - sizes[own] / 2  # a group is in when most of it is within the share
        held_out[own[middle < wanted]] = True
    if count and not held_out.any() and len(sizes) > 1:
        held_out[order[np.argmin(sizes[order])]] = True
    if held_out.all() and len(sizes):
        held_out[order[-1]] = False
    chosen = held_out[group_of]
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)
