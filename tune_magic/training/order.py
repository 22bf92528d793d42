"""Data order: a pure function of (seed, epoch). The position in a run is one integer, the step."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Order:
    """Which rows each optimizer step trains on.

    No global random state, no sampler, no worker: a resumed run sees what an unbroken one would have seen.

    Args:
        num_rows: Training rows.
        batch_size: Rows of a step; the last step of an epoch has what is left.
        seed: The recipe's seed.
    """

    num_rows: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the rows."""
        return math.ceil(self.num_rows / self.batch_size)

    def rows(self, step: int) -> list[int]:
        """Return the row numbers of a step, counted from 1."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        start = place * self.batch_size
        return [int(row) for row in _permutation(self.num_rows, self.seed, epoch)[start : start + self.batch_size]]


@functools.lru_cache(maxsize=2)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)
