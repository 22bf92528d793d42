"""Who is written when: rows join and leave at token boundaries, one thread alone touches the models."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tune_magic.errors import TuneError
from tune_magic.evaluation.speakers import Speakers
from tune_magic.models.decode import Decoding, why_alone
from tune_magic.serving.writing import Likely, Writing
from tune_magic.training.outputs import outputs_of
from tune_magic.training.stack import BASE
from tune_magic.training.tuned import Tuned

_TURN = 4  # tokens a model writes before the next one's turn, while several are asked
_CLOSED = "The server is shutting down."


@dataclass(frozen=True)
class Piece:
    """More of a text.

    Attributes:
        index: Which of those that were asked for together.
        text: What comes after the text before.
        likely: Probabilities of its tokens, where they are asked for.
        reason: Why the text ends here, ``stop`` or ``length``; None while it goes on.
        num_tokens: Of the whole text; 0 while it goes on.
    """

    index: int
    text: str
    likely: Sequence[Likely] = ()
    reason: str | None = None
    num_tokens: int = 0


@dataclass(frozen=True)
class Found:
    """What a model finds in inputs.

    Attributes:
        rows: Of each input what was found, by name.
        num_tokens: Of the inputs.
    """

    rows: Sequence[dict[str, Any]]
    num_tokens: int


@dataclass(frozen=True)
class Failure:
    """Why there is no answer.

    Attributes:
        status: Of HTTP.
        message: In words, for whoever asked.
    """

    status: int
    message: str


Told = Piece | Found | Failure


@dataclass(eq=False)
class Task:
    """Something asked of one model.

    Attributes:
        side: The model, as the speakers call it.
        tell: Called with what comes of it, from the scheduler's thread; a `Failure` is the last.
        until: When it is given up, on the monotonic clock.
        is_gone: Whether nobody wants it any more; set by anyone.
    """

    side: str
    tell: Callable[[Told], None]
    until: float
    is_gone: bool = False


@dataclass(eq=False)
class Row(Task):
    """A text to be written after a prompt.

    Attributes:
        index: Which of those that were asked for together.
        prompt: Token ids, shape (length,).
        writing: The text.
    """

    index: int = 0
    prompt: np.ndarray = None  # type: ignore[assignment]
    writing: Writing = None  # type: ignore[assignment]


@dataclass(eq=False)
class Look(Task):
    """Inputs in which something is to be found."""

    inputs: Sequence[Any] = ()


class _Lane:
    """The rows that one model writes on together."""

    def __init__(self, side: str, most: int) -> None:
        self.side = side
        self.most = most
        self.rows: list[Row] = []
        self.coming: list[Task] = []
        self._decoding: Decoding | None = None

    @property
    def num_rows(self) -> int:
        return len(self.rows) + len(self.coming)

    def turn(
        self, speaker: Tuned, tokens: int, leave: Callable[[Sequence[Task]], None],
        fail: Callable[[Sequence[Task], Exception], None],
    ) -> None:  # fmt: skip
        """Let who waits join and write some tokens; `leave` is told who is done after each, `fail` whose prompt failed."""
        model = speaker.method.inner(speaker.model)
        if self._decoding is None:
            self._decoding = Decoding(model, pads=self.most > 1)
        while self.coming:
            task = self.coming[0]
            if task.is_gone or time.monotonic() > task.until:
                leave([self.coming.pop(0)])
            elif isinstance(task, Look):
                _look(task, speaker)
                leave([self.coming.pop(0)])
            elif isinstance(task, Row):
                try:
                    logits, cache, mask = self._decoding.read(task.prompt, _before(speaker, self.side))
                except Exception as error:  # noqa: BLE001 - whatever a model makes of one prompt, the others go on
                    fail([self.coming.pop(0)], error)
                    continue
                self._decoding.add(cache, mask)
                self.rows.append(task)
                self.coming.pop(0)
                self._take(logits[None], [task])
                self._go(leave)
        for _ in range(tokens):
            if self.rows:
                self._take(self._decoding.step([row.writing.ids[-1] for row in self.rows]), self.rows)
            self._go(leave)

    def _take(self, logits: torch.Tensor, rows: Sequence[Row]) -> None:
        likeliest = logits.argmax(-1).tolist()
        for row, own, first in zip(rows, logits, likeliest, strict=True):
            writing = row.writing
            try:
                text, likely = writing.take(own, first if writing.draw.is_plain else None)
            except RuntimeError:  # no probabilities to draw from; the others have theirs
                row.tell(Failure(500, "The model gives no probabilities to draw from."))
                row.is_gone = True
                continue
            if text or writing.reason:
                row.tell(Piece(row.index, text, likely, writing.reason, len(writing.ids) if writing.reason else 0))

    def _go(self, leave: Callable[[Sequence[Task]], None]) -> None:
        """Let go of rows that are whole, or that nobody waits for."""
        gone = [row for row in self.rows if row.writing.reason or row.is_gone or time.monotonic() > row.until]
        if gone and self._decoding is not None:
            self._decoding.keep([place for place, row in enumerate(self.rows) if row not in gone])
            self.rows = [row for row in self.rows if row not in gone]
            leave(gone)

    def give_up(self) -> list[Task]:
        """Return everything in here, which is forgotten."""
        all_of_it = [*self.rows, *self.coming]
        self.rows, self.coming, self._decoding = [], [], None
        return all_of_it


class Scheduler:
    """Answers what is asked of models, in the order of asking, as many rows at once as may be.

    Args:
        speakers: The models, each of which may be spoken to by one thread alone: this one's.
        max_rows: Most texts that are written at the same time, of all models together.

    Attributes:
        counts: What came of rows so far: ``written``, ``found``, ``failed``, ``dropped``, ``timed_out``, and ``tokens``.
        alone: By side, why its rows are written one at a time.
    """

    def __init__(self, speakers: Speakers, max_rows: int) -> None:
        self._speakers = speakers
        self._max_rows = max_rows
        self._waiting: deque[Task] = deque()
        self._changed = threading.Condition()
        self._closes_at: float | None = None
        self.counts: Counter[str] = Counter()
        self.errors: deque[str] = deque(maxlen=20)
        self.alone = self._check()
        self._lanes = {
            side: _Lane(side, 1 if side in self.alone else max_rows) for side in (*speakers.sides, BASE)
        }  # fmt: skip
        self._thread = threading.Thread(target=self._work, name="tune_magic-scheduler", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def submit(self, tasks: Sequence[Task]) -> None:
        """Put something in the line; safe from any thread."""
        with self._changed:
            if self._closes_at is None:
                self._waiting.extend(tasks)
                self._changed.notify()
                return
        for task in tasks:
            task.tell(Failure(503, _CLOSED))

    def wake(self) -> None:
        """Look at once who is gone; safe from any thread."""
        with self._changed:
            self._changed.notify()

    @property
    def num_active(self) -> int:
        """Rows that are being written."""
        return sum(lane.num_rows for lane in self._lanes.values())

    def close(self, grace_s: float) -> None:
        """Take nothing more, finish what can be within some seconds, and end the thread."""
        with self._changed:
            self._closes_at = time.monotonic() + grace_s
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _check(self) -> dict[str, str]:
        """Return why models cannot write rows together, by side; those that write no texts are left out."""
        found = {}
        for side in (*self._speakers.sides, BASE):
            if self._speakers.tuned(side).objective.scores_rows:
                continue
            with self._speakers.speaking(side) as speaker:
                model = speaker.method.inner(speaker.model) if speaker is not None else None
                reason = why_alone(model) if model is not None else None
                if reason:
                    _try_alone(model, side)
                    found[side] = reason
        return found

    def _work(self) -> None:
        while self._admit():
            busy = [lane for lane in self._lanes.values() if lane.num_rows]
            for lane in busy:
                self._turn(lane, _TURN if len(busy) > 1 else 1)
        for lane in self._lanes.values():
            self._refuse(lane.give_up())
        with self._changed:
            waiting, self._waiting = list(self._waiting), deque()
        self._refuse(waiting)

    def _turn(self, lane: _Lane, tokens: int) -> None:
        try:
            with self._speakers.speaking(lane.side) as speaker:
                assert speaker is not None
                lane.turn(speaker, tokens, self._leave, self._fail)
                while self._has_all(lane):
                    lane.turn(speaker, tokens, self._leave, self._fail)
        except Exception as error:  # noqa: BLE001 - one batch fails, the server goes on
            self._fail(lane.give_up(), error)

    def _has_all(self, lane: _Lane) -> bool:
        """Whether a lane has all there is to do, so that its model need not be switched away from."""
        return bool(lane.rows and self.num_active == lane.num_rows and not self._waiting and self._closes_at is None)

    def _admit(self) -> bool:
        """Let rows join while there is room, wait while there is nothing to do; False when this is the end."""
        with self._changed:
            while True:
                if self._closes_at is not None and (time.monotonic() > self._closes_at or not self._is_busy()):
                    return False
                self._forget_gone()
                self._assign()
                if any(lane.num_rows for lane in self._lanes.values()):
                    return True
                self._changed.wait(self._patience_s())

    def _is_busy(self) -> bool:
        return bool(self._waiting or self.num_active)

    def _patience_s(self) -> float | None:
        return None if self._closes_at is None else max(0.0, self._closes_at - time.monotonic())

    def _forget_gone(self) -> None:
        gone = [task for task in self._waiting if task.is_gone or time.monotonic() > task.until]
        for task in gone:
            self._waiting.remove(task)
        self._leave(gone)

    def _assign(self) -> None:
        """Give who waits to a lane with room, first come, first served; a full lane holds up only its own."""
        kept: deque[Task] = deque()
        for task in self._waiting:
            lane = self._lanes[task.side]
            if self.num_active < self._max_rows and lane.num_rows < lane.most:
                lane.coming.append(task)
            else:
                kept.append(task)
        self._waiting = kept

    def _leave(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            if isinstance(task, Row):
                self.counts["tokens"] += len(task.writing.ids)
            if isinstance(task, Row) and task.writing.reason:
                self.counts["written"] += 1
            elif isinstance(task, Look) and not task.is_gone:
                self.counts["found"] += 1
            elif task.is_gone:
                self.counts["dropped"] += 1
            else:
                self.counts["timed_out"] += 1
                task.tell(Failure(504, "The answer took longer than this server allows."))

    def _refuse(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            self.counts["failed"] += 1
            task.tell(Failure(503, _CLOSED))

    def _fail(self, tasks: Sequence[Task], error: Exception) -> None:
        """Tell who waits, and the log where it was: no message, which may hold what somebody asked."""
        self.errors.append(type(error).__name__)
        frames = "".join(traceback.format_tb(error.__traceback__))
        print(f"{frames}{type(error).__name__}", file=sys.stderr, flush=True)  # noqa: T201 - this is the worker's log
        for task in tasks:
            self.counts["failed"] += 1
            task.tell(Failure(500, f"The model failed ({type(error).__name__})."))
        if torch.cuda.is_available():
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()


def _try_alone(model: Any, side: str) -> None:
    """Refuse a model that cannot even write one text at a time.

    Raises:
        TuneError: It keeps what it saw in a way of its own.
    """
    try:
        decoding = Decoding(model, pads=False)
        decoding.join(np.array([3, 4, 5]))
        decoding.step([3])
    except Exception as error:
        raise TuneError(
            f"The model of `{side}` keeps what it has seen in a way that this server does not know.",
            hint="`run.generate(prompts)` and `%tune chat` answer with it.",
        ) from error


def _before(speaker: Tuned, side: str) -> Any:
    """Return what a method's learned tokens give the model before each row, if it has any."""
    if side == BASE or not speaker.method.num_virtual_tokens:
        return None
    with torch.no_grad():
        return speaker.model.get_prompt(1)


def _look(task: Look, speaker: Tuned) -> None:
    """Tell what the model finds, or what is wrong with the inputs."""
    try:
        examples = speaker.asked(task.inputs)
        outputs = outputs_of(speaker.engine(), speaker.objective, examples)
        frame = speaker.objective.frame(outputs, examples)
    except TuneError as error:
        task.tell(Failure(400, f"{error.message} {error.hint or ''}".strip()))
        return
    if len(frame) != len(task.inputs):
        task.tell(Failure(400, "The model finds several things in an input, which has no form here."))
        return
    rows = [dict(zip(map(str, frame.columns), values, strict=True)) for values in frame.to_numpy(dtype=object).tolist()]
    task.tell(Found(rows, sum(map(len, examples))))
