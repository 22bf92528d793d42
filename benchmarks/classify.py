"""Fine-tuning MiniLM to classify: our engine and the Transformers Trainer, step by step in turns.

    python benchmarks/classify.py [--ways full frozen] [--steps 12]

The rows are generated: 8 to 64 tokens, 4 classes, 32 rows a step, in float32 and without dropout, so that losses can be
compared. Both sides train the same rows in the same order from the same weights with fused AdamW and clipping at 1; the
Trainer pads each batch to its longest row. ``full`` trains every parameter; ``frozen`` the pooler and the head, and there
our steps are those from the second epoch on, when what the frozen layers give is read from disk. Printed: median seconds
a step, the ratio of the steps pair by pair, peak memory above the loaded model, the largest difference of a loss.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from turns import answer, asked, take_turns

MODEL = "minilm-l6"
CLASSES = ["billing", "delivery", "returns", "other"]
BATCH, RATE, TOKENS = 32, 1e-4, (8, 64)
WAYS, SIDES = ("full", "frozen"), ("ours", "trainer")


class Finished(Exception):
    """No turn is left."""


def rows(count: int):
    """Return (tokens, class number) of generated rows."""
    draw = np.random.default_rng(0)
    return [
        (np.concatenate([[101], draw.integers(1000, 30_000, draw.integers(*TOKENS)), [102]]).astype(np.int32), int(draw.integers(4)))
        for _ in range(count)
    ]  # fmt: skip


def load(way: str):
    """Return (method, model), the same weights on every side."""
    import torch

    from tune_magic.methods.freeze import Freeze, FreezeOptions
    from tune_magic.methods.full import Full, FullOptions
    from tune_magic.models.find import find_model
    from tune_magic.models.load import load_classifier, local_folder
    from tune_magic.worker import quiet_libraries

    quiet_libraries()
    torch.manual_seed(0)
    method = Full(FullOptions()) if way == "full" else Freeze(FreezeOptions())
    model = load_classifier(local_folder(find_model(MODEL)), torch.float32, CLASSES)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return method, method.apply(model, "SEQ_CLS")


def ours(way: str, data) -> None:
    """Be our side: the engine as a run uses it."""
    import torch

    from tune_magic.data.example import Example, Segment
    from tune_magic.data.table import TableWriter
    from tune_magic.objectives.classify import Classify
    from tune_magic.recipe.schema import Recipe
    from tune_magic.training import trunk
    from tune_magic.training.memory import peak_rss
    from tune_magic.training.rows import RowEngine

    method, model = load(way)
    engine = RowEngine(model, method, dtype=torch.float32, max_tokens=Recipe.model_fields["microbatch_tokens"].default)
    objective = Classify(classes=CLASSES)
    with tempfile.TemporaryDirectory() as folder, TableWriter(Path(folder)) as writer:
        writer.add([Example(Segment(tokens, np.zeros(len(tokens), np.float32)), label=label) for tokens, label in data])
        examples = writer.table()
        if way == "frozen":
            engine.trunk = trunk.Trunk(engine, trunk.plan(engine, [examples], Path(folder)).depth)
            engine.trunk.fill([examples], Path(folder), lambda done: None)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
    before, first = peak_rss(), 0
    print("ready", flush=True)
    while asked():
        started, loss = time.perf_counter(), 0.0
        method.to_training(model)
        batch = examples[first : first + BATCH]
        for microbatch in engine.microbatches(batch):
            part = objective.loss_sum(engine.states(microbatch)) / len(batch)
            part.backward()
            loss += float(part.detach())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        answer([time.perf_counter() - started, loss])
        first += BATCH
    answer(peak_rss() - before)


def trainer(way: str, data) -> None:
    """Be the Transformers Trainer."""
    import datasets
    import torch
    from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

    from tune_magic.models.find import find_model
    from tune_magic.models.load import load_tokenizer, local_folder
    from tune_magic.training.memory import peak_rss

    _, model = load(way)
    table = datasets.Dataset.from_dict({
        "input_ids": [tokens.tolist() for tokens, _ in data],
        "attention_mask": [[1] * len(tokens) for tokens, _ in data],
        "labels": [label for _, label in data],
    })  # fmt: skip
    seen = {}

    class InTurns(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if not asked():
                raise Finished
            seen["started"] = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            answer([time.perf_counter() - seen["started"], seen["loss"]])

    class Ordered(Trainer):
        def compute_loss(self, *args, **options):
            found = super().compute_loss(*args, **options)
            seen["loss"] = float((found[0] if isinstance(found, tuple) else found).detach())
            return found

        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=BATCH, learning_rate=RATE, lr_scheduler_type="constant", weight_decay=0.0,
            optim="adamw_torch_fused", use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no",
            disable_tqdm=True, num_train_epochs=1,
        )  # fmt: skip
        collate = DataCollatorWithPadding(load_tokenizer(local_folder(find_model(MODEL))))
        worker = Ordered(model=model, args=arguments, train_dataset=table, data_collator=collate, callbacks=[InTurns()])
        before = peak_rss()
        print("ready", flush=True)
        with contextlib.suppress(Finished):
            worker.train()
        answer(peak_rss() - before)


def measure(way: str, steps: int) -> None:
    """Print the table of one way of training."""
    arguments = {side: [__file__, "--serve", side, "--ways", way, "--steps", str(steps)] for side in SIDES}
    answers, peaks = take_turns(arguments, steps)
    base = answers["ours"]
    print(
        f"\n{way}\n\n| side | milliseconds a step | ours is faster | peak, MB | loss difference |\n|---|---|---|---|---|"
    )
    for side in SIDES:
        pairs = list(zip(answers[side][2:], base[2:], strict=True))  # the first steps pay for set-up
        ms = 1000 * statistics.median(theirs[0] for theirs, _ in pairs)
        ratio = statistics.median(theirs[0] / own[0] for theirs, own in pairs)
        difference = max(abs(a[1] - b[1]) for a, b in zip(answers[side], base, strict=True))
        print(f"| {side} | {ms:.1f} | {ratio:.2f} | {peaks[side] / 1e6:.0f} | {difference:.1e} |", flush=True)


def main(ways=WAYS, steps: int = 12) -> None:
    """Print the tables."""
    for way in ways:
        measure(way, steps)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--serve", choices=SIDES)
    options = parser.parse_args()
    if options.serve:
        {"ours": ours, "trainer": trainer}[options.serve](options.ways[0], rows((options.steps + 1) * BATCH))
    else:
        main(options.ways, options.steps)
