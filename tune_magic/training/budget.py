"""A time budget: a step is taken only when what is left pays for it, for scoring the held-out rows, and for saving."""

from __future__ import annotations

import time
from collections.abc import Callable

_CARE = 1.25  # how much longer than the longest so far anything may take
_SCORING = 0.6  # seconds of a token without a backward pass, as a share of one in training
_DISK_BYTES_PER_S = 50e6
_LEAST_SAVE_S = 0.5
_TO_END_S = 1.0  # for the process to end, and for whoever watches it to notice
_MOST_RESERVED = 0.5  # share of the budget; rows that take longer to score are not scored at the end


class Budget:
    """Decides whether there is time for one more step.

    Args:
        seconds: What is left now.
        held_out_tokens: Tokens of the held-out rows.
        save_bytes: Size of a checkpoint.
        clock: Seconds that only go forward; a test brings its own.
    """

    def __init__(
        self, seconds: float, held_out_tokens: int, save_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.seconds = seconds
        self._clock = clock
        self._end = clock() + seconds
        self._held_out_tokens = held_out_tokens
        self._per_token_s = 0.0  # the slowest of the latest steps
        self._step_s = 0.0
        self._score_s: float | None = None
        self._save_s = max(_LEAST_SAVE_S, save_bytes / _DISK_BYTES_PER_S)

    @property
    def left_s(self) -> float:
        """Seconds left."""
        return self._end - self._clock()

    def note_step(self, seconds: float, tokens: int) -> None:
        """Learn from a step."""
        self._step_s = max(seconds, 0.9 * self._step_s)
        self._per_token_s = max(seconds / max(1, tokens), 0.9 * self._per_token_s)

    def note_scoring(self, seconds: float) -> None:
        """Learn from one pass over the held-out rows."""
        self._score_s = max(seconds, self._score_s or 0.0)

    def note_save(self, seconds: float) -> None:
        """Learn from a checkpoint."""
        self._save_s = max(seconds, self._save_s)

    def pays_for_scoring(self, passes: int) -> bool:
        """Return whether the held-out rows can still be scored, and a checkpoint be saved after it."""
        scoring_s = self._scoring_s(passes)
        needed_s = scoring_s / _CARE + self._save_s + _TO_END_S / 2  # what was reserved may be used up by now
        return scoring_s <= _MOST_RESERVED * self.seconds and needed_s <= self.left_s

    def pays_for_step(self, passes: int) -> bool:
        """Return whether a step, `passes` passes over the held-out rows and a checkpoint fit into what is left."""
        scoring_s = self._scoring_s(passes)
        if scoring_s > _MOST_RESERVED * self.seconds:
            scoring_s = 0.0
        return _CARE * self._step_s + scoring_s + self._ending_s <= self.left_s

    def steps_ahead(self, passes: int) -> int:
        """Return about how many more steps there is time for."""
        room_s = self.left_s - self._scoring_s(passes) - self._ending_s
        return max(0, int(room_s / self._step_s)) if self._step_s else 0

    @property
    def _ending_s(self) -> float:
        return _CARE * self._save_s + _TO_END_S

    def _scoring_s(self, passes: int) -> float:
        estimate_s = _SCORING * self._per_token_s * self._held_out_tokens
        return _CARE * passes * (estimate_s if self._score_s is None else self._score_s)
