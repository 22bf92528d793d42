"""The likeliest of several answers: ours, and one forward pass for each row and answer, in turns over the same rows.

    python benchmarks/choose.py [--prompts 12] [--choices 6] [--rounds 3]

The prompts are those of ``generate.py``; the answers are generated, 2 to 5 tokens each, the same ones for every row.
Both sides are SmolLM2 in float32. Printed: median seconds of a pass, the ratio pass by pass, and the largest difference of
a log-likelihood.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from generate import MODEL, prompts
from turns import answer, asked, take_turns

SIDES = ("ours", "each")


def tails(count: int) -> list[np.ndarray]:
    """Return token ids of the answers."""
    draw = np.random.default_rng(1)
    return [draw.integers(20, 40_000, draw.integers(2, 6)).astype(np.int32) for _ in range(count)]


def each(model, rows, answers) -> list[list[float]]:
    """Return the log-likelihood of every answer after every prompt, by a pass of its own."""
    import torch

    found = []
    for row in rows:
        found.append([])
        for tail in answers:
            ids = torch.from_numpy(np.concatenate([row, tail]).astype(np.int64))[None]
            with torch.no_grad():
                log_p = torch.log_softmax(model(input_ids=ids).logits[0, len(row) - 1 : -1].float(), -1)
            found[-1].append(float(log_p.gather(1, ids[0, len(row) :, None]).sum()))
    return found


class Side:
    """What `of_choices` asks of a tuned model."""

    def __init__(self, model) -> None:
        import torch

        from tune_magic.methods.full import Full, FullOptions
        from tune_magic.objectives.sft import SFT
        from tune_magic.training.engine import TokenEngine

        self.objective, self._dtype, self._engine = SFT(), torch.float32, TokenEngine
        self._method = Full(FullOptions())
        self._model = model.requires_grad_(False)

    def engine(self):
        """Return an engine as an evaluation has it."""
        return self._engine(self._model, self._method, dtype=self._dtype, max_tokens=MAX_TOKENS)


MAX_TOKENS = 2048


def play(side: str, num_prompts: int, num_choices: int) -> None:
    """Be one side."""
    from sft import load_model

    from tune_magic.data.example import Example, Segment
    from tune_magic.evaluation.likelihood import of_choices
    from tune_magic.models.find import find_model
    from tune_magic.models.load import load_tokenizer, local_folder

    model = load_model().eval()
    rows, answers = prompts(num_prompts, load_tokenizer(local_folder(find_model(MODEL)))), tails(num_choices)
    branches = tuple(Segment(tail, np.ones(len(tail), dtype=np.float32)) for tail in answers)
    examples = [Example(Segment(row, np.zeros(len(row), dtype=np.float32)), branches) for row in rows]
    own = Side(model)
    print("ready", flush=True)
    found: list[list[float]] = []
    while asked():
        started = time.perf_counter()
        found = of_choices(own, examples, lambda count: None) if side == "ours" else each(model, rows, answers)
        answer(time.perf_counter() - started)
    answer(found)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--choices", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.side:
        play(options.side, options.prompts, options.choices)
        return
    sizes = ["--prompts", str(options.prompts), "--choices", str(options.choices)]
    commands = {side: [__file__, "--side", side, *sizes] for side in SIDES}
    seconds, found = take_turns(commands, options.rounds)
    apart = float(np.abs(np.array(found["ours"]) - np.array(found["each"])).max())
    ratios = [theirs / ours for theirs, ours in zip(seconds["each"], seconds["ours"], strict=True)]
    print(f"{options.prompts} prompts, {options.choices} answers each\n")
    print(f"ours {statistics.median(seconds['ours']):.2f} s, one pass for each {statistics.median(seconds['each']):.2f} s: "
          f"{statistics.median(ratios):.1f}x; largest difference of a log-likelihood {apart:.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
