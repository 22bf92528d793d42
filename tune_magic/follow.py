"""Follow a job in the cell that started it: live frame, interrupt contract, static card at the end.

First interrupt: the worker is asked to stop and saves its last completed step. Second: it is killed, and the last
checkpoint stands. Interrupts are counted by a handler of our own, so none is lost in the middle of a drawing, and the
handler before it is put back whatever happens.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, Protocol

from tune_magic.diagnosis import Diagnosis, diagnose
from tune_magic.display import Live, in_kernel, show
from tune_magic.handles import Run
from tune_magic.storage.folder import RunFolder
from tune_magic.storage.state import TERMINAL, State
from tune_magic.view import frame, words
from tune_magic.view.html import BLUE, Bundle, bar, box, bundle, clean, grey, heading, note_bundle

_FRAME_S = 0.5
_LINE_S = 5.0
_DRAWING_SHARE = 100
_DOING = {
    "evaluate": "evaluating", "export": "exporting", "plan": "planning", "data": "reading the rows", "merge": "merging",
    "find_lr": "trying learning rates", "sizes": "counting parameters",
}  # fmt: skip


class Place(Protocol):
    """Where a job is drawn: `display.Live`, or a part of one."""

    @property
    def is_text(self) -> bool: ...  # noqa: D102
    def update(self, bundle: Bundle) -> None: ...  # noqa: D102


class WatchingEnded(Exception):
    """Somebody no longer wants to watch."""


class Interrupts:
    """Counts Ctrl-C and the Interrupt button while inside."""

    def __init__(self) -> None:
        self.count = 0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Take SIGINT for the time inside; off the main thread, where Python takes no handlers, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _note(self, number: int, stack: FrameType | None) -> None:
        self.count += 1


class FrameMaker:
    """Makes a run's frames; the curve is drawn again no sooner than 100 times its last drawing took.

    Args:
        run: The run.
        interruptible: Whether Interrupt would stop it, so that the frame may say so.
    """

    def __init__(self, run: RunFolder, *, interruptible: bool = True) -> None:
        self._run = run
        self._interruptible = interruptible
        self._picture: Any = None
        self._advice: Sequence[Diagnosis] = ()
        self._picture_due = 0.0
        self._evaluations = -1

    def frame(self, state: State) -> Bundle:
        """Return the frame of this moment."""
        summary, now = self._run.summary(), time.monotonic()
        if now >= self._picture_due or len(summary.evaluations) != self._evaluations:
            self._evaluations = len(summary.evaluations)
            self._picture, self._advice = frame.curve(summary), diagnose(summary)
            self._picture_due = now + _DRAWING_SHARE * (time.monotonic() - now)
        return frame.frame(self._run, state, self._picture, self._advice, interruptible=self._interruptible)


class Painter:
    """Draws a job's frames, at most two a second; in a terminal a line each few seconds.

    Args:
        run: The job.
        live: Where to draw.
        interruptible: Whether Interrupt would stop the job.
    """

    def __init__(self, run: RunFolder, live: Place, *, interruptible: bool = True) -> None:
        self._run = run
        self._live = live
        self._frames = FrameMaker(run, interruptible=interruptible)
        self._due = 0.0

    def paint(self, *, stopping: bool = False) -> None:
        """Draw a frame when one is due."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + (_LINE_S if self._live.is_text else _FRAME_S)
        state = self._run.status
        if state in TERMINAL and not self._run.is_coming_up:
            return
        self._live.update(self._frame("starting" if state in TERMINAL else "stopping" if stopping else state))

    def _frame(self, state: State) -> Bundle:
        if self._run.kind != "finetune":
            return progress_bundle(self._run)
        if self._live.is_text:
            return {"text/plain": clean(frame.line(self._run, state))}
        return self._frames.frame(state)


def follow(run: Run, *, stops: bool = True) -> Run:
    """Show a finetune job until it ends, then its card; raise what its end means.

    Args:
        run: The run.
        stops: Whether an interrupt stops the run; otherwise it only ends the watching.

    Raises:
        Stopped: It was stopped. RunFailed: It failed or its worker died.
    """
    live = Live(run)
    try:
        watch(run, live, stops=stops)
    except WatchingEnded:
        live.update(note_bundle(f"{run.name or run.id} goes on. `%tune watch {run.name or run.id}` shows it again."))
        return run
    live.update(run.card())
    run.raise_for_state()
    return run


def follow_in_background(run: Run) -> None:
    """Show a run in this cell's output until it ends, while the kernel is free for other cells.

    A thread draws, by the display's id, and never prints. Outside a kernel, where no output can be updated, one line
    says how to look.
    """
    name = run.name or run.id
    if not in_kernel():
        show(note_bundle(f"{name} trains in the background. `tune-magic watch {name}` shows it."), run=run)
        return
    own = Run(run.path)  # two threads must not share a reader
    own.expect_attempt(run.expected_attempt)
    live = Live(own)
    painter = Painter(own, live, interruptible=False)
    painter.paint()

    def draw() -> None:
        own.wait(each=painter.paint)
        live.update(own.card())

    threading.Thread(target=draw, name=f"view of {own.id}", daemon=True).start()


def follow_job(job: Run, live: Live) -> Run:
    """Show the progress of an evaluation, an export, a merge or a dry run until it ends.

    Raises:
        Stopped: It was stopped. RunFailed: It failed or its worker died.
    """
    watch(job, live)
    if job.status != "finished":
        live.update(progress_bundle(job))
    job.raise_for_state()
    return job


def progress_bundle(job: RunFolder) -> Bundle:
    """Return what is shown while a job without a curve works."""
    summary = job.summary()
    name = job.name or job.id
    total = summary.progress.get("total") or 0
    done = summary.progress.get("done") or 0
    doing = _DOING[job.kind]
    state = job.status
    detail = f"{doing} · {done} of {total}" if total else f"{doing} · loading"
    if state in TERMINAL:
        detail = f"{doing} {state}"
    since = words.duration(time.time() - job.info["created"])
    body = [heading(frame.COLOURS.get(state, BLUE), name, detail, since), bar(done / total if total else 0.0, BLUE)]
    body += [grey("stop: ■ Interrupt")] if state not in TERMINAL else []
    return bundle(box(*body), [f"{name}: {detail}"])


def watch(run: Run, live: Place, *, stops: bool = True) -> int:
    """Show a job until it ends: a first interrupt stops it, a second one kills it.

    Args:
        run: The job.
        live: Where to draw.
        stops: Whether an interrupt stops the job; otherwise it ends the watching.

    Returns:
        How often it was interrupted.

    Raises:
        WatchingEnded: It was interrupted, and goes on.
    """
    painter = Painter(run, live, interruptible=stops)
    interrupts = Interrupts()
    obeyed = 0

    def each() -> None:
        nonlocal obeyed
        if interrupts.count > obeyed:
            obeyed = interrupts.count
            if not stops:
                raise WatchingEnded
            if obeyed == 1:
                run.stop()
            else:
                run.kill()
        painter.paint(stopping=obeyed > 0)

    with interrupts.counted():
        run.wait(each=each)
    return obeyed
