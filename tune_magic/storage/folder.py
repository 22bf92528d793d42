"""The run folder: make one, read one, leave a request in one.

run.json        who, what, when, from where; written once
meta.json       name and note: what people change later
events.jsonl    the truth
control/        requests to the worker
inputs/         tables given as Python objects
checkpoints/    step-N/
evals/ exports/ jobs of the same shape, one folder each
owner.lock  heartbeat  worker.log
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tune_magic import files
from tune_magic.errors import TuneError
from tune_magic.storage import lock, versions
from tune_magic.storage.events import Event, EventReader
from tune_magic.storage.state import TERMINAL, State, derive
from tune_magic.storage.summary import Summary, best_of

FORMAT = 1
REQUESTS = ("stop", "pause", "continue", "checkpoint", "budget", "say", "hush")
_TRAINED = ("finetune", "merge")  # kinds of runs; the others are jobs
_ALPHABET = "23456789abcdefghjkmnpqrstuvwxyz"  # sorted; no l, o, i, 0, 1: ids are read aloud


def create(root: Path, kind: str, content: dict[str, Any]) -> Path:
    """Make a new job folder under `root` with its ``run.json`` and return it.

    Two processes that start in the same second get two folders.

    Args:
        root: Folder of runs; made when missing.
        kind: finetune, merge, evaluate, export, chat, serve, plan, find_lr, data or sizes.
        content: JSON-ready content of ``run.json``; format, id, kind and creation time are added.
    """
    files.make_folder(root)
    while True:
        now = datetime.now(UTC)
        run_id = make_id(now)
        try:
            with files.new_folder(root / run_id) as folder:
                created = round(now.timestamp(), 3)
                head = {"format": FORMAT, "id": run_id, "kind": kind, "created": created}
                files.write_json(folder / "run.json", head | content)
                for name in ("control", "inputs", "checkpoints") if kind in _TRAINED else ("control",):
                    files.make_folder(folder / name)
        except OSError:
            if (root / run_id).exists():
                continue  # the same millisecond and the same letters
            raise
        return root / run_id


def make_id(now: datetime) -> str:
    """Return a new id: UTC date and time, then four letters, so that ids sort by when they were made.

    Of the letters two are the part of the second, in steps of about a millisecond, and two are random.
    """
    base = len(_ALPHABET)
    part = now.microsecond * base * base // 1_000_000
    letters = _ALPHABET[part // base] + _ALPHABET[part % base] + secrets.choice(_ALPHABET) + secrets.choice(_ALPHABET)
    return f"{now:%Y%m%d-%H%M%S}-{letters}"


class RunFolder:
    """Reads one job folder. Cheap: nothing is read before it is asked for, and each event only once."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).resolve()
        self._reader = EventReader(self.path / "events.jsonl")
        self._summary = Summary()
        self.expected_attempt = 1  # see `expect_attempt`

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name or self.id} {self.status}>"

    @functools.cached_property
    def info(self) -> dict[str, Any]:
        """Content of ``run.json``.

        Raises:
            TuneError: The folder is not a run, or comes from a newer version.
        """
        try:
            info: dict[str, Any] = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TuneError(f"{self.path} is not a run folder.") from error
        if info.get("format", 0) > FORMAT:
            raise TuneError(
                f"{self.path.name} was written by a newer tune_magic (format {info['format']}, this one reads {FORMAT}).",
                hint="pip install -U tune-magic",
            )
        return info

    @property
    def id(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def meta(self) -> dict[str, Any]:
        """What people changed later: name and note."""
        try:
            return dict(json.loads((self.path / "meta.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    @property
    def name(self) -> str | None:
        """The name it was given, or was given later."""
        return self.meta.get("name") or self.info.get("name")

    @property
    def kind(self) -> str:
        """finetune, merge, evaluate, export, chat, serve, plan, find_lr or data."""
        return str(self.info["kind"])

    @property
    def link(self) -> dict[str, Any]:
        """Where it was started: path hint of the notebook, cell id, the cell's source and hash."""
        return dict(self.info.get("link") or {})

    @property
    def log(self) -> Path:
        """The worker's standard output and error."""
        return self.path / "worker.log"

    def summary(self) -> Summary:
        """Everything the log says so far; only new lines are read."""
        for event in self._reader.poll():
            self._summary.add(event)
        return self._summary

    def events(self, type: str | None = None) -> Iterator[Event]:  # noqa: A002 - the field's name on disk
        """Yield every event of the log, or those of one type."""
        for event in EventReader(self.path / "events.jsonl").poll():
            if type is None or event["type"] == type:
                yield event

    @property
    def status(self) -> State:
        """The state by the table of `storage.state`."""
        while True:
            owner = self.holder()
            last = self.summary().state
            age_s = time.time() - self.info["created"]
            state = derive(last, lock_held=owner is not None, age_s=age_s, damaged=self.damage is not None)
            # A worker that started or ended between the two looks would be called lost: look again.
            if state != "lost" or (self.holder() == owner and self.summary().state == last):
                return state

    @property
    def damage(self) -> str | None:
        """Which line of the log is damaged, in words, or None."""
        line = self._reader.damaged_line
        return f"log damaged at line {line}" if line else None

    @property
    def is_live(self) -> bool:
        """Whether a worker may still change it."""
        return self.status not in TERMINAL

    def holder(self) -> lock.Holder | None:
        """The process that holds the run's lock."""
        return lock.holder(self.path / "owner.lock")

    def expect_attempt(self, attempt: int) -> None:
        """A worker is about to start this attempt: requests made before it comes up are meant for it."""
        self.expected_attempt = attempt

    @property
    def is_coming_up(self) -> bool:
        """Whether a worker was started here whose attempt has not written yet."""
        return self.summary().attempt < self.expected_attempt

    def request(self, kind: str, **content: Any) -> str:
        """Leave a request for the worker and return its id.

        Args:
            kind: stop, pause, continue, checkpoint or budget; of a chat also say and hush.
            **content: What the request needs to say; for a budget ``until``, in seconds since the epoch.
        """
        if kind not in REQUESTS:
            raise ValueError(f"no request {kind!r}; there are {', '.join(REQUESTS)}")
        request_id = f"{time.time_ns()}-{secrets.token_hex(2)}"
        content |= {
            "id": request_id,
            "request": kind,
            "attempt": max(self.summary().attempt, self.expected_attempt),
            "t": time.time(),
        }
        files.write_json(self.path / "control" / f"{request_id}.json", content)
        return request_id

    def requested(self, kind: str) -> bool:
        """Return whether this attempt was asked for `kind`."""
        for path in (self.path / "control").glob("[0-9]*.json"):
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["request"] == kind and content["attempt"] == self.summary().attempt:
                return True
        return False

    def kill(self) -> bool:
        """Kill the worker and its children at once; the last checkpoint stands. Returns whether there was one."""
        owner = self.holder()
        if owner is None or owner.pid in (0, os.getpid()):
            return False
        try:
            os.killpg(owner.pid, signal.SIGKILL)  # a worker leads a session and group of its own
        except ProcessLookupError:
            return False
        return True

    def annotate(self, **content: str | None) -> None:
        """Change what ``meta.json`` says: name and note; None removes an entry."""
        merged = self.meta | content
        files.write_json(self.path / "meta.json", {key: value for key, value in merged.items() if value is not None})

    def delete(self, *, registered: bool = False) -> None:
        """Delete the folder with everything in it.

        Args:
            registered: Also where it is a version of a registered model.

        Raises:
            TuneError: A process works on it, or it is registered and nobody said that this may be.
        """
        names = [] if registered else [f"{one.reference} ({one.stage})" for one in versions.registered_as(self.path)]
        if names:
            raise TuneError(f"{self.name or self.id} is registered as {', '.join(names)}.",
                            hint="`%tune rm RUN --registered`, `run.delete(registered=True)`: the version then has no files.")  # fmt: skip
        owner = self.holder()
        if owner is not None:
            raise TuneError(f"{self.name or self.id} is {self.status}.", hint="Stop it first.")
        files.discard(self.path)

    @property
    def checkpoints(self) -> dict[int, Path]:
        """The checkpoints on disk by step."""
        folder = self.path / "checkpoints"
        named = {path.name.removeprefix("step-"): path for path in folder.glob("step-*")}
        whole = {
            int(step): path for step, path in named.items() if step.isdigit() and (path / "manifest.json").is_file()
        }
        return dict(sorted(whole.items()))

    @property
    def best_checkpoint(self) -> Path:
        """The checkpoint with the lowest held-out loss; without held-out rows, the newest.

        Raises:
            TuneError: There is none yet.
        """
        found = self.checkpoints
        if not found:
            raise TuneError(f"{self.name or self.id} has no checkpoint yet.")
        scored = {step: event for step, event in self.summary().evaluations.items() if step in found}
        best = best_of(scored)
        return found[best["step"] if best else max(found)]

    def size_bytes(self) -> int:
        """Bytes on disk, jobs and checkpoints included."""
        return sum(p.lstat().st_size for p in self.path.rglob("*") if p.is_file())
