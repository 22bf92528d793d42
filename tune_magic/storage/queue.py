"""The line before a device: one run trains, the next ones wait, whichever kernel or terminal started them.

A line is a per-user folder with one ticket a run, numbered in the order of coming. Whoever starts a run takes its ticket,
so that runs train in the order they were started, however long their workers take to come up. A ticket counts while its
run's lock is held, or is about to be; so a run that died never blocks the line, and nothing has to be cleaned up: whoever
looks removes it. The line is a courtesy and no lock: where it cannot be kept (a read-only home), runs start at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tune_magic import files
from tune_magic.errors import LockedError, TuneError
from tune_magic.storage import places
from tune_magic.storage.control import Control
from tune_magic.storage.events import EventLog
from tune_magic.storage.folder import RunFolder
from tune_magic.storage.lock import Lock

_LOOK_S = 0.25
_TELL_S = 20.0  # how far the expected start must have moved, and the least time, before it is told again
_DOOR_S = 5.0  # longest wait for others who are taking a ticket
_COMING_UP_S = 60.0  # so long a ticket counts whose run has no worker yet


def device_name() -> str:
    """Return which device runs started here would share: ``cpu`` or ``cuda-`` and the first one that is visible.

    It is found without torch, since a run that waits should not hold the memory of its imports.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = (visible or "0").split(",")[0].strip()
    if visible is not None and (not visible.strip() or first == "-1"):
        return "cpu"
    try:
        import pynvml

        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        pynvml.nvmlShutdown()
    except Exception:  # noqa: BLE001 - no driver, no library, or no permission: no GPU for us
        return "cpu"
    return f"cuda-{first}" if count else "cpu"


class Line:
    """The line before one device of this machine.

    Args:
        device: Its name, see `device_name`.
    """

    def __init__(self, device: str) -> None:
        self.folder = places.data_folder() / "queue" / f"{socket.gethostname()}-{device}".replace("/", "_")
        self._runs: dict[Path, RunFolder] = {}

    def join(self, run: RunFolder) -> Path:
        """Take a ticket for a run that is being started; an older one of the same run is given back.

        Raises:
            OSError: Tickets cannot be written.
        """
        files.make_folder(self.folder)
        with self._door():
            tickets = self._tickets()
            for ticket in tickets:
                if self._run(ticket).path == run.path:
                    self.leave(ticket)
            newest = int(tickets[-1].stem) if tickets else 0
            ticket = self.folder / f"{max(time.time_ns(), newest + 1):020d}.json"
            files.write_json(ticket, {"run": str(run.path)}, durable=False)
        return ticket

    def ticket_of(self, run: RunFolder) -> Path | None:
        """Return the newest ticket of a run, or None."""
        return next((ticket for ticket in reversed(self._tickets()) if self._run(ticket).path == run.path), None)

    def leave(self, ticket: Path) -> None:
        """Give a ticket back."""
        self._runs.pop(ticket, None)
        with contextlib.suppress(OSError):
            files.discard(ticket)

    def ahead_of(self, ticket: Path) -> list[RunFolder]:
        """Return the runs before a ticket, oldest first; a paused one lets others pass."""
        found = []
        for other in self._tickets():
            if other >= ticket:
                break
            run = self._run(other)
            if run.holder() is not None:
                with contextlib.suppress(TuneError):  # damaged, or of a newer version
                    if run.is_live and run.status != "paused":
                        found.append(run)
            elif self._is_coming_up(other):
                found.append(run)
            else:
                self.leave(other)
        return found

    def _is_coming_up(self, ticket: Path) -> bool:
        """Return whether a ticket was taken a moment ago for a worker that has not said anything since."""
        taken, run = int(ticket.stem) / 1e9, self._run(ticket)
        return time.time() - taken < _COMING_UP_S and run.path.is_dir() and (run.summary().last_t or 0.0) < taken

    def _tickets(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.json"))

    def _run(self, ticket: Path) -> RunFolder:
        if ticket not in self._runs:
            try:
                path = Path(json.loads(ticket.read_text(encoding="utf-8"))["run"])
            except (OSError, ValueError, KeyError, TypeError):
                path = ticket.with_suffix("")  # gone meanwhile, or unreadable: nobody holds that
            self._runs[ticket] = RunFolder(path)
        return self._runs[ticket]

    @contextlib.contextmanager
    def _door(self) -> Iterator[None]:
        """Let one in at a time, so that no ticket appears before one that has looked already."""
        deadline = time.monotonic() + _DOOR_S
        while True:
            try:
                door = Lock(self.folder / "door.lock")
                break
            except LockedError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{self.folder} stays locked") from None
                time.sleep(0.01)
        with door:
            yield


def announce(folder: Path) -> None:
    """Take a ticket for the run in `folder`, whose worker is about to be started; other jobs wait for nobody."""
    run = RunFolder(folder)
    if run.kind == "finetune":
        with contextlib.suppress(OSError):
            Line(device_name()).join(run)


@contextlib.contextmanager
def turn(run: RunFolder, log: EventLog, control: Control) -> Iterator[None]:
    """Wait until the device is this run's, and hold it for the time inside.

    While it waits the log says `queued`, with the place in the line and when it is expected to start. A `continue`
    request, also one left before, lets it start at once.

    Raises:
        StopRequested: Somebody asked to stop.
    """
    line = Line(device_name())
    try:
        ticket = line.ticket_of(run) or line.join(run)
    except OSError:
        control.take("continue")
        yield
        return
    try:
        _wait(line, ticket, log, control)
        yield
    finally:
        line.leave(ticket)


def _wait(line: Line, ticket: Path, log: EventLog, control: Control) -> None:
    began, told, told_at = time.monotonic(), None, 0.0
    while not control.take("continue") and (ahead := line.ahead_of(ticket)):
        control.check()
        now, news = time.monotonic(), _expectation(ahead)
        if told is None or news["ahead"] != told["ahead"] or (now - told_at > _TELL_S and _moved(told, news)):
            log.append("state", state="queued", **news)
            told, told_at = news, now
        time.sleep(_LOOK_S)
    if told is not None:
        control.put_off_budget(time.monotonic() - began)
        log.append("state", state="starting", pid=os.getpid(), waited_s=round(time.monotonic() - began, 1))


def _expectation(ahead: list[RunFolder]) -> dict[str, Any]:
    """Return who is before, and when they should be done as far as can be said: those not yet training are unknown."""
    left = [run.summary().seconds_left() for run in ahead]
    known = [seconds for seconds in left if seconds is not None]
    return {
        "ahead": [{"id": run.id, "name": run.name} for run in ahead],
        "expected": round(time.time() + sum(known)) if known else None,
        "at_least": len(known) < len(left),
    }


def _moved(told: dict[str, Any], news: dict[str, Any]) -> bool:
    before, now = told["expected"], news["expected"]
    return before != now and (before is None or now is None or abs(before - now) > _TELL_S)
