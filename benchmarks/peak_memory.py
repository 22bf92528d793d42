"""Predicted against measured peak memory, each in a process of its own.

    python benchmarks/peak_memory.py [--cases lora full]

For each recipe: the forecast a run logs in its plan before the first step (counted from the self-check's rows), the one
of ``--dry-run`` (after two dry steps), and the high-water mark of a real run of a few steps with evaluation and
checkpoint, as the system reports it when the process has ended. All are above the level after imports.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

SMOLLM2, MINILM = "smollm2-135m-instruct", "minilm-l6"
CASES = {
    "lora": {"model": SMOLLM2, "words": 60},
    "lora, long rows": {"model": SMOLLM2, "words": 300, "batch_size": 2},
    "lora, activations twice": {"model": SMOLLM2, "words": 300, "batch_size": 2, "gradient_checkpointing": True},
    "freeze, 4 layers": {"model": SMOLLM2, "words": 100, "method": {"name": "freeze", "trainable_layers": 4}},
    "full": {"model": SMOLLM2, "words": 60, "batch_size": 4, "method": "full"},
    "classify, full": {"model": MINILM, "words": 60, "method": "full", "batch_size": 32},
}  # fmt: skip
STEPS = 5


def write_rows(path: Path, model: str, words: int, count: int = 64) -> None:
    """Write generated rows of about `words` words."""
    draw = np.random.default_rng(0)
    vocabulary = ["order", "invoice", "late", "broken", "kettle", "refund", "please", "again", "when", "thanks"]

    def text(most: int) -> str:
        return " ".join(draw.choice(vocabulary, draw.integers(most // 2, most + 1)))

    rows = [
        {"prompt": text(words), "completion": text(words // 2)} if model == SMOLLM2
        else {"text": text(words), "label": f"class {number % 4}"}
        for number in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(folder: Path, kind: str, recipe: dict) -> tuple[dict, int]:
    """Do a job in a process of its own; return its plan and result, and the system's high-water mark in bytes."""
    from tune_magic.recipe import build_recipe
    from tune_magic.storage.folder import RunFolder, create
    from tune_magic.worker import spawn

    job = RunFolder(create(folder / "runs", kind, {"name": kind, "recipe": build_recipe(recipe).given()}))
    process = spawn(str(job.path))
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{kind} failed: {job.path / 'worker.log'} {list(job.events())[-1]}")
    summary = job.summary()
    return {**summary.plan["memory"], **summary.result}, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(name: str) -> None:
    """Print the row of one case."""
    case = dict(CASES[name])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_rows(folder / "rows.jsonl", case["model"], case.pop("words"))
        recipe = {
            "data": {"train": str(folder / "rows.jsonl"), "held_out": 0.1}, "max_steps": STEPS,
            "eval": {"steps": STEPS, "max_new_tokens": 16}, **case,
        }  # fmt: skip
        dry, _ = run(folder, "plan", recipe)
        real, peak = run(folder, "finetune", recipe)
    counted, calibrated = real["peak_bytes"] - real["at_start"], dry["peak_bytes"] - dry["at_start"]
    measured = peak - real["at_start"]
    print(
        f"| {name} | {counted / 1e9:.2f} | {calibrated / 1e9:.2f} | {measured / 1e9:.2f} | {counted / measured - 1:+.1%} "
        f"| {calibrated / measured - 1:+.1%} |", flush=True,
    )  # fmt: skip


def main(cases=tuple(CASES)) -> None:
    """Print the table."""
    print("| recipe | forecast, GB | after two dry steps, GB | measured, GB | forecast off by | after dry steps |")
    print("|---|---|---|---|---|---|")
    for name in cases:
        measure(name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    main(parser.parse_args().cases)
