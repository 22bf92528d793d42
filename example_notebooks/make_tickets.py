"""Make the `tickets` data set: customer messages and the JSON a support desk wants from them.

    python make_tickets.py [FOLDER] [--train 720] [--held-out 60] [--seed 0]

Writes ``train.jsonl`` and ``held_out.jsonl``. Each row is a chat: a system prompt, a customer's message, and the answer
``{"intent": ..., "product": ..., "urgency": ...}``. No product, no phrasing of a request and no phrasing of an urgency
in the held-out file occurs in training, so a model that memorises fails.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path

SYSTEM = (
    "You read messages from customers of a home goods shop. Answer with one line of JSON and nothing else: "
    '{"intent": "...", "product": "...", "urgency": "..."}. '
    "Intents: refund, exchange, delivery, repair, question, cancel. Urgencies: low, normal, high."
)

# For each intent: phrasings to train on, phrasings to hold out.
REQUESTS = {
    "refund": (
        [
            "I want my money back for the {p}.",
            "Please refund the {p} I bought.",
            "The {p} is not what I hoped for and I would like a refund.",
            "I am sending the {p} back, please return the payment.",
            "How do I get a refund for my {p}?",
            "The {p} broke after one day. Give me my money back.",
            "I returned the {p} and still wait for the refund.",
            "Kindly pay me back for the {p}, it does not fit.",
            "My {p} was a disappointment, I expect the full amount back.",
        ],
        [
            "I no longer want the {p} and ask for my money back.",
            "Could I have a refund for the {p} that I ordered?",
            "The {p} is poor quality. Please pay the money back.",
        ],
    ),
    "exchange": (
        [
            "Can I exchange the {p} for another colour?",
            "I would like to swap my {p} for a larger one.",
            "You sent the wrong {p}, please exchange it.",
            "The {p} is too small, can I change it for the next size?",
            "Please replace my {p} with the blue version.",
            "I got the {p} twice in green, swap one for white.",
            "Is it possible to exchange the {p} without the receipt?",
            "I ordered the wrong {p}. I want to change it for a different model.",
            "Could you swap the {p} for the newer one?",
        ],
        [
            "I want to exchange my {p} for a smaller one.",
            "The {p} has the wrong colour, may I swap it?",
            "Please change the {p} for a different size.",
        ],
    ),
    "delivery": (
        [
            "Where is my {p}? It should have arrived.",
            "The {p} has not been delivered yet.",
            "When will the {p} arrive?",
            "My parcel with the {p} is late.",
            "The tracking of my {p} has not moved for days.",
            "The courier left no {p} at my door.",
            "I am still waiting for the delivery of the {p}.",
            "You promised the {p} for last week and nothing came.",
            "Has my {p} been shipped?",
        ],
        [
            "The {p} did not arrive, where is the parcel?",
            "When can I expect the delivery of my {p}?",
            "I am waiting for my {p} and the tracking shows nothing.",
        ],
    ),
    "repair": (
        [
            "My {p} stopped working, can you repair it?",
            "The {p} makes a strange noise, please fix it.",
            "I need a repair for the {p}.",
            "A part of the {p} came loose, who can mend it?",
            "The {p} does not switch on any more and needs fixing.",
            "Can a technician look at my {p}?",
            "The {p} leaks, can it be repaired?",
            "One piece of my {p} snapped off. Do you fix that?",
            "Please send someone to mend the {p}.",
        ],
        [
            "The {p} is broken, can you fix it?",
            "I would like to have my {p} repaired.",
            "My {p} no longer works and needs a technician.",
        ],
    ),
    "question": (
        [
            "How do I clean the {p}?",
            "Is the {p} safe for children?",
            "What are the measures of the {p}?",
            "Does the {p} come with a guarantee?",
            "Which material is the {p} made of?",
            "Can I use the {p} outdoors?",
            "How much does the {p} weigh?",
            "Do you have instructions for the {p}?",
            "Is the {p} available in other shops?",
        ],
        [
            "How heavy is the {p}, and how do I clean it?",
            "What material is used for the {p}?",
            "Does the {p} come with instructions?",
        ],
    ),
    "cancel": (
        [
            "Please cancel my order of the {p}.",
            "I changed my mind, do not send the {p}.",
            "Stop the order for the {p}.",
            "I ordered the {p} by mistake, cancel it.",
            "Can I still cancel the {p}?",
            "Take the {p} off my order.",
            "I do not need the {p} any more, please cancel.",
            "The {p} was ordered twice, cancel one of them.",
            "Annul my purchase of the {p} before it ships.",
        ],
        [
            "I want to cancel the {p} that I ordered.",
            "Please stop my order of the {p}, I changed my mind.",
            "Cancel the {p}, I ordered it by accident.",
        ],
    ),
}
URGENCIES = {
    "high": (
        [
            "It is urgent.",
            "I need an answer today.",
            "Please hurry.",
            "This cannot wait.",
            "As soon as possible, please.",
        ],
        ["This is very urgent.", "Please answer today, it cannot wait."],
    ),
    "normal": (["", "", "Thank you.", "Kind regards.", "Thanks in advance."], ["", "Many thanks.", "Regards."]),
    "low": (
        [
            "There is no hurry.",
            "Take your time.",
            "Whenever you have a moment.",
            "It is not urgent.",
            "No rush at all.",
        ],
        ["There is no rush.", "It can wait, take your time."],
    ),
}
PRODUCTS = (
    [
        "kettle", "desk lamp", "toaster", "armchair", "bath mat", "bookshelf", "bread knife", "bucket", "candle holder",
        "carpet", "clock", "coat rack", "coffee grinder", "cushion", "cutting board", "dish rack", "doormat", "duvet",
        "fan heater", "floor lamp", "frying pan", "garden hose", "hair dryer", "hand mixer", "ironing board", "laundry bag",
        "mirror", "mug", "night light", "oven glove", "picture frame", "pillow", "plant pot", "rug", "salad bowl",
        "saucepan", "shower curtain", "side table", "soap dish", "sofa", "spice rack", "stool", "storage box", "table cloth",
        "tea pot", "towel", "tray", "umbrella", "vacuum cleaner", "vase", "waste bin", "water filter", "wine glass", "wok",
    ],
    [
        "blender", "bed frame", "curtain rail", "egg timer", "electric blanket", "fruit basket", "juicer", "kitchen scale",
        "lunch box", "microwave", "paper lantern", "pepper mill", "rice cooker", "sewing machine", "step ladder", "wardrobe",
    ],
)  # fmt: skip


def make(split: str, count: int, seed: int) -> list[dict]:
    """Return `count` chats of a split, ``train`` or ``held_out``, evenly spread over intents and urgencies."""
    part = ("train", "held_out").index(split)
    generator = random.Random(f"{seed}-{split}")
    kinds = itertools.cycle(itertools.product(REQUESTS, URGENCIES))
    rows = []
    for intent, urgency in itertools.islice(kinds, count):
        product = generator.choice(PRODUCTS[part])
        request = generator.choice(REQUESTS[intent][part]).format(p=product)
        closing = generator.choice(URGENCIES[urgency][part])
        answer = json.dumps({"intent": intent, "product": product, "urgency": urgency})
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"{request} {closing}".strip()},
            {"role": "assistant", "content": answer},
        ]
        rows.append({"messages": messages})
    generator.shuffle(rows)
    return rows


def write(folder: Path, num_train: int = 720, num_held_out: int = 60, seed: int = 0) -> None:
    """Write both splits as JSONL."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", num_train), ("held_out", num_held_out)):
        lines = "".join(json.dumps(row) + "\n" for row in make(split, count, seed))
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{folder / split}.jsonl: {count} rows")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("tickets"))
    parser.add_argument("--train", type=int, default=720)
    parser.add_argument("--held-out", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.folder, options.train, options.held_out, options.seed)
