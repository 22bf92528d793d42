"""Make the rows of the notebook on domains: what guests of a restaurant and owners of headphones say, and how they feel.

Everything is put together from the words below; nothing is copied from elsewhere. In the rows to train on guests are mostly
glad and owners mostly sorry, as happens where rows are collected; those held out and those to examine on have as many of each.

    python make_domains.py [FOLDER]
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

ABOUT = {
    "restaurant": ("the soup", "the waiter", "our table", "the fish", "the wine", "the dessert", "the menu", "the bread"),
    "headphones": ("the sound", "the cable", "the battery", "the left ear", "the case", "the microphone", "the app", "the bass"),
}  # fmt: skip
WHEN = {
    "restaurant": ("on saturday evening", "with the whole family", "after the theatre", "on the terrace"),
    "headphones": ("after the update", "on the train", "straight out of the box", "with my phone"),
}
SAID = {
    "glad": (
        "{a} was more than I hoped for", "I keep telling friends about {a}", "they know what they do, see {a}",
        "nothing to add about {a}, well done", "{a} made up for a long day", "I would take {a} again any time",
    ),
    "sorry": (
        "{a} was less than I hoped for", "I would rather not talk about {a}", "somebody should look at {a}",
        "{a} is why I want my money back", "{a} made a long day longer", "I would not take {a} again",
    ),
}  # fmt: skip
SHARE_GLAD = {"restaurant": 0.9, "headphones": 0.1}  # of the rows to train on


def rows(domain: str, count: int, share_glad: float, seed: int) -> list[dict[str, str]]:
    """Return rows with text, domain and label."""
    draw, found = random.Random(seed), []
    for number in range(count):
        mood = "glad" if number < share_glad * count else "sorry"
        said = draw.choice(SAID[mood]).format(a=draw.choice(ABOUT[domain]))
        found.append({"text": f"{said} {draw.choice(WHEN[domain])}", "domain": domain, "label": mood})
    draw.shuffle(found)
    return found


def write(folder: Path) -> None:
    """Write the rows into ``folder/domains``."""
    target = folder / "domains"
    target.mkdir(parents=True, exist_ok=True)
    seeds = iter(range(1, 9))
    files = {
        "train": [row for domain in ABOUT for row in rows(domain, 160, SHARE_GLAD[domain], next(seeds))],
        "held_out": [row for domain in ABOUT for row in rows(domain, 20, 0.5, next(seeds))],
        "test": [row for domain in ABOUT for row in rows(domain, 60, 0.5, next(seeds))],
    }
    for name, content in files.items():
        (target / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        print(f"{target.name}/{name}.jsonl: {len(content)} rows")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path())
