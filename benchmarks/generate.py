"""Answers for metrics: our generation, the model's own one by one, and naive batches, in turns over the same prompts.

    python benchmarks/generate.py [--prompts 32] [--new-tokens 32] [--sentence] [--rounds 3]

The prompts are generated: questions of 5 to 60 words behind a system prompt that all share, in the order of a file, which
is no order at all. Every side is SmolLM2 in float32, greedy, with keys and values kept. ``batches`` are eight prompts as
they come, padded to the longest; ``sorted`` are 32 of like length. With ``--sentence`` an answer ends with its first
sentence, so that some are much shorter than others. Printed: median seconds of a pass, the ratio pass by pass, and whether the texts are the
same as one by one.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from turns import answer, asked, take_turns

MODEL = "smollm2-135m-instruct"
SIDES = ("ours", "sorted", "batches", "single")
SIZES = {"sorted": 32, "batches": 8, "single": 1}
SYSTEM = (
    "You answer customers of a shop for garden tools. Be brief and kind. Name the order number where there is one, never "
    "promise a date, and say who will write next. Answer in one or two sentences of plain English."
)
WORDS = [
    "order",
    "parcel",
    "spade",
    "rake",
    "late",
    "broken",
    "handle",
    "refund",
    "invoice",
    "colour",
    "garden",
    "shed",
    "delivery",
    "van",
    "street",
    "Monday",
    "number",
    "please",
    "where",
    "when",
    "why",
    "replace",
    "return",
    "missing",
    "box",
    "wet",
    "green",
    "small",
    "large",
    "price",
    "twice",
    "email",
    "address",
]


def prompts(count: int, tokenizer) -> list[np.ndarray]:
    """Return token ids of generated chats."""
    draw = np.random.default_rng(0)
    found = []
    for _ in range(count):
        words = " ".join(draw.choice(WORDS, draw.integers(5, 61)))
        chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{words}?"}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        found.append(np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32))
    return found


def one_pass(side: str, model, tokenizer, rows, new_tokens: int) -> list[str]:
    """Return the answers of a side."""
    import torch

    from tune_magic.models.generate import end_tokens, generate

    if side == "ours":
        return generate(model, tokenizer, rows, max_new_tokens=new_tokens)
    size, order = SIZES[side], list(range(len(rows)))
    if side == "sorted":
        order.sort(key=lambda index: len(rows[index]))
    tokenizer.padding_side = "left"
    found = [""] * len(rows)
    for start in range(0, len(rows), size):
        chosen = order[start : start + size]
        batch = tokenizer.pad({"input_ids": [rows[index].tolist() for index in chosen]}, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(
                **batch, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id,
                eos_token_id=end_tokens(model, tokenizer),
            )  # fmt: skip
        own = out[:, batch["input_ids"].shape[1] :].tolist()
        for index, ids in zip(chosen, own, strict=True):
            found[index] = tokenizer.decode(ids, skip_special_tokens=True)
    return found


def play(side: str, count: int, new_tokens: int, *, sentence: bool) -> None:
    """Be one side."""
    import torch
    from sft import load_model

    from tune_magic.models.find import find_model
    from tune_magic.models.load import load_tokenizer, local_folder

    torch.manual_seed(0)
    model = load_model().eval()
    tokenizer = load_tokenizer(local_folder(find_model(MODEL)))
    if sentence:
        ends = [number for token, number in tokenizer.get_vocab().items() if set(token) & set(".!?")]
        model.generation_config.eos_token_id = [model.generation_config.eos_token_id, *ends]
    rows = prompts(count, tokenizer)
    one_pass(side, model, tokenizer, rows[:2], 2)
    print("ready", flush=True)
    texts: list[str] = []
    while asked():
        started = time.perf_counter()
        texts = one_pass(side, model, tokenizer, rows, new_tokens)
        answer(time.perf_counter() - started)
    answer(texts)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--sentence", action="store_true", help="answers end with their first sentence")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.side:
        play(options.side, options.prompts, options.new_tokens, sentence=options.sentence)
        return
    sizes = ["--prompts", str(options.prompts), "--new-tokens", str(options.new_tokens)]
    sizes += ["--sentence"] if options.sentence else []
    commands = {side: [__file__, "--side", side, *sizes] for side in options.sides}
    seconds, texts = take_turns(commands, options.rounds)
    print(f"{options.prompts} prompts, at most {options.new_tokens} new tokens each\n")
    print(f"{'side':10}{'seconds':>9}{'against ours':>15}{'same texts as single':>23}")
    for side in options.sides:
        ratios = [theirs / ours for theirs, ours in zip(seconds[side], seconds["ours"], strict=True)]
        same = sum(a == b for a, b in zip(texts[side], texts[options.sides[-1]], strict=True))
        print(
            f"{side:10}{statistics.median(seconds[side]):9.2f}{statistics.median(ratios):14.2f}x{same:>17} of {options.prompts}"
        )


if __name__ == "__main__":
    main()
