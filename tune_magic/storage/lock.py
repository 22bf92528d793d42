"""Who writes to a run: one process, or none.

The lock is POSIX `lockf` on ``owner.lock``, held for the life of the worker: the system drops it the moment the process
dies, so a dead run is never taken for a live one, whatever becomes of its process id. Two traps are kept in this file:
closing *any* descriptor of a locked file drops the lock, so a process never opens a lock file it holds, and a process
cannot see its own lock with ``F_GETLK``, so it asks the table of locks it holds first.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tune_magic import files
from tune_magic.errors import LockedError

# struct flock as the C compiler lays it out: (format, index of l_type, index of l_pid)
_FLOCK = ("@hhqqi4x", 0, 4) if sys.platform == "linux" else ("@qqihh", 3, 2)
HEARTBEAT_LIMIT_S = 60.0
_held: dict[Path, Lock] = {}


@dataclass(frozen=True)
class Holder:
    """The process that holds a run's lock; `pid` is 0 when the file system does not tell."""

    pid: int


class Lock:
    """Hold ``owner.lock`` at `path` until `release` or the end of the process.

    Raises:
        LockedError: Another process, or another lock of this one, holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        if self.path in _held:
            raise LockedError(f"This process ({os.getpid()}) already runs {self.path.parent.name}.")
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            owner = holder(path)
            name = f"process {owner.pid}" if owner else "another process"
            raise LockedError(f"{self.path.parent.name} is already running, in {name}.") from None
        _held[self.path] = self
        note = {"pid": os.getpid(), "host": socket.gethostname(), "start": round(time.time(), 3)}
        os.ftruncate(self._descriptor, 0)
        files.write_all(self._descriptor, (json.dumps(note) + "\n").encode())

    def release(self) -> None:
        """Give the lock up."""
        if _held.pop(self.path, None) is self:
            os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def holder(path: Path) -> Holder | None:
    """Return who holds the lock at `path`, or None, without ever touching the lock."""
    if path.resolve() in _held:
        return Holder(os.getpid())
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None  # no lock file: never started, or not ours to look into
    try:
        return _query(descriptor)
    except OSError:  # a file system without locks: the heartbeat is the next best witness
        heartbeat = path.with_name("heartbeat")
        fresh = heartbeat.exists() and time.time() - heartbeat.stat().st_mtime < HEARTBEAT_LIMIT_S
        return Holder(0) if fresh else None
    finally:
        os.close(descriptor)


def _query(descriptor: int) -> Holder | None:
    layout, type_index, pid_index = _FLOCK
    fields = [0] * 5
    fields[type_index] = fcntl.F_WRLCK
    answer = struct.unpack(layout, fcntl.fcntl(descriptor, fcntl.F_GETLK, struct.pack(layout, *fields)))
    return None if answer[type_index] == fcntl.F_UNLCK else Holder(int(answer[pid_index]))
