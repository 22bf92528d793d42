"""Start a job on this machine: in a worker process, or, for debugging and tests, in this one."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

from tune_magic import cell_code, files, worker
from tune_magic.executors import standby
from tune_magic.storage import queue
from tune_magic.storage.folder import RunFolder

_started: dict[Path, subprocess.Popen[bytes]] = {}


def start(folder: Path, executor: str = "worker", *, token: str | None = None) -> None:
    """Start the job in `folder`: by the standby where one fits, else in a fresh interpreter.

    Either leads a session of its own: interrupts and shutdowns of the kernel never reach it. Plug-ins of cells are sent
    through its standard input, and before them a token where the job ``needs_token``: other users of the machine can
    read what a process is called with, and whoever comes later what is in a folder.

    Args:
        folder: The job folder.
        executor: ``worker`` for a process of its own, ``inline`` for this one.
        token: What it is sent.

    Raises:
        TuneError: The job needs a plug-in of a cell that is not here, or that cannot be sent.
    """
    if executor == "inline":
        cell_code.require(RunFolder(folder))
        try:
            worker.work(folder)
        finally:
            _let_go()
        return
    code = cell_code.parcel(RunFolder(folder))
    if token is not None:
        code = token.encode() + b"\n" + code
    reap()
    folder = folder.resolve()
    cwd = _working_folder(folder)
    queue.announce(folder)
    log = files.open_append(folder / "worker.log")
    try:
        process = standby.adopt(folder, cwd, code)
        if process is None:
            stdin = subprocess.PIPE if code else subprocess.DEVNULL
            process = worker.spawn(str(folder), stdin=stdin, stdout=log, stderr=log, cwd=cwd)
            if process.stdin is not None:
                standby.send(process.stdin, code)
        _started[folder] = process
    finally:
        os.close(log)


def _let_go() -> None:
    """Give back what a run in this process held: its model hangs in cycles, and in frames of what went wrong."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _working_folder(folder: Path) -> str:
    """Return the folder that a job's relative paths mean: where it was first started, while that is there."""
    first = RunFolder(folder).info.get("cwd")
    return str(first) if first and Path(first).is_dir() else str(Path.cwd())


def exit_code(folder: Path) -> int | None:
    """Return the exit code of a worker this process started, None while it runs or when it was another's.

    Negative numbers are signals: -9 is a kill, by a user or by a machine out of memory.
    """
    process = _started.get(folder.resolve())
    return None if process is None else process.poll()


def is_starting(folder: Path) -> bool:
    """Return whether this process started a worker there that has not ended."""
    process = _started.get(folder.resolve())
    return process is not None and process.poll() is None


def kill(folder: Path) -> bool:
    """Kill a worker this process started, with its children, whether or not it holds the lock yet.

    Returns:
        Whether there was one.
    """
    process = _started.get(folder.resolve())
    if process is None or process.poll() is not None:
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True


def reap() -> None:
    """Collect workers that have ended, so that none stays a zombie of this process."""
    for process in list(_started.values()):  # a background view may see its job end meanwhile
        process.poll()


def job_ended() -> None:
    """Collect workers that have ended; with the last of them gone, make ready for the next job.

    Call when a job is seen to end, not before: two interpreters at once would share its memory and its cores.
    """
    reap()
    if all(process.returncode is not None for process in list(_started.values())):
        standby.warm_up_again()
