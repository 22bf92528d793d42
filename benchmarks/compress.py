"""Each way to make MiniLM smaller: quality and size before training recovers what was lost, and after.

    python benchmarks/compress.py [--rows 600] [--learn 120] [--recover 60] [--kinds layers neurons ...]

The texts are generated: what somebody says of two things, where a negation turns a word and what follows "but" decides; three
classes. MiniLM is trained on them in full, exported, and that model is the base of every line: compressed, scored on the same
held-out rows, trained again by ``method: full``, scored again. The first line is the base trained on without compression;
``int4, rounded afterwards`` is that model rounded as `quantize_aware` rounds. Printed: held-out loss and accuracy before and
after, parameters, megabytes in float32 and packed (an estimate, see `models/compression.py`), seconds a step.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

MODEL = "minilm-l6"
RATE, BATCH = 5e-5, 16
KINDS: dict[str, dict[str, Any]] = {
    "none": {},
    "layers": {"drop_layers": 2},
    "neurons": {"prune_neurons": 0.5},
    "weights": {"prune_weights": 0.6},
    "weights by Wanda": {"prune_weights": 0.6, "prune_by": "wanda"},
    "two of four": {"prune_weights": "2:4"},
    "int8": {"quantize_aware": "int8"},
    "int4": {"quantize_aware": "int4"},
    "16 values": {"share_weights": 16},
    "tied layers": {"tie_layers": 2},
    "neurons, zeros, int4": {"prune_neurons": 0.25, "prune_weights": 0.5, "quantize_aware": "int4"},
}
THINGS = [
    "soup",
    "room",
    "screen",
    "driver",
    "story",
    "battery",
    "music",
    "service",
    "garden",
    "price",
    "seat",
    "answer",
]
WORDS = {
    "good": ["good", "lovely", "fast", "clean", "helpful", "fair"],
    "bad": ["awful", "slow", "dirty", "rude", "broken", "dull"],
    "plain": ["there", "blue", "new", "near the door", "as expected", "the same"],
}
TURNED = {"good": "bad", "bad": "good", "plain": "plain"}


def rows(count: int) -> list[dict[str, str]]:
    """Return generated rows with text and label."""
    draw, found = random.Random(0), []
    for _ in range(count):
        texts, labels = [], []
        for thing in draw.sample(THINGS, 2):
            kind, negated = draw.choice(list(WORDS)), draw.random() < 0.4
            texts.append(f"the {thing} was {'not ' if negated else ''}{draw.choice(WORDS[kind])}")
            labels.append(TURNED[kind] if negated else kind)
        way = draw.choice(["but", "although"])  # what follows "although" does not decide
        found.append({"text": f"{texts[0]} {way} {texts[1]}", "label": labels[1 if way == "but" else 0]})
    return found


def train(home: Path, name: str, recipe: dict[str, Any]) -> Any:
    """Train in this process and return the run."""
    from tune_magic.executors import local
    from tune_magic.handles import Run
    from tune_magic.recipe import build_recipe
    from tune_magic.storage import folder

    content = {"name": name, "recipe": build_recipe(recipe).given()}
    run = Run(folder.create(home / "tune_runs", "finetune", content))
    local.start(run.path, "inline")
    run.raise_for_state()
    return run


def scores(run: Any, *, first: bool) -> str:
    """Return loss and accuracy at step 0, or at the best step."""
    evaluations = run.summary().evaluations
    event = evaluations[0] if first else min((e for s, e in evaluations.items() if s), key=lambda e: float(e["loss"]))
    return f"{float(event['loss']):7.3f} {100 * event['accuracy']:5.1f} %"


def rounded(run: Any) -> str:
    """Return loss and accuracy of a run's model after rounding to 4 bits."""
    import torch

    from tune_magic.models.bound import on_grid
    from tune_magic.models.quantise import linear_layers
    from tune_magic.training.tuned import load_tuned

    tuned = load_tuned(run)
    examples = tuned.rows().held_out()
    with torch.no_grad():
        for _, layer in linear_layers(tuned.model):
            layer.weight.copy_(on_grid(layer.weight, 4))
        states = tuned.engine().states(examples[:])
        loss = float(tuned.objective.score_sum(states)) / len(examples)
        right = float((states.logits.argmax(-1) == states.targets).float().mean())
    return f"{loss:7.3f} {100 * right:5.1f} %"


def main() -> None:
    """Train the base, then each kind, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--learn", type=int, default=120, help="steps that train the base")
    parser.add_argument("--recover", type=int, default=60, help="steps that recover a compressed model")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    asked = parser.parse_args()
    from tune_magic.exporters.merged import MergedExporter
    from tune_magic.training.tuned import load_tuned
    from tune_magic.worker import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        data, base = home / "rows.jsonl", home / "base"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows(asked.rows)))
        usual = {
            "data": {"train": str(data), "held_out": 0.25}, "method": {"name": "full"}, "learning_rate": RATE,
            "batch_size": BATCH, "max_length": 64, "dtype": "float32",
        }  # fmt: skip
        learned = train(
            home, "base", {**usual, "model": MODEL, "max_steps": asked.learn, "eval": {"steps": asked.learn}}
        )
        base.mkdir()
        MergedExporter().write(base, load_tuned(learned), None)
        print(f"{'':24}{'before':>16}{'after':>18}{'parameters':>14}{'float32':>10}{'packed':>10}{'a step':>9}")
        for kind in asked.kinds:
            steps = {"max_steps": asked.recover, "eval": {"steps": asked.recover // 2}}
            run = train(home, kind, {**usual, "model": str(base), "compress": KINDS[kind], **steps})
            plan, times = run.summary().plan, [event["seconds"] for event in run.summary().steps.values()]
            parameters = plan["parameters"]
            size = plan.get("compress", {}).get(
                "after", {"distinct": parameters, "packed_bytes": 4 * parameters, "parameters": parameters}
            )
            print(
                f"{kind:24}{scores(run, first=True):>16}{scores(run, first=False):>18}{size['distinct'] / 1e6:12.1f} M"
                f"{4 * size['parameters'] / 1e6:7.0f} MB{size['packed_bytes'] / 1e6:7.0f} MB{statistics.median(times):7.2f} s",
                flush=True,
            )  # fmt: skip
            if kind == "none":
                print(f"{'int4, rounded afterwards':24}{'':16}{rounded(run):>18}", flush=True)


if __name__ == "__main__":
    main()
