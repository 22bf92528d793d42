"""Who answers in a chat: one tuned model and its base, adapters on one base, or models beside each other."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace

from tune_magic.errors import TuneError
from tune_magic.storage.folder import RunFolder
from tune_magic.training import alike, memory
from tune_magic.training.prepare import device
from tune_magic.training.stack import BASE, Stack
from tune_magic.training.tuned import Tuned, load_tuned

_BYTES_A_PARAMETER = 4  # float32
_ROOM_BYTES = 256 << 20  # for what is computed


class Speakers(abc.ABC):
    """Who answers, by side.

    Attributes:
        sides: Those beside the base, in order.
    """

    sides: tuple[str, ...]

    @abc.abstractmethod
    def tuned(self, side: str) -> Tuned:
        """Return recipe and tokens of a side, also of the base; its model only answers while it is `speaking`."""

    @abc.abstractmethod
    def speaking(self, side: str) -> contextlib.AbstractContextManager[Tuned | None]:
        """Return a context that gives the model of a side; None where there is none."""


class Beside(Speakers):
    """Models each loaded by itself; the base is within the first, or loaded too.

    Args:
        runs: By side.
        base: Whether the base may be asked.

    Raises:
        TuneError: Memory would not suffice for all.
    """

    def __init__(self, runs: Mapping[str, RunFolder], *, base: bool) -> None:
        self.sides = tuple(runs)
        if len(runs) > 1:
            _check_room(runs, base=base)
        self._tuned = {side: load_tuned(run) for side, run in runs.items()}
        first = self._tuned[self.sides[0]]
        self._first = next((one for one in self._tuned.values() if one.holds_base), first)
        needs_base = base and not (self._first.holds_base or first.objective.scores_rows)
        self._base = first.load_base() if needs_base else None

    def tuned(self, side: str) -> Tuned:
        """Return a side's; of the base, those of the model it is within."""
        if side == BASE:
            return replace(self._first, vocabulary=self._first.vocabulary.unextended())
        return self._tuned[side]

    @contextlib.contextmanager
    def speaking(self, side: str) -> Iterator[Tuned | None]:
        """Give a model; the base is a tuned one without its tuning where that can be."""
        if side != BASE:
            yield self._tuned[side]
        elif self._first.holds_base:
            with self._first.without_tuning() as base:
                yield base
        else:
            yield self._base


class Stacked(Speakers):
    """Adapters of several runs on one base.

    Args:
        runs: By side.
    """

    def __init__(self, runs: Mapping[str, RunFolder]) -> None:
        self.sides = tuple(runs)
        self._stack = Stack(runs)

    def tuned(self, side: str) -> Tuned:
        """Return a side's; all have the same model."""
        return self._stack.tuned(side)

    @contextlib.contextmanager
    def speaking(self, side: str) -> Iterator[Tuned | None]:
        """Let the one model be that of a side."""
        yield self._stack.switch(side)


def speakers_of(job: RunFolder) -> Speakers:
    """Load whoever answers in a chat.

    Raises:
        TuneError: A model cannot be loaded, or memory does not suffice for all.
    """
    options = job.info["options"]
    named = options.get("runs")
    if not named:
        return Beside({"tuned": RunFolder(job.path.parent.parent)}, base=options["base"])
    runs = {side: RunFolder(path) for side, path in named.items()}
    if alike.differences(runs):
        return Beside(runs, base=options["base"])
    return Stacked(runs)


def _check_room(runs: Mapping[str, RunFolder], *, base: bool) -> None:
    sizes = [run.summary().plan.get("parameters", 0) * _BYTES_A_PARAMETER for run in runs.values()]
    loads_base = base and not any(alike.holds_base(run) for run in runs.values())
    plan = next(iter(runs.values())).summary().plan
    whole = plan["compress"]["before"]["parameters"] * _BYTES_A_PARAMETER if plan.get("compress") else sizes[0]
    needed, free = sum(sizes) + (whole if loads_base else 0) + _ROOM_BYTES, memory.free(device())
    if needed > free:
        raise TuneError(
            f"These {len(runs)} models do not fit beside each other: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free.",
            hint="Talk to them one at a time; adapters of one base would share it.",
        )
