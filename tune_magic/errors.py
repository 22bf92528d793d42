"""Errors users see: message, cause, hint, log.

Low layers raise these with the rule, the value and the fix; the surfaces (magics, command line) render them.
Everything the core raises on purpose is a `TuneError`, so that ``except TuneError`` is always enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tune_magic.handles import Run


class TuneError(Exception):
    """Something a user can act on.

    Args:
        message: The rule that was broken and the value that broke it.
        hint: What to do about it, one line.
        log: A file that tells more.
        run: The run it happened in, when there is one.

    Example:
        >>> print(TuneError("No run is called `bot`.", hint="`%tune runs` lists them."))
        No run is called `bot`. `%tune runs` lists them.
    """

    def __init__(
        self, message: str, *, hint: str | None = None, log: Path | None = None, run: Run | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.log = log
        self.run = run

    def __str__(self) -> str:
        parts = [self.message, self.hint, f"Log: {self.log}" if self.log else None]
        return " ".join(part for part in parts if part)

    def _render_traceback_(self) -> list[str]:
        """What IPython prints instead of a traceback: message, cause, hint, log path."""
        lines = [f"{type(self).__name__}: {self.message}"]
        if self.__cause__ is not None:
            lines.append(f"cause: {type(self.__cause__).__name__}: {self.__cause__}")
        if self.hint:
            lines.append(f"hint: {self.hint}")
        if self.log:
            lines.append(f"log: {self.log}")
        return lines


class Stopped(TuneError):
    """A run was stopped before its end; the work up to its last completed step is kept."""


class RunFailed(TuneError):
    """A run ended with an error of its own."""


class DataError(TuneError):
    """Rows that cannot be trained on, each with its place."""


class ModelError(TuneError):
    """A model that cannot be found or loaded."""


class CheckpointError(TuneError):
    """A checkpoint that is incomplete, damaged or cannot be written."""


class LockedError(TuneError):
    """A run folder that another process is writing to."""


@dataclass(frozen=True)
class Fault:
    """One thing wrong in a recipe.

    Args:
        key: Dotted path of the key, such as ``method.r``.
        problem: The rule, and the value that broke it.
        suggestion: A line that would work.
        line: 1-based line of the cell or file, when it is known.
    """

    key: str
    problem: str
    suggestion: str | None = None
    line: int | None = None

    def __str__(self) -> str:
        place = f"line {self.line}, " if self.line else ""
        advice = f" {self.suggestion}" if self.suggestion else ""
        return f"{place}`{self.key}`: {self.problem}{advice}" if self.key else f"{place}{self.problem}{advice}"


class RecipeError(TuneError):
    """Every fault of a recipe at once."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        count = len(self.faults)
        head = "1 fault in the recipe" if count == 1 else f"{count} faults in the recipe"
        super().__init__("\n  ".join([f"{head}:", *map(str, self.faults)]))
