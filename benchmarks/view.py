"""What the live view costs a run: frames are drawn in every other window of a few seconds, in one and the same run.

    python benchmarks/view.py [--steps 160]

SmolLM2 with LoRA, two short rows a step, trained by a worker; this process draws its frames as a kernel does, at most two
a second with curve and gauges, or sleeps. Steps are sorted by the window they ran in. Printed: seconds a token with the
view on and off, their ratio, and the frames drawn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

MODEL = "smollm2-135m-instruct"
WINDOW_S = 4.0


class Screen:
    """Counts what would be sent to the front end."""

    is_text = False
    frames = 0

    def update(self, bundle: dict) -> None:
        """Take a frame."""
        self.frames += bool(bundle["text/html"])


def write_rows(path: Path) -> None:
    """Write generated rows."""
    draw = np.random.default_rng(0)
    words = np.array(["order", "late", "kettle", "refund", "please", "again", "invoice", "thanks"])
    rows = [
        {"prompt": " ".join(draw.choice(words, 20)), "completion": " ".join(draw.choice(words, 10))} for _ in range(64)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(steps: int = 160) -> None:
    """Print the table."""
    from tune_magic.executors import local
    from tune_magic.follow import Painter
    from tune_magic.handles import Run
    from tune_magic.recipe import build_recipe
    from tune_magic.storage import folder

    screen, windows = Screen(), []
    with tempfile.TemporaryDirectory() as name:
        write_rows(Path(name) / "rows.jsonl")
        recipe = build_recipe({
            "model": MODEL, "data": {"train": str(Path(name) / "rows.jsonl"), "held_out": 0}, "batch_size": 2,
            "max_steps": steps, "save_steps": steps,
        })  # fmt: skip
        run = Run(folder.create(Path(name) / "runs", "finetune", {"name": "viewed", "recipe": recipe.given()}))
        local.start(run.path)
        painter = Painter(run, screen)
        while run.is_live or run.is_coming_up:
            is_on, end = len(windows) % 2 == 0, time.time() + WINDOW_S
            windows.append((time.time(), end, is_on))
            while time.time() < end:
                if is_on:
                    painter.paint()
                time.sleep(0.1)
        run.raise_for_state()
        found: dict[bool, list[float]] = {True: [], False: []}
        for event in list(run.events("step"))[5:]:
            began = event["t"] - event["seconds"]
            for start, end, is_on in windows:
                if start <= began and event["t"] <= end:
                    found[is_on].append(event["seconds"] / event["tokens"])
    on, off = (statistics.mean(found[side]) for side in (True, False))
    print("| view | ms a token | steps |\n|---|---|---|")
    print(f"| on | {1000 * on:.2f} | {len(found[True])} |\n| off | {1000 * off:.2f} | {len(found[False])} |")
    print(
        f"\non / off: {on / off:.3f}, medians {statistics.median(found[True]) / statistics.median(found[False]):.3f}; {screen.frames} frames"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=160)
    main(parser.parse_args().steps)
