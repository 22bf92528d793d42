"""From a JSON-lines file to tokens and labels: our reader and `datasets.map` with a process for each core, in turns.

    python benchmarks/tokenise.py [--rows 1000000] [--rounds 1]

The rows are generated: 12 words of prompt and 4 of completion. Both sides read the file and make, for each row, its tokens
and what is trained; ours also checks each row and keeps where it stands for error messages. Each side runs in a process of
its own, its imports not counted. Printed: seconds, their ratio, what the process's peak grew by, and the seconds of the same
once more, when both find what they kept.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

MODEL = "smollm2-135m-instruct"
SIDES = ("ours", "datasets")


def write_rows(path: Path, count: int) -> None:
    """Write generated rows."""
    draw = np.random.default_rng(0)
    words = np.array(["order", "late", "kettle", "refund", "please", "again", "invoice", "thanks"])
    with path.open("w") as stream:
        for _ in range(count):
            prompt, completion = " ".join(draw.choice(words, 12)), " ".join(draw.choice(words, 4))
            stream.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")


def serve(side: str, path: Path) -> None:
    """Be one side and print its seconds and bytes."""
    from tune_magic.data import kept
    from tune_magic.models.find import find_model
    from tune_magic.models.load import load_tokenizer, local_folder
    from tune_magic.training.memory import peak_rss
    from tune_magic.worker import quiet_libraries

    quiet_libraries()
    kept.folder = lambda: path.parent / "kept"
    tokenizer = load_tokenizer(local_folder(find_model(MODEL)))
    if side == "datasets":
        import datasets

        datasets.disable_progress_bars()
    before, started = peak_rss(), time.perf_counter()
    count = ours(path, tokenizer) if side == "ours" else theirs(path, tokenizer)
    seconds, grown, started = time.perf_counter() - started, peak_rss() - before, time.perf_counter()
    assert count == (ours(path, tokenizer) if side == "ours" else theirs(path, tokenizer))
    print(json.dumps([seconds, grown, time.perf_counter() - started]), flush=True)


def ours(path: Path, tokenizer: object) -> int:
    """Read and encode the rows as a run does, and return how many there are."""
    from tune_magic.recipe import build_recipe
    from tune_magic.training.prepare import Rows

    recipe = build_recipe({"model": MODEL, "data": {"train": str(path), "held_out": 0, "chat_template": False}})
    return len(Rows(recipe, path.parent, tokenizer, 1024).examples(str(path)))


def theirs(path: Path, tokenizer: object) -> int:
    """The same with `datasets`, which keeps what it made under a fingerprint of the function."""
    import datasets

    def encode(batch):
        prompts, completions = (tokenizer(batch[name])["input_ids"] for name in ("prompt", "completion"))
        completions = [[*ids, tokenizer.eos_token_id] for ids in completions]
        pairs = list(zip(prompts, completions, strict=True))
        return {"input_ids": [p + c for p, c in pairs], "labels": [[-100] * len(p) + c for p, c in pairs]}

    table = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(path.parent / "cache"))
    return len(table.map(encode, batched=True, num_proc=os.cpu_count(), remove_columns=table.column_names))


def main(rows: int = 1_000_000, rounds: int = 1) -> None:
    """Print the table."""
    found: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "rows.jsonl"
                write_rows(path, rows)
                command = [sys.executable, __file__, "--serve", side, "--path", str(path)]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                found[side].append(json.loads(output.splitlines()[-1]))
    print(f"| {rows:,} rows | seconds | ours is faster | peak, MB | again, seconds |\n|---|---|---|---|---|")
    for side in SIDES:
        seconds, peak, again = (statistics.median(column) for column in zip(*found[side], strict=True))
        ratio = statistics.median(other[0] / own[0] for other, own in zip(found[side], found["ours"], strict=True))
        print(f"| {side} | {seconds:.1f} | {ratio:.2f} | {peak / 1e6:.0f} | {again:.2f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--serve", choices=SIDES)
    parser.add_argument("--path", type=Path)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.path)
    else:
        main(options.rows, options.rounds)
