"""Held-out rows: a fixed share, drawn by the seed alone."""

from __future__ import annotations

import numpy as np

DEFAULT_SHARE = 0.1
_STREAM = 7919  # keeps the split's random numbers apart from those of the data order


def split(num_rows: int, share: float | None, seed: int) -> tuple[list[int], list[int]]:
    """Return the indices of training and held-out rows, each in file order.

    Args:
        num_rows: Rows in the file.
        share: Held-out share in [0, 1). None: 10%, at least 16 and at most 500 rows, never more than a third.
        seed: The recipe's seed.

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
    order = np.random.default_rng([seed, _STREAM]).permutation(num_rows)
    return sorted(order[count:].tolist()), sorted(order[:count].tolist())
