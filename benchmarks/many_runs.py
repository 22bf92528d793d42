"""``%tune runs`` and finding a run by its name, with 10,000 runs in the store.

    python benchmarks/many_runs.py [--runs 10000] [--events 100]

Each run is a whole folder with `run.json` and a log of a hundred events. Printed: seconds of each, in a process that has
imported what it needs; the files are in the system's cache, as they are for whoever wrote them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import tempfile
import time
from pathlib import Path


def make_runs(root: Path, count: int, num_events: int) -> None:
    """Make one run and copy it."""
    from tune_magic.storage import folder
    from tune_magic.storage.events import EventLog

    first = folder.create(root, "finetune", {"name": "run_0", "recipe": {"model": "m", "data": {"train": "d"}}})
    with EventLog(first / "events.jsonl") as log:
        log.append("state", state="running", from_step=0)
        for step in range(1, num_events + 1):
            log.append(
                "step", step=step, loss=1.0, learning_rate=1e-4, grad_norm=1.0, tokens=500, targets=90, seconds=0.5
            )
        log.append("state", state="finished", step=num_events)
    text, log_bytes = (first / "run.json").read_text(), (first / "events.jsonl").read_bytes()
    for number in range(1, count):
        copy = root / f"20250101-{number:06d}-abcd"
        copy.mkdir()
        (copy / "run.json").write_text(text.replace("run_0", f"run_{number}"))
        (copy / "events.jsonl").write_bytes(log_bytes)


def main(count: int = 10_000, num_events: int = 100) -> None:
    """Print the table."""
    from tune_magic import commands
    from tune_magic.magics.verbs import do_verb
    from tune_magic.storage import places

    folder, before = Path(tempfile.mkdtemp()), Path.cwd()
    try:
        make_runs(folder / places.RUNS, count, num_events)
        os.chdir(folder)
        line = commands.parse(commands.COMMANDS["tune runs"], "")
        seconds = {}
        with contextlib.redirect_stdout(io.StringIO()):
            for what, do in {
                "`%tune runs`": lambda: do_verb("runs", line, None),
                "the oldest by name": lambda: places.find("run_1", [folder / places.RUNS]),
            }.items():
                started = time.perf_counter()
                do()
                seconds[what] = time.perf_counter() - started
    finally:
        os.chdir(before)
        shutil.rmtree(folder)
    print(f"| with {count:,} runs | seconds |\n|---|---|")
    for what, value in seconds.items():
        print(f"| {what} | {value:.2f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--events", type=int, default=100)
    options = parser.parse_args()
    main(options.runs, options.events)
