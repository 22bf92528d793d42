"""A worker with its imports done, waiting for the next job of this process; its own side is in `worker`.

Importing torch, Transformers and PEFT takes longer than anything else before a first step. So one interpreter does it
ahead, in the background, and is handed the next job through its standard input. It is a saving and never a need:
whenever it does not fit, the job starts in a fresh interpreter as if there were no such thing.

Only a process that asked for one, by `warm_up`, ever has one. ``TUNE_MAGIC_STANDBY=off`` turns it off.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import sysconfig
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from tune_magic import files, worker
from tune_magic.storage import fingerprint

_LEAST_AVAILABLE_BYTES = 3_000_000_000  # it takes 0.4 GB itself; the rest is the notebook's and the next job's
_MARGIN_S = 30.0  # not handed a job so shortly before it ends by itself


@dataclass
class Standby:
    """A standby of this process.

    Attributes:
        process: It; the leader of a session of its own.
        key: What must be the same for a job as when it was started.
        started: When, on the monotonic clock.
        said: What it has answered so far.
    """

    process: subprocess.Popen[bytes]
    key: Any = field(repr=False)
    started: float
    said: bytes = b""

    def says(self, word: bytes) -> bool:
        """Return whether it has said `word` by now."""
        assert self.process.stdout is not None
        self.said += self.process.stdout.read(64) or b""  # None when it has said nothing new
        return word in self.said

    def is_current(self) -> bool:
        """Return whether it lives, has time left, and was started in the surroundings of now."""
        expires = self.started + worker.idle_limit_s() - _MARGIN_S
        return self.process.poll() is None and time.monotonic() < expires and self.key == _key()

    def hand_over(self, folder: Path, cwd: str, code: bytes) -> None:
        """Give it a job, and plug-ins of cells that the job needs.

        Raises:
            OSError: It has just died.
        """
        assert self.process.stdin is not None
        line = files.to_json({"folder": str(folder), "cwd": cwd}) + "\n"
        files.write_all(self.process.stdin.fileno(), line.encode())
        assert self.process.stdout is not None
        self.process.stdout.close()
        send(self.process.stdin, code)

    def end(self) -> None:
        """Kill it: it has nothing to save, and during its imports it would not hear the pipe's end."""
        self.process.kill()
        self.process.wait()
        self._hang_up()

    def _hang_up(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


def send(pipe: IO[bytes], content: bytes) -> None:
    """Write to a worker's standard input and close it, in the background: a pipe holds little until somebody reads."""

    def write() -> None:
        with contextlib.suppress(OSError), pipe:  # a worker that has died says so itself
            files.write_all(pipe.fileno(), content)

    if content:
        threading.Thread(target=write, name="tune_magic-code").start()
    else:
        pipe.close()


_current: Standby | None = None
_asked = False
_guard = threading.RLock()  # background views see jobs end in threads of their own


def warm_up() -> None:
    """Start a standby in the background, unless there is one, it is turned off, or the machine is short of memory."""
    global _current, _asked  # noqa: PLW0603 - one a process
    with _guard:
        _asked = True
        if _current is not None and _current.is_current():
            return
        _end_current()
        if _is_wanted():
            with contextlib.suppress(OSError):  # no process to be had: the next job will say so, if it still is so
                _current = _start()


def warm_up_again() -> None:
    """Start the next standby if this process ever asked for one; a plain script does not."""
    if _asked:
        warm_up()


def adopt(folder: Path, cwd: str, code: bytes = b"") -> subprocess.Popen[bytes] | None:
    """Hand a job to the standby.

    Args:
        folder: The job folder, absolute.
        cwd: The working folder of the job. It is no part of what must match, since the standby goes there now.
        code: Plug-ins of cells, see `cell_code.parcel`.

    Returns:
        The process, which is the job's worker from now on; None when there is none that fits.
    """
    global _current
    with _guard:
        if _current is None or not (_current.is_current() and _current.says(worker.HELD)):
            _end_current()
            return None
        try:
            _current.hand_over(folder, cwd, code)
        except OSError:
            _end_current()
            return None
        process, _current = _current.process, None
        return process


def dismiss() -> None:
    """End the standby, and start no other before `warm_up` asks for one."""
    global _asked  # noqa: PLW0603
    with _guard:
        _asked = False
        _end_current()


def is_ready() -> bool:
    """Return whether a standby of this process has done its imports."""
    with _guard:
        return _current is not None and _current.process.poll() is None and _current.says(worker.READY)


def pid() -> int | None:
    """Return the process id of the standby, or None."""
    with _guard:
        return None if _current is None else _current.process.pid


def _start() -> Standby:
    key = _key()
    # unbuffered and never blocking: its answers are looked for, not waited for
    process = worker.spawn(
        worker.STANDBY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    return Standby(process, key, time.monotonic())


def _end_current() -> None:
    global _current
    standby, _current = _current, None
    if standby is not None:
        standby.end()


def _is_wanted() -> bool:
    is_off = os.environ.get("TUNE_MAGIC_STANDBY") == "off"
    return not is_off and psutil.virtual_memory().available >= _LEAST_AVAILABLE_BYTES


def _key() -> Any:
    """Return what a fresh interpreter would be started with now: environment, Python, installed packages.

    The environment holds the switch as well: what was started before it was turned off no longer fits.
    """
    installed = Path(sysconfig.get_path("purelib")).stat().st_mtime_ns  # any package that comes or goes
    return dict(os.environ), sys.executable, fingerprint.versions(), installed
