"""A LoRA step of SmolLM2 on the tickets data: our engine against a plain padded loop with all logits.

    python benchmarks/sft_step.py [--steps 6]

Both sides train the same model on the same batches from the same weights, in turn, each in a process of its own for
its peak memory. Printed: seconds a step (median), the ratio pair by pair, peak memory, and the largest loss difference.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "example_notebooks"
SIDES = ("plain", "shared")


def serve(side: str, folder: Path, steps: int) -> None:
    """Train step by step, one for each line on standard input; answer with seconds and loss, at last the peak."""
    import time

    import torch
    from transformers import AutoModelForCausalLM

    from tune_magic.data.formats import normalise
    from tune_magic.data.read import read_rows
    from tune_magic.data.render import Renderer
    from tune_magic.methods.lora import Lora, LoraOptions
    from tune_magic.models.find import find_model
    from tune_magic.models.load import load_tokenizer, local_folder
    from tune_magic.objectives.sft import SFT
    from tune_magic.recipe.schema import DataOptions
    from tune_magic.training.engine import TokenEngine
    from tune_magic.training.memory import peak_rss
    from tune_magic.training.order import Order
    from tune_magic.worker import quiet_libraries

    quiet_libraries()
    path = local_folder(find_model("smollm2-135m-instruct"))
    data = DataOptions(train=str(folder / "train.jsonl"))
    contents = normalise(read_rows(folder / "train.jsonl"), data, "train")
    rows = Renderer(load_tokenizer(path), chat_template=True, max_length=1024).examples(contents, "train")
    torch.manual_seed(0)
    method = Lora(LoraOptions(r=16))
    model = method.apply(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), "CAUSAL_LM").train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4, fused=True)
    engine = TokenEngine(model, method, dtype=torch.float32, share_prefixes=True, max_tokens=4096)
    engine.packed = side == "shared"
    order = Order(len(rows), 8, seed=0)
    before = peak_rss()
    print("ready", flush=True)
    for step in range(1, steps + 1):
        sys.stdin.readline()
        started = time.perf_counter()
        batch = [rows[i] for i in order.rows(step)]
        loss = SFT().loss_sum(engine.states(batch)) / sum(row.weight for row in batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(json.dumps([time.perf_counter() - started, float(loss.detach())]), flush=True)
    print(json.dumps(peak_rss() - before), flush=True)


def main(steps: int = 6) -> None:
    """Print the table."""
    sys.path.insert(0, str(EXAMPLES))
    from make_tickets import write

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        processes = {
            side: subprocess.Popen(
                [sys.executable, __file__, "--serve", side, "--folder", name, "--steps", str(steps)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
            )
            for side in SIDES
        }  # fmt: skip
        for process in processes.values():
            assert process.stdout.readline() == "ready\n"
        results = {side: [] for side in SIDES}
        for _ in range(steps):
            for side, process in processes.items():
                process.stdin.write("\n")
                process.stdin.flush()
                results[side].append(json.loads(process.stdout.readline()))
        peaks = {side: json.loads(process.stdout.readline()) for side, process in processes.items()}
        for process in processes.values():
            process.communicate()
    _print(results, peaks)


def _print(results: dict[str, list], peaks: dict[str, int]) -> None:
    pairs = list(zip(results["plain"], results["shared"], strict=True))[1:]  # the first step pays for set-up
    ratio = statistics.median(plain[0] / ours[0] for plain, ours in pairs)
    difference = max(abs(a[1] - b[1]) for a, b in zip(results["plain"], results["shared"], strict=True))
    print("| side | seconds a step | peak above the loaded model, GB |")
    print("|---|---|---|")
    for side in SIDES:
        print(f"| {side} | {statistics.median(s for s, _ in results[side][1:]):.2f} | {peaks[side] / 1e9:.2f} |")
    print(
        f"\nratio {ratio:.2f}, peak memory {peaks['shared'] / peaks['plain']:.2f}, largest loss difference {difference:.1e}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--serve", choices=SIDES)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.folder, options.steps)
    else:
        main(options.steps)
