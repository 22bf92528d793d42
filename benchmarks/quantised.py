"""A base in float32, nf4, fp4 and int8: steps, answers, weights and peak memory, in turns.

    python benchmarks/quantised.py [--steps 4] [--tokens 24] [--sides none nf4 fp4 int8]

SmolLM2 with LoRA of rank 16 on all linear layers, 8 rows of 60 to 140 tokens a step, as in sft.py. Each side is a process
of its own that loads the model as a run does; a turn is one step and one greedy answer, after the same turn of the others.
Printed for each: bytes of the base's weights, the process's peak above its level after imports, seconds a step and tokens
a second of the answer with their ratios to float32 turn by turn, and the loss of the last step.
"""

from __future__ import annotations

import argparse
import statistics
import time

from sft import BATCH, MODEL, RANK, rows, stepper
from turns import answer, asked, take_turns

SIDES = ("none", "nf4", "fp4", "int8")


def loaded(kind: str):
    """Return the model with its adapter, and its method, as a run loads them."""
    import torch

    from tune_magic.methods.lora import Lora, LoraOptions
    from tune_magic.models.find import find_model
    from tune_magic.models.load import load_tokenizer, local_folder
    from tune_magic.objectives.sft import SFT
    from tune_magic.recipe import build_recipe
    from tune_magic.training.prepare import build_model
    from tune_magic.training.vocabulary import Vocabulary

    folder, method = local_folder(find_model(MODEL)), Lora(LoraOptions(r=RANK, lora_alpha=2 * RANK))
    tokenizer = load_tokenizer(folder)
    recipe = build_recipe({"model": MODEL, "data": "rows.jsonl", "quantization": kind, "seed": 0})
    vocabulary = Vocabulary(tokenizer, tokenizer)
    return build_model(recipe, folder, SFT(), method, torch.float32, vocabulary=vocabulary), method, tokenizer


def serve(kind: str, steps: int, tokens: int) -> None:
    """Be one side."""
    from tune_magic.worker import quiet_libraries

    quiet_libraries()
    import bitsandbytes  # noqa: F401 - for every side, so that peaks are above the same level
    import torch

    from tune_magic.data.example import Example, Segment
    from tune_magic.models.generate import generate
    from tune_magic.models.quantise import footprint
    from tune_magic.objectives.sft import SFT
    from tune_magic.training import memory
    from tune_magic.training.engine import TokenEngine

    before = memory.peak_rss()
    model, method, tokenizer = loaded(kind)
    tokenizer.eos_token_id = None  # every answer has the same length
    model.generation_config.eos_token_id = None
    engine = TokenEngine(model, method, dtype=torch.float32, max_tokens=2048)
    prompt = rows("none", 1)[0][0][:32]

    def loss_of(batch):
        examples = [Example(Segment(*row)) for row in batch]
        loss = SFT().loss_sum(engine.states(examples)) / sum(e.weight for e in examples)
        loss.backward()
        return float(loss.detach())

    step = stepper(model, loss_of, rows("none", steps * BATCH))
    print("ready", flush=True)
    while asked():
        method.to_training(model)
        started = time.perf_counter()
        loss = step()
        trained = time.perf_counter()
        model.eval()
        generate(model, tokenizer, [prompt], max_new_tokens=tokens)
        answer([trained - started, time.perf_counter() - trained, loss])
    weights = footprint(model)
    answer([weights["bytes"], memory.peak_rss() - before])


def main(sides=SIDES, steps: int = 4, tokens: int = 24) -> None:
    """Print the table."""
    options = ["--steps", str(steps), "--tokens", str(tokens)]
    answers, last = take_turns({side: [__file__, "--serve", side, *options] for side in sides}, steps)
    base = answers[sides[0]]
    print("| base | weights, MB | peak, GB | seconds a step | as long | tokens a second | as fast | last loss |")
    print("|---|---|---|---|---|---|---|---|")
    for side in sides:
        turns = answers[side][1:]  # the first pays for set-up
        step = statistics.median(seconds for seconds, _, _ in turns)
        speed = tokens / statistics.median(seconds for _, seconds, _ in turns)
        longer = statistics.median(a[0] / b[0] for a, b in zip(turns, base[1:], strict=True))
        faster = statistics.median(b[1] / a[1] for a, b in zip(turns, base[1:], strict=True))
        weights, peak = last[side]
        print(
            f"| {'float32' if side == 'none' else side} | {weights / 1e6:.0f} | {peak / 1e9:.2f} | {step:.2f} "
            f"| {longer:.2f} | {speed:.1f} | {faster:.2f} | {turns[-1][2]:.4f} |", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--serve", choices=SIDES)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.steps, arguments.tokens)
    else:
        main(tuple(arguments.sides), arguments.steps, arguments.tokens)
