"""Data order: a pure function of (seed, epoch). The position in a run is one integer, the step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tune_magic.data.mixture import Draw

_DRAWN = 104_729  # keeps the permutations of parts apart from those of epochs
_WINDOW_STEPS = 50  # as far as rows look for their like, so that an epoch stays mixed


def starts(count: int, size: int, fewest: int = 1) -> range:
    """Return where parts of `size` rows begin, up to the last, which ends with the rows.

    Example:
        >>> list(starts(9, 4)), list(starts(9, 4, fewest=2))
        ([0, 4, 8], [0, 4])
    """
    left = count % size
    return range(0, count - left if left < min(fewest, count) else count, size)


class Order:
    """Which rows each optimizer step trains on.

    No global random state, no sampler, no worker: a resumed run sees what an unbroken one would have seen.

    With `ranks`, rows of neighbouring rank come in the same step: the epoch's permutation is cut into windows of 50
    steps, each window is sorted by rank, cut into steps, and the steps of the epoch are shuffled. Every row still comes
    once an epoch, and which rows a window has is random; but the rows of a step are no longer drawn independently, so
    a step's gradient is a noisier estimate of the whole data's.

    With `draws`, an epoch has so many rows of each part: of a part with more rows than that, each epoch goes on where the
    last one ended in a row of permutations, so every row comes before any comes again; of one with fewer, rows repeat.

    Args:
        num_rows: Training rows.
        batch_size: Rows of a step; the last step of an epoch has what is left.
        seed: The recipe's seed.
        ranks: A number for each row by which to group, or None for a plain permutation.
        draws: Which rows an epoch has how many of; empty: each row once.
        fewest: Rows that a step has at least; fewer that are left at an epoch's end join the step before.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        seed: int,
        ranks: Sequence[int] | np.ndarray | None = None,
        draws: Sequence[Draw] = (),
        *,
        fewest: int = 1,
    ) -> None:
        self.num_rows = sum(draw.count for draw in draws) if draws else num_rows
        self._draws = draws
        self.batch_size = batch_size
        self.seed = seed
        self._starts = starts(self.num_rows, batch_size, fewest)
        self._ranks = None if ranks is None else np.asarray(ranks)
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0))

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the rows."""
        return len(self._starts)

    def rows(self, step: int) -> list[int]:
        """Return the row numbers of a step, counted from 1."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._permutation(epoch))
        is_last = place == self.steps_per_epoch - 1
        end = self.num_rows if is_last else self._starts[place + 1]
        return [int(row) for row in self._epoch[1][self._starts[place] : end]]

    def _permutation(self, epoch: int) -> np.ndarray:
        draw = np.random.default_rng([self.seed, epoch])
        rows = draw.permutation(self.num_rows)
        if self._draws:
            rows = np.concatenate([self._drawn(number, epoch) for number in range(len(self._draws))])[rows]
        if self._ranks is None:
            return rows
        window = _WINDOW_STEPS * self.batch_size
        parts = [rows[start : start + window] for start in range(0, self.num_rows, window)]
        rows = np.concatenate([part[np.argsort(self._ranks[part], kind="stable")] for part in parts])
        whole = self.num_rows // self.batch_size * self.batch_size
        steps = rows[:whole].reshape(-1, self.batch_size)
        return np.concatenate([steps[draw.permutation(len(steps))].ravel(), rows[whole:]])

    def _drawn(self, number: int, epoch: int) -> np.ndarray:
        """Return the rows of a part that an epoch has: a window of its permutations, one behind the other."""
        part = self._draws[number]
        size, start = len(part.rows), epoch * part.count
        passes = range(start // size, (start + part.count - 1) // size + 1)
        shuffled = [np.random.default_rng([self.seed, _DRAWN, number, each]).permutation(size) for each in passes]
        first = start - passes[0] * size
        return part.rows[np.concatenate(shuffled)[first : first + part.count]]
