"""LoRA fine-tuning of SmolLM2: our engine, TRL's SFTTrainer and a plain padded loop, step by step in turns.

    python benchmarks/sft.py [--shared none quarter half] [--steps 6] [--sides ours plain trl]

The rows are generated: 60 to 140 tokens of their own, the last two fifths trained, behind a prompt that all rows share
and that is none, a quarter or half of all tokens. Every side trains the same rows in the same order from the same
weights in float32: r = 16 on all linear layers, 8 rows a step, AdamW, gradients clipped at 1. TRL runs at its best
settings on a CPU: no gradient checkpointing, rows that are tokenised already. Each step of a side follows the same step
of the others. Printed for each: median seconds a step, the ratio of the steps pair by pair, peak memory above the loaded
model, and the largest difference of a loss. ``limit`` is what the frozen layers' products of our step would take at the
speed of this machine's own matrix product, measured in the same turns.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import statistics
import time

import numpy as np
from turns import answer, asked, take_turns

MODEL = "smollm2-135m-instruct"
SHARED_TOKENS = {"none": 0, "quarter": 33, "half": 100}
OWN_TOKENS = (60, 140)
BATCH, RANK, RATE = 8, 16, 5e-4
SIDES = ("ours", "plain", "trl")


def rows(shared: str, count: int):
    """Return (tokens, weights) of generated rows."""
    draw = np.random.default_rng(0)
    prompt = draw.integers(20, 40_000, SHARED_TOKENS[shared])
    found = []
    for _ in range(count):
        own = draw.integers(20, 40_000, draw.integers(OWN_TOKENS[0], OWN_TOKENS[1] + 1))
        weights = np.zeros(len(prompt) + len(own), dtype=np.float32)
        weights[-int(0.4 * len(own)) :] = 1
        found.append((np.concatenate([prompt, own]).astype(np.int32), weights))
    return found


def load_model():
    """Return SmolLM2 in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    from tune_magic.models.find import find_model
    from tune_magic.models.load import local_folder
    from tune_magic.worker import quiet_libraries

    quiet_libraries()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(local_folder(find_model(MODEL)), dtype=torch.float32)


def lora_by_peft(model):
    """Return the model with LoRA as PEFT makes it, the same matrices on every side."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def trainable(model):
    """Return the parameters that are trained."""
    return [p for p in model.parameters() if p.requires_grad]


def stepper(model, loss_of, data):
    """Return a function that does the next step and returns its loss."""
    import torch

    optimizer = torch.optim.AdamW(trainable(model), lr=RATE, weight_decay=0.0, fused=True)
    batches = (data[first : first + BATCH] for first in range(0, len(data), BATCH))

    def step() -> float:
        loss = loss_of(next(batches))
        torch.nn.utils.clip_grad_norm_(trainable(model), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def step_in_turns(model, loss_of, data) -> None:
    """Serve a side that is a loss and a plain loop."""
    from tune_magic.training.memory import peak_rss

    step, before = stepper(model, loss_of, data), peak_rss()
    print("ready", flush=True)
    while asked():
        started = time.perf_counter()
        loss = step()
        answer([time.perf_counter() - started, loss])
    answer(peak_rss() - before)


def ours():
    """Return model and loss of the engine, as a run uses it."""
    import torch

    from tune_magic.data.example import Example, Segment
    from tune_magic.methods.lora import Lora, LoraOptions
    from tune_magic.objectives.sft import SFT
    from tune_magic.recipe.schema import Recipe
    from tune_magic.training.engine import TokenEngine

    method = Lora(LoraOptions(r=RANK, lora_alpha=2 * RANK))
    model = load_model()
    torch.manual_seed(0)
    model = method.apply(model, "CAUSAL_LM").train()
    budget = Recipe.model_fields["microbatch_tokens"].default
    engine = TokenEngine(model, method, dtype=torch.float32, max_tokens=budget)

    def loss_of(batch):
        examples = [Example(Segment(*row)) for row in batch]
        weight, total = sum(e.weight for e in examples), 0.0
        for microbatch in engine.microbatches(examples):
            loss = SFT().loss_sum(engine.states(microbatch)) / weight
            loss.backward()
            total += float(loss.detach())
        return total

    return model, loss_of


def plain():
    """Return model and loss of what a tutorial does: pad, all logits, cross-entropy."""
    import torch

    model = lora_by_peft(load_model()).train()

    def loss_of(batch):
        width = max(len(tokens) for tokens, _ in batch)
        ids, labels = torch.zeros(len(batch), width, dtype=torch.long), torch.full((len(batch), width), -100)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        for i, (tokens, weights) in enumerate(batch):
            ids[i, : len(tokens)] = torch.from_numpy(tokens)
            labels[i, : len(tokens)] = torch.from_numpy(np.where(weights > 0, tokens, -100))
            mask[i, : len(tokens)] = 1
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        return float(loss.detach())

    return model, loss_of


def trl(data) -> None:
    """TRL's SFTTrainer."""
    import tempfile

    import datasets
    import torch
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from tune_magic.models.find import find_model
    from tune_magic.models.load import local_folder
    from tune_magic.training.memory import peak_rss

    model = lora_by_peft(load_model())
    table = datasets.Dataset.from_dict({
        "input_ids": [tokens.tolist() for tokens, _ in data],
        "labels": [np.where(weights > 0, tokens, -100).tolist() for tokens, weights in data],
    })  # fmt: skip
    seen = {}

    class InTurns(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if not asked():
                raise Finished
            seen["started"] = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            answer([time.perf_counter() - seen["started"], seen["loss"]])

    class Trainer(SFTTrainer):
        def compute_loss(self, *args, **options):
            found = super().compute_loss(*args, **options)
            seen["loss"] = float((found[0] if isinstance(found, tuple) else found).detach())
            return found

        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            folder, per_device_train_batch_size=BATCH, learning_rate=RATE, lr_scheduler_type="constant",
            gradient_checkpointing=False, bf16=False, max_length=None, optim="adamw_torch_fused", weight_decay=0.0,
            report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True, num_train_epochs=1,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(local_folder(find_model(MODEL)))
        trainer = Trainer(
            model=model, args=config, train_dataset=table, processing_class=tokenizer, callbacks=[InTurns()]
        )
        before = peak_rss()
        print("ready", flush=True)
        with contextlib.suppress(Finished):
            trainer.train()
        answer(peak_rss() - before)


LOOPS = {"ours": ours, "plain": plain}


class Finished(Exception):
    """No turn is left."""


def limit(data) -> None:
    """The machine's matrix product at the shape of the model's widest layer."""
    import torch

    a, b = torch.randn(512, 576), torch.randn(1536, 576)
    print("ready", flush=True)
    while asked():
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < 0.5:
            a @ b.t()
            count += 1
        answer(2 * 512 * 576 * 1536 * count / (time.perf_counter() - started))
    answer(0)


def serve(side: str, data) -> None:
    """Be one side."""
    if side in LOOPS:
        step_in_turns(*LOOPS[side](), data)
    else:
        {"trl": trl, "limit": limit}[side](data)


def measure(shared: str, sides, steps: int) -> None:
    """Print the table of one data set."""
    arguments = {
        side: [__file__, "--serve", side, "--shared", shared, "--steps", str(steps)] for side in (*sides, "limit")
    }
    answers, peaks = take_turns(arguments, steps)
    speed = statistics.median(answers.pop("limit"))
    base = answers["ours"]
    print(
        f"\nshared prompt: {shared}\n\n| side | seconds a step | ours is faster | peak, GB | ours / it | loss difference |"
    )
    print("|---|---|---|---|---|---|")
    for side in sides:
        seconds = statistics.median(s for s, _ in answers[side][1:])  # the first step pays for set-up
        ratio = statistics.median(s / o for (s, _), (o, _) in zip(answers[side][1:], base[1:], strict=True))
        difference = max(abs(a[1] - b[1]) for a, b in zip(answers[side], base, strict=True))
        share = peaks["ours"] / peaks[side]
        print(f"| {side} | {seconds:.2f} | {ratio:.2f} | {peaks[side] / 1e9:.2f} | {share:.2f} | {difference:.1e} |")
    print(f"| limit | {floor_seconds(shared, steps, speed):.2f} | | | | {speed / 1e9:.0f} GFLOP/s |", flush=True)


def floor_seconds(shared: str, steps: int, speed: float) -> float:
    """Seconds of our step's products alone: two passes over each frozen layer's weights and over the head's."""
    layers = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    head = 576 * 49152
    data = rows(shared, steps * BATCH)
    own = sum(len(tokens) - SHARED_TOKENS[shared] for tokens, _ in data) / steps + SHARED_TOKENS[shared]
    targets = sum(float(weights.sum()) for _, weights in data) / steps
    return 4 * (own * layers + targets * head) / speed


def main(shared=tuple(SHARED_TOKENS), steps: int = 6, sides=SIDES) -> None:
    """Print the tables."""
    if "trl" in sides and importlib.util.find_spec("trl") is None:
        print("TRL is not installed and left out: pip install 'tune-magic[bench]'")
        sides = tuple(side for side in sides if side != "trl")
    for name in shared:
        measure(name, sides, steps)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", nargs="+", choices=SHARED_TOKENS, default=list(SHARED_TOKENS))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--serve", choices=(*SIDES, "limit"))
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, rows(options.shared[0], (options.steps + 1) * BATCH))
    else:
        main(options.shared, options.steps, options.sides)
