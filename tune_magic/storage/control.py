"""The worker's ear: requests from any kernel or terminal, and signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from tune_magic import files

_HEARTBEAT_S = 1.0


class StopRequested(BaseException):
    """Unwinds the worker to where it saves and ends. Not an Exception: nothing on the way may swallow it."""


class Control:
    """Tells the worker what was asked of it.

    Args:
        folder: The job folder.
        attempt: Requests meant for another attempt are stale and ignored.
        is_worker: Whether this process is the job's own.
    """

    def __init__(self, folder: Path, attempt: int, *, is_worker: bool = False) -> None:
        self._is_worker = is_worker
        self._folder = folder
        self._requests = folder / "control"
        self._attempt = attempt
        self._seen: set[str] = set()
        self._waiting: dict[str, dict[str, Any]] = {}
        self._terminated = False
        self._put_off_s = 0.0
        self._beat = 0.0

    def check(self, done: int = 0, total: int = 0) -> None:
        """Call often, at least at every microbatch; also keeps the heartbeat going.

        Args:
            done: Microbatches done in this step.
            total: Microbatches of this step.

        Raises:
            StopRequested: Somebody asked to stop.
        """
        now = time.monotonic()
        if now - self._beat >= _HEARTBEAT_S:
            self._beat = now
            with contextlib.suppress(OSError):  # a hint; the log will complain if the disk is full
                files.write_json(self._folder / "heartbeat", {"done": done, "total": total}, durable=False)
        self._read()
        if self._terminated or "stop" in self._waiting:
            raise StopRequested

    def take(self, request: str) -> bool:
        """Return whether `request` was made, and forget it."""
        return self.content(request) is not None

    def content(self, request: str) -> dict[str, Any] | None:
        """Return what the latest `request` says, None where none was made; and forget it."""
        self._read()
        return self._waiting.pop(request, None)

    def budget_s(self) -> float | None:
        """Return the seconds that are left of this attempt's budget, None where it has none; and forget it."""
        budget = self.content("budget")
        return None if budget is None else float(budget["until"]) + self._put_off_s - time.time()

    def put_off_budget(self, seconds: float) -> None:
        """Let the budget begin later: waiting for others is not on this run's account."""
        self._put_off_s += seconds

    def _read(self) -> None:
        try:
            names = {name for name in os.listdir(self._requests) if name.endswith(".json")}  # noqa: PTH208 - hot path
        except OSError:
            return
        for name in sorted(names - self._seen):
            if name.startswith(files.TEMPORARY):
                continue
            self._seen.add(name)
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                content = json.loads((self._requests / name).read_text(encoding="utf-8"))
                if content["attempt"] == self._attempt:
                    self._waiting[content["request"]] = content

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """While inside: SIGTERM is a stop request, a second one ends the process.

        A worker of its own ignores SIGINT; inline it is a stop request as well. The handlers before are put back. Off the main thread, where Python takes no handlers, this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        on_interrupt = signal.SIG_IGN if self._is_worker else self._on_interrupt
        before = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, self._on_term),
            signal.SIGINT: signal.signal(signal.SIGINT, on_interrupt),
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._terminated:
            raise KeyboardInterrupt
        self._terminated = True

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        if self._terminated:
            os._exit(143)
        self._terminated = True
