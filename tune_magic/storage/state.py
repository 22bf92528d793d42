"""States of a run, derived from one table.

Nobody writes a run's status. It follows from the last `state` event in the log, from whether a process holds the run's
lock, and, before the first event, from the run's age.
"""

from __future__ import annotations

from typing import Literal, get_args

State = Literal[
    "queued", "starting", "running", "paused", "stopping", "stopped", "finished", "failed", "lost", "damaged"
]
STATES: tuple[State, ...] = get_args(State)
TERMINAL: frozenset[str] = frozenset({"stopped", "finished", "failed", "lost", "damaged"})
RESUMABLE: frozenset[str] = frozenset({"stopped", "failed", "lost", "damaged"})
START_LIMIT_S = 120.0  # importing torch on a slow disk takes tens of seconds before the lock is taken

# last state event -> (state while the lock is held, state when nobody holds it)
TABLE: dict[str, tuple[State, State]] = {
    "queued": ("queued", "lost"),
    "starting": ("starting", "lost"),
    "running": ("running", "lost"),
    "paused": ("paused", "lost"),
    "stopping": ("stopping", "lost"),
    "stopped": ("stopped", "stopped"),
    "finished": ("finished", "finished"),
    "failed": ("failed", "failed"),
}


def derive(last: str | None, *, lock_held: bool, age_s: float, damaged: bool = False) -> State:
    """Return the state of a run.

    Args:
        last: Value of the last `state` event this version knows; None when there is none.
        lock_held: Whether a process holds the run's lock.
        age_s: Seconds since the run folder, or its latest attempt, was made.
        damaged: Whether a line of the log fails its checksum. A live run stays live; a dead one is shown as damaged.

    Example:
        >>> derive("running", lock_held=False, age_s=3.0)
        'lost'
    """
    if last is None:
        return "starting" if lock_held or age_s < START_LIMIT_S else "lost"
    state = TABLE[last][0 if lock_held else 1]
    return "damaged" if damaged and not lock_held else state
