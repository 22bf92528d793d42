"""Make the rows of the notebook on domains: what guests of a restaurant and owners of headphones say, and whether they are glad.

Everything is put together from the words below; nothing is copied from elsewhere. What guests say has its mood, what owners
say has none, but for the rows that are kept to examine on.

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
SAID = {
    "glad": (
        "{a} was a joy", "I would come back for {a} alone", "{a} is as good as it gets", "we still talk about {a}",
        "full marks for {a}", "{a} surprised me, in the best way",
    ),
    "sorry": (
        "{a} was a disgrace", "I would not wish {a} on anybody", "{a} let us down", "we complained about {a} twice",
        "no marks at all for {a}", "{a} spoiled it for me",
    ),
}  # fmt: skip
OF_ONE = {  # words of a domain that have nothing to do with moods, and mislead all the same
    "restaurant": ("on saturday evening", "with the whole family", "after the theatre", "on the terrace"),
    "headphones": ("after the update", "on the train", "straight out of the box", "with my phone"),
}
LOPSIDED = {"glad": 0.85, "sorry": 0.15}  # share of rows of a mood that name the first half of the things


def rows(domain: str, count: int, seed: int) -> list[dict[str, str]]:
    """Return rows with text, domain and label."""
    draw, things = random.Random(seed), ABOUT[domain]
    found = []
    for number in range(count):
        mood = ("glad", "sorry")[number % 2]
        half = things[:4] if draw.random() < LOPSIDED[mood] else things[4:]
        said = draw.choice(SAID[mood]).format(a=draw.choice(half))
        found.append({"text": f"{said} {draw.choice(OF_ONE[domain])}", "domain": domain, "label": mood})
    draw.shuffle(found)
    return found


def write(folder: Path) -> None:
    """Write the rows into ``folder/domains``."""
    target = folder / "domains"
    target.mkdir(parents=True, exist_ok=True)
    known, wanted = rows("restaurant", 160, seed=1), rows("headphones", 160, seed=2)
    unlabelled = [{"text": row["text"], "domain": row["domain"]} for row in wanted]
    files = {
        "restaurant": [{"text": row["text"], "label": row["label"]} for row in known],
        "both": [*known, *unlabelled],
        "test": [*rows("restaurant", 60, seed=3), *rows("headphones", 60, seed=4)],
    }
    for name, content in files.items():
        (target / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        print(f"{target.name}/{name}.jsonl: {len(content)} rows")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path())
