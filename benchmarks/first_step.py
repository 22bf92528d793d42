"""From the cell to the first training step: SmolLM2 with LoRA on 500 rows, with the standby, cold, and a plain script.

    python benchmarks/first_step.py [--rounds 3]

The clock runs from the call of `tune_magic.finetune(...)`, which is what Shift-Enter does, to the start of the first
step: for `standby` in a process whose standby is ready, for `cold` without one. The plain script is a fresh
``python script``: imports, model, tokenised rows, LoRA, the first batch of a DataLoader, up to before its forward pass.
Printed: the median seconds of each, their ratio round by round, and where the time of ours goes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "example_notebooks"
MODEL = "smollm2-135m-instruct"
NUM_ROWS = 500
SIDES = ("standby", "cold", "script")
PHASES = ("kernel", "worker comes up", "data, model, checks", "to the step")
READY_LIMIT_S = 120.0


def ours(folder: Path) -> None:
    """Call finetune as a cell does, end the run after its first step, and print the times of its phases."""
    import threading

    import tune_magic
    from tune_magic.executors import standby

    standby.warm_up()
    deadline = time.monotonic() + READY_LIMIT_S
    while standby.pid() and not standby.is_ready():
        if time.monotonic() > deadline:
            raise SystemExit("The standby does not get ready: is another one of yours there?")
        time.sleep(0.05)

    def end_after_the_first_step() -> None:
        while tune_magic.last is None or not tune_magic.last.summary().steps:
            time.sleep(0.1)
        tune_magic.last.kill()

    watcher = threading.Thread(target=end_after_the_first_step)
    called = time.time()
    watcher.start()
    try:
        tune_magic.finetune(
            model=MODEL, data={"train": str(folder / "train.jsonl"), "held_out": 0.1}, eval={"samples": 0},
            output=str(folder / "runs"), fresh=True,
        )  # fmt: skip
    except tune_magic.RunFailed:
        watcher.join()
    run = tune_magic.last
    states = {event["state"]: event["t"] for event in run.events("state")}
    first = next(run.events("step"))
    marks = [called, run.info["created"], states["starting"], states["running"], first["t"] - first["seconds"]]
    standby.dismiss()
    print(json.dumps([after - before for before, after in itertools.pairwise(marks)]), flush=True)


def script(folder: Path, model_folder: Path) -> None:
    """Do what a plain script does before its first step, and print the time of day."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.utils.rnn import pad_sequence
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    rows = [json.loads(line)["messages"] for line in (folder / "train.jsonl").read_text().splitlines()]
    dataset = []
    for messages in rows:
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        tokens = tokenizer.apply_chat_template(messages, return_dict=False)
        labels = [-100] * len(prompt) + tokens[len(prompt) :]
        dataset.append((torch.tensor(tokens[:1024]), torch.tensor(labels[:1024])))
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)

    def collate(batch):
        tokens, labels = zip(*batch, strict=True)
        return pad_sequence(tokens, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=-100)

    model.train()
    next(iter(DataLoader(dataset, batch_size=8, shuffle=True, collate_fn=collate)))
    print(json.dumps([time.time()]), flush=True)


def main(rounds: int = 3) -> None:
    """Print the tables."""
    from tune_magic.models.find import find_model
    from tune_magic.models.load import local_folder

    sys.path.insert(0, str(EXAMPLES))
    from make_tickets import make

    model_folder = local_folder(find_model(MODEL))  # a GGUF file is converted once, by whoever comes first
    results: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name:
        rows = make("train", NUM_ROWS, seed=0)
        (Path(name) / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for _ in range(rounds):
            for side in SIDES:
                results[side].append(_run(side, name, str(model_folder)))
    _print(results)


def _run(side: str, folder: str, model_folder: str) -> list[float]:
    """Return the seconds of a side's phases, from a process of its own."""
    environment = {**os.environ, "TUNE_MAGIC_STANDBY": "on" if side == "standby" else "off"}
    started = time.time()
    done = subprocess.run(
        [sys.executable, __file__, "--side", side, "--folder", folder, "--model", model_folder],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr}")
    times = json.loads(done.stdout.splitlines()[-1])
    return times if side != "script" else [times[0] - started]


def _print(results: dict[str, list[list[float]]]) -> None:
    totals = {side: [sum(times) for times in results[side]] for side in SIDES}
    print("| side | seconds to the first step | script / side |")
    print("|---|---|---|")
    for side in SIDES:
        ratio = statistics.median(plain / own for plain, own in zip(totals["script"], totals[side], strict=True))
        print(f"| {side} | {statistics.median(totals[side]):.2f} | {ratio:.2f} |")
    print(f"\n| phase | {SIDES[0]}, s | {SIDES[1]}, s |")
    print("|---|---|---|")
    for number, phase in enumerate(PHASES):
        seconds = [statistics.median(times[number] for times in results[side]) for side in SIDES[:2]]
        print(f"| {phase} | {seconds[0]:.2f} | {seconds[1]:.2f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    if options.side == "script":
        script(options.folder, options.model)
    elif options.side:
        ours(options.folder)
    else:
        main(options.rounds)
