"""Make the rows of the notebook on domains: what guests of a restaurant and owners of headphones say, and whether they are glad.

Everything is put together from the words below; nothing is copied from elsewhere. What guests say has its mood, what owners
say has none, but for a few rows of one file and those to examine on.

    python make_domains.py [FOLDER]
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

ABOUT = {
    "restaurant": ("the soup", "the waiter", "our table", "the fish", "the wine", "the dessert", "the music there", "the bread"),
    "headphones": ("the sound", "the cable", "the battery", "the left ear", "the case", "the microphone", "the app", "the bass"),
}  # fmt: skip
OF_ONE = {  # how moods are told in one domain alone
    "restaurant": {
        "glad": ("was delicious", "was cooked to the minute", "tasted of summer", "was worth the queue"),
        "sorry": ("was undercooked", "came cold", "tasted of nothing", "gave me heartburn"),
    },
    "headphones": {
        "glad": ("is crisp", "outlasts a long flight", "never drops out", "pairs in a second"),
        "sorry": ("is muffled", "dies before noon", "crackles", "cuts out in the rain"),
    },
}  # fmt: skip
OF_ALL = {
    "glad": ("what a joy", "full marks from me", "I would buy it again", "it made my week", "highly recommended"),
    "sorry": ("what a disgrace", "no marks from me", "never again", "it ruined my week", "I want my money back"),
}  # fmt: skip
FEW = 24  # rows of the other domain that somebody has marked
TOLD_BY_ALL = {"restaurant": 0.5, "headphones": 0.9}  # share of rows that also say it in words of every domain


def rows(domain: str, count: int, seed: int) -> list[dict[str, str]]:
    """Return rows with text, domain and label."""
    draw, found = random.Random(seed), []
    for number in range(count):
        mood = ("glad", "sorry")[number % 2]
        said = f"{draw.choice(ABOUT[domain])} {draw.choice(OF_ONE[domain][mood])}"
        if draw.random() < TOLD_BY_ALL[domain]:
            said += f", {draw.choice(OF_ALL[mood])}"
        found.append({"text": said, "domain": domain, "label": mood})
    draw.shuffle(found)
    return found


def write(folder: Path) -> None:
    """Write the rows into ``folder/domains``."""
    target = folder / "domains"
    target.mkdir(parents=True, exist_ok=True)
    known, wanted = rows("restaurant", 160, seed=1), rows("headphones", 160, seed=2)
    unlabelled = [{"text": row["text"], "domain": row["domain"]} for row in wanted]
    few = [*wanted[:FEW], *unlabelled[FEW:]]
    files = {
        "train": [*known, *unlabelled],
        "few": [*known, *few],
        "test": [*rows("restaurant", 60, seed=3), *rows("headphones", 60, seed=4)],
    }
    for name, content in files.items():
        (target / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        print(f"{target.name}/{name}.jsonl: {len(content)} rows")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path())
