"""The process that works: ``python -m tune_magic.worker JOB_DIR``, or ``--standby`` to wait for a job.

It takes the folder's lock, opens the log, obeys requests and signals, does one job, writes the last state, and exits.
A standby first imports what jobs need, and reads which job it is from standard input; `executors.standby` is the other
end of that pipe.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tune_magic import cell_code, collector, files, plugins, secrets
from tune_magic.errors import LockedError, TuneError
from tune_magic.storage import places, queue
from tune_magic.storage.control import Control, StopRequested
from tune_magic.storage.events import EventLog
from tune_magic.storage.folder import RunFolder
from tune_magic.storage.lock import Lock

Job = Callable[[RunFolder, EventLog, Control], dict[str, Any]]

STANDBY = "--standby"
HELD, READY = b"held\n", b"ready\n"  # what a standby says: it is the one of its user; its imports are done
# Threads that wait for each other sleep. By default they spin, and where anything else wants a core (the kernel, a
# browser) a product of matrices then takes ten times as long or more; on a quiet machine there is no difference.
# glibc before 2.38 gives a freed block of an aligned size back to its next asker only when the crumbs beside it were
# merged with it, which its caches for small blocks prevent: a step then took half as much memory again.
_SETTINGS = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0",
}
_IDLE_S = 15 * 60.0
_LOCK_WAIT_S = 30.0  # the standby of a kernel that was just restarted notices its end only after its imports
_LOCK_POLL_S = 0.2
_IMPORTS = (
    "torch", "transformers", "tune_magic.models.lean_peft", "accelerate", "safetensors.torch",
    "tune_magic.training.job", "tune_magic.evaluation.job", "tune_magic.exporters.job",
    # what a first step would still import, found by comparing sys.modules after a real run
    "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama", "transformers.models.bert.modeling_bert",
    "peft.utils.transformers_weight_conversion", "torch.profiler",
    "tune_magic.methods.lora", "tune_magic.objectives.sft", "tune_magic.objectives.classify",
)  # fmt: skip


def spawn(argument: str, **streams: Any) -> subprocess.Popen[bytes]:
    """Start ``python -m tune_magic.worker ARGUMENT`` in a session of its own.

    Interrupts and shutdowns of the kernel never reach it, and the whole group can be killed by the process's number.

    Args:
        argument: A job folder, or `STANDBY`.
        **streams: As for `subprocess.Popen`.
    """
    return subprocess.Popen(
        _command(argument),
        start_new_session=True,
        env={**_SETTINGS, **os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"},
        **streams,
    )


def _command(argument: str) -> list[str]:
    return [sys.executable, "-P", "-m", "tune_magic.worker", argument]  # -P: no code from the working folder


def work(path: Path, *, is_worker: bool = False) -> int:
    """Do the job of a folder and return the exit code: 0 finished or stopped, 1 failed, 3 already running.

    Args:
        path: The job folder.
        is_worker: Whether this process is the job's own; otherwise it is somebody's kernel or test.
    """
    run = RunFolder(path)
    try:
        lock = Lock(run.path / "owner.lock")
    except LockedError as error:
        print(f"{error}", file=sys.stderr, flush=True)  # noqa: T201 - this is the worker's log
        return 3
    with lock, EventLog(run.path / "events.jsonl") as log:
        files.sweep(run.path)
        control = Control(run.path, log.attempt, is_worker=is_worker)
        with control.signals():
            log.append("state", state="starting", pid=os.getpid())
            outcome = _outcome(run, log, control, is_worker=is_worker)
            log.append("state", **outcome)
    return 1 if outcome["state"] == "failed" else 0


def _outcome(run: RunFolder, log: EventLog, control: Control, *, is_worker: bool) -> dict[str, Any]:
    """Run the job; whatever it raises becomes the fields of the last state event."""
    try:
        if is_worker:
            _receive(run)
        with queue.turn(run, log, control) if run.kind == "finetune" else contextlib.nullcontext():
            return _job(run.kind)(run, log, control)
    except StopRequested:
        return {"state": "stopped"}
    except TuneError as error:
        _print_trace()
        cause = f"{type(error.__cause__).__name__}: {error.__cause__}" if error.__cause__ else None
        return {"state": "failed", "error": error.message, "hint": error.hint, "cause": cause}
    except Exception as error:  # noqa: BLE001 - the last place that can still tell the user
        _print_trace()
        by = plugins.blame(error)
        return {
            "state": "failed",
            "error": f"{f'In {by}: ' if by else ''}{type(error).__name__}: {error}",
            "hint": None,
            "traceback": traceback.format_exc(),
        }


def _receive(run: RunFolder) -> None:
    """Take what is sent through standard input: a token's line, where the job has one, then plug-ins of cells."""
    needs_token = bool(run.info.get("options", {}).get("needs_token"))
    if not (needs_token or cell_code.needed(run)):
        return
    content = _rest_of_input()
    if needs_token:
        line, _, content = content.partition(b"\n")
        secrets.keep(line.decode())
    cell_code.receive(run, content)


def _print_trace() -> None:
    """Write the exception at hand to the worker's log."""
    print(secrets.hide(traceback.format_exc()), file=sys.stderr, flush=True)  # noqa: T201 - this is the worker's log


_JOBS = {  # by kind of folder, what does it: a module and its function
    "finetune": "tune_magic.training.job:finetune",
    "plan": "tune_magic.training.job:dry_run",
    "find_lr": "tune_magic.training.rate_search:find_lr",
    "merge": "tune_magic.training.merging:merge",
    "data": "tune_magic.training.inspection:inspect",
    "sizes": "tune_magic.training.sizes:sizes",
    "evaluate": "tune_magic.evaluation.job:evaluate",
    "chat": "tune_magic.evaluation.chat:chat",
    "export": "tune_magic.exporters.job:export",
    "serve": "tune_magic.serving.job:serve",
}


@collector.off()
def _job(kind: str) -> Job:
    """Import what the kind of job needs, and no more."""
    if kind not in _JOBS:
        raise TuneError(f"There is no job `{kind}`.", hint="Was this folder written by a newer tune_magic?")
    module, _, function = _JOBS[kind].partition(":")
    job: Job = getattr(importlib.import_module(module), function)
    return job


def quiet_libraries() -> None:
    """One display only: silence the progress bars of the libraries below us, and their telemetry."""
    for name, value in {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
    }.items():
        os.environ.setdefault(name, value)
    # bitsandbytes, which PEFT imports, says on some processors that a faster kernel could be fetched; we never call it
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def idle_limit_s() -> float:
    """Return after how many seconds without a job a standby ends; a test sets fewer."""
    return float(os.environ.get("TUNE_MAGIC_STANDBY_IDLE_S", _IDLE_S))


def stand_by() -> int:
    """Import what jobs need, wait for one on standard input, and do it.

    Nothing is computed and no GPU is touched before there is a job. The end of the pipe means that nobody will send
    one: the kernel is gone.

    Returns:
        The exit code of the job; 0 when none came, or another standby of this user is there.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    deadline = time.monotonic() + idle_limit_s()
    answers = _divert_output()
    lock = _only_standby()
    if lock is None:
        return 0
    with lock:  # given up as soon as there is a job: a worker is no standby, and the next may come
        _say(answers, HELD)
        has_imports = _import_libraries()
        _say(answers, READY)
        job = _next_job(deadline)
    os.close(answers)
    if job is None:
        return 0
    _become_worker(Path(job["folder"]), job["cwd"])
    if not has_imports:  # half-imported libraries fail in misleading ways: begin anew, with the same process id
        os.execv(sys.executable, _command(job["folder"]))  # noqa: S606
    return work(Path(job["folder"]), is_worker=True)


def _divert_output() -> int:
    """Return a descriptor for answers, and let what libraries print go nowhere."""
    answers, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    return answers


def _say(answers: int, word: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):  # handed a job already, or the kernel is gone: `_next_job` will know
        os.write(answers, word)


def _only_standby() -> Lock | None:
    """Return the lock that one standby of this user holds; None when another keeps it or the kernel is gone."""
    files.make_folder(places.cache_folder())
    deadline = time.monotonic() + _LOCK_WAIT_S
    while time.monotonic() < deadline:
        try:
            return Lock(places.cache_folder() / "standby.lock")
        except LockedError:
            if select.select([0], [], [], _LOCK_POLL_S)[0]:  # no job is sent before `HELD`, so this is the pipe's end
                return None
    return None


@collector.off()
def _import_libraries() -> bool:
    """Import what jobs need and return whether all of it could be."""
    try:
        for name in _IMPORTS:
            importlib.import_module(name)
    except Exception:  # noqa: BLE001 - whatever it is, the job meets it again, with its own log to tell
        return False
    return True


def _next_job(deadline: float) -> dict[str, Any] | None:
    """Return the job on standard input; None at its end, or when none has come by `deadline`.

    Nothing beyond its line is read: what follows is code of cells, for whoever does the job.
    """
    line = b""
    while not line.endswith(b"\n"):
        remaining_s = max(0.0, deadline - time.monotonic())
        piece = os.read(0, 1) if select.select([0], [], [], remaining_s)[0] else b""
        if not piece:
            return None
        line += piece
    return dict(json.loads(line))


def _become_worker(folder: Path, cwd: str) -> None:
    """Take the working folder and the output that a worker of this job is started with."""
    os.chdir(cwd)
    log = files.open_append(folder / "worker.log")
    for target in (1, 2):
        os.dup2(log, target)
    os.close(log)


def _rest_of_input() -> bytes:
    """Return what standard input still holds, and leave it empty."""
    pieces = []
    while piece := os.read(0, 1 << 20):
        pieces.append(piece)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return b"".join(pieces)


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(stand_by() if sys.argv[1] == STANDBY else work(Path(sys.argv[1]), is_worker=True))
