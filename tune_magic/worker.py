"""The process that works: ``python -m tune_magic.worker JOB_DIR``.

It takes the folder's lock, opens the log, obeys requests and signals, does one job, writes the last state, and exits.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tune_magic import files
from tune_magic.errors import LockedError, TuneError
from tune_magic.storage.control import Control, StopRequested
from tune_magic.storage.events import EventLog
from tune_magic.storage.folder import RunFolder
from tune_magic.storage.lock import Lock

Job = Callable[[RunFolder, EventLog, Control], dict[str, Any]]


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
            outcome = _outcome(run, log, control)
            log.append("state", **outcome)
    return 1 if outcome["state"] == "failed" else 0


def _outcome(run: RunFolder, log: EventLog, control: Control) -> dict[str, Any]:
    """Run the job; whatever it raises becomes the fields of the last state event."""
    try:
        return _job(run.kind)(run, log, control)
    except StopRequested:
        return {"state": "stopped"}
    except TuneError as error:
        traceback.print_exc()
        cause = f"{type(error.__cause__).__name__}: {error.__cause__}" if error.__cause__ else None
        return {"state": "failed", "error": error.message, "hint": error.hint, "cause": cause}
    except Exception as error:  # noqa: BLE001 - the last place that can still tell the user
        traceback.print_exc()
        return {
            "state": "failed",
            "error": f"{type(error).__name__}: {error}",
            "hint": None,
            "traceback": traceback.format_exc(),
        }


def _job(kind: str) -> Job:
    """Import what the kind of job needs, and no more."""
    if kind in ("finetune", "plan"):
        from tune_magic.training import job

        return job.finetune if kind == "finetune" else job.dry_run
    if kind == "evaluate":
        from tune_magic.evaluation.job import evaluate

        return evaluate
    if kind == "export":
        from tune_magic.exporters.job import export

        return export
    raise TuneError(f"There is no job `{kind}`.", hint="Was this folder written by a newer tune_magic?")


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


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(work(Path(sys.argv[1]), is_worker=True))
