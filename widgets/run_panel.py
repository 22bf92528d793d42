"""A run with buttons: what `%tune watch` shows, and stop, checkpoint, resume."""

from __future__ import annotations

import ipywidgets
from tune_magic.widgets.panel import Panel, button

from tune_magic.executors import local
from tune_magic.follow import FrameMaker
from tune_magic.handles import Run
from tune_magic.storage.state import RESUMABLE, TERMINAL
from tune_magic.view.html import Bundle

_PERIOD_S = 0.5


class RunPanel(Panel):
    """Shows a run, live or ended, and acts on it.

    The buttons leave requests in the run folder. When the run has finished they go, and the card stays.

    Args:
        run: The run.
        banner: A line above its card.

    Example:
        >>> RunPanel(run)  # doctest: +SKIP
    """

    def __init__(self, run: Run, banner: str | None = None) -> None:
        self.run = Run(run.path)  # its own reader: two threads must not share one
        self.run.expect_attempt(run.expected_attempt)
        self._banner = banner
        self._frames = FrameMaker(self.run, interruptible=False)
        self.stop = button("Stop", "Save the last completed step and stop", lambda: Run(run.path).stop())
        self.checkpoint = button("Checkpoint now", "Save a checkpoint after this step", self._checkpoint)
        self.pause = button("Pause", "Save and wait; the memory stays taken", lambda: Run(run.path).pause())
        self.resume = button("Resume", "Go on from the last checkpoint", self._ask_to_resume)
        self._resume_asked = False
        self._was_live = False
        super().__init__(ipywidgets.HBox([self.stop, self.checkpoint, self.pause, self.resume]), _PERIOD_S)

    def bundle(self) -> Bundle:
        """Return the live frame, or the card when the run has ended."""
        state = self.run.status
        if state in TERMINAL and not self.run.is_coming_up:
            return self.run.card(self._banner)
        return self._frames.frame("starting" if state in TERMINAL else state)

    def act(self) -> None:
        """Resume when asked, and let the buttons say what is possible."""
        if self._resume_asked:
            self._resume_asked = False
            if self._is_resumable:
                self.run.resume()
        self.refresh()

    def refresh(self) -> None:
        """Enable the buttons that would do something now."""
        is_live = self.run.is_live or self.run.is_coming_up
        if self._was_live and not is_live:
            local.job_ended()
        self._was_live = is_live
        self.stop.disabled = self.checkpoint.disabled = not is_live
        self.pause.disabled = not is_live or self.run.status == "paused"
        self.resume.disabled = not self._is_resumable
        self.resume.description = "Start now" if self.run.status == "queued" else "Resume"

    @property
    def is_over(self) -> bool:
        """Whether the run has finished: nothing of it can change."""
        return self.run.status == "finished"

    @property
    def _is_resumable(self) -> bool:
        return self.run.status in (*RESUMABLE, "paused", "queued") and not self.run.is_coming_up

    def _checkpoint(self) -> None:
        Run(self.run.path).checkpoint()

    def _ask_to_resume(self) -> None:
        self._resume_asked = True
        self.wake()
