"""Make the files of the data notebook: what a small shop has lying about, in many formats and with the usual flaws.

Everything is put together from the words below, so nothing is copied from elsewhere; addresses, numbers and keys are made up.

    python make_shop.py [FOLDER]
"""

from __future__ import annotations

import csv
import json
import random
import sys
from pathlib import Path

THINGS = (
    "kettle", "lamp", "rug", "teapot", "mirror", "stool", "blanket", "vase", "clock", "shelf", "basket", "candle", "tray",
    "cushion", "ladder", "bucket", "broom", "curtain", "desk", "hammock",
)  # fmt: skip
QUESTIONS = {
    "Does the {t} come in green?": "Yes: the {t} comes in green, white and grey.",
    "How long does delivery of a {t} to the islands take?": "A {t} reaches the islands within eight days.",
    "May I bring back a {t} that I have used once?": "Of course. A {t} may be brought back within thirty days.",
    "Is there a spare part for the handle of my {t}?": "There is; ask for part {n} of the {t} at the counter.",
    "What do I clean the {t} with?": "A damp cloth and a little soap are enough for the {t}.",
}
SYLLABLES = ("skor", "vel", "und", "brak", "mar", "tis", "hol", "fen", "gru", "wick", "ost", "lin")
ARTICLES = {
    "What is the {a}?": "The {a} is our {t} of ash wood.",
    "Where do I find the {a}?": "The {a} stands in aisle {n}, behind the {t}s.",
    "How long is the {a} guaranteed?": "We guarantee the {a} for {n} years.",
    "Who makes the {a}?": "The {a} is made in our own workshop, as every {t} is.",
}
TERMS = (
    "Whatever you bought here may come back within thirty days, used or not, as long as the box and the receipt are with it. "
    "We pay the money back the way it was paid, the same day at the counter, within a week by post. Lamps with a broken bulb "
    "are changed at once. Rugs and curtains that were cut to length stay with you."
)
PRAISE = (
    "I love the {t}, it looks wonderful in the hall", "the {t} arrived early and works perfectly",
    "a lovely {t}, well made and worth every penny", "my mother wants the same {t} now, what better praise",
)  # fmt: skip
BLAME = (
    "the {t} broke on the second day and nobody answers", "this {t} smells odd and the colour is wrong",
    "I waited a month for a {t} with a scratch", "a flimsy {t}, I am sending it back",
)  # fmt: skip


def questions() -> list[dict[str, str]]:
    """Return a question and its answer for each thing and kind of question."""
    return [
        {"question": ask.format(t=thing), "answer": say.format(t=thing, n=100 + number)}
        for number, thing in enumerate(THINGS)
        for ask, say in QUESTIONS.items()
    ]


def flawed(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return rows with what real exports have: copies, near copies, contradictions, garbled letters, things to keep secret."""
    answer = "Please write to {}, or ring +49 30 901820."
    secret = "sk-" + "".join(f"{number:02x}" for number in range(12, 28))
    return [
        *rows, rows[3], rows[8],
        {"question": "What are the terms of return?", "answer": TERMS},
        {"question": "What are your terms of return?", "answer": TERMS},
        {**rows[30], "answer": "No, never."},
        {"question": "Who answers about invoices?", "answer": answer.format("ada.lovelace@example.org")},
        {"question": "How does the till reach the stock server?", "answer": f"With the key {secret}, as ever."},
        {"question": "Do you have a cafÃ© in the shop?", "answer": "Yes, the cafÃ© is on the first floor, voilÃ\xa0."},
    ]  # fmt: skip


def write(folder: Path) -> None:
    """Write the files."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(1)
    rows = flawed(questions())
    with (folder / "answers.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["question", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    chats = [
        {"conversations": [
            {"from": "human", "value": one["question"]}, {"from": "gpt", "value": one["answer"]},
            {"from": "human", "value": "Thanks! " + two["question"]}, {"from": "gpt", "value": two["answer"]},
        ], "system": "You work at the counter of a shop. Be brief."}
        for one, two in zip(questions()[::2], questions()[1::2], strict=True)
    ]  # fmt: skip
    lines(folder / "chats.jsonl", chats)
    tree = []
    for number, row in enumerate(questions()[:30]):
        ask, good, poor = f"q{number}", f"g{number}", f"p{number}"
        tree += [
            {"message_id": ask, "parent_id": None, "role": "prompter", "text": "Hi all! " + row["question"]},
            {"message_id": good, "parent_id": ask, "role": "assistant", "text": row["answer"]},
            {"message_id": poor, "parent_id": ask, "role": "assistant", "text": "Let me see. " + row["answer"]},
        ]
    lines(folder / "forum.jsonl", tree)
    lines(
        folder / "better.jsonl",
        [{"prompt": r["question"], "chosen": r["answer"], "rejected": "No idea."} for r in questions()],
    )
    reviews = [
        {"review": text.format(t=thing), "sentiment": mood, "customer": f"c{draw.randrange(25)}"}
        for thing in THINGS
        for mood, texts, count in (("good", PRAISE, 4), ("bad", BLAME, 1))
        for text in draw.sample(texts, count)
    ]
    draw.shuffle(reviews)
    with (folder / "reviews.tsv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["review", "sentiment", "customer"], delimiter="\t")
        writer.writeheader()
        writer.writerows(reviews)
    notes = [f"About the {thing}.\nIt stands in aisle {number}." for number, thing in enumerate(THINGS)]
    (folder / "notes.txt").write_text("\n\n".join(notes) + "\n", encoding="utf-8")
    names = ["".join(draw.sample(SYLLABLES, 4)).capitalize() for _ in THINGS]
    articles = [
        {"prompt": ask.format(a=name), "completion": say.format(a=name, t=thing, n=2 + number)}
        for number, (name, thing) in enumerate(zip(names, THINGS, strict=True))
        for ask, say in ARTICLES.items()
    ]
    lines(folder / "articles.jsonl", articles)
    broken = [json.dumps({"prompt": r["question"], "completion": r["answer"]}) for r in questions()]
    broken[4], broken[17] = broken[4][:30], json.dumps({"prompt": "only half of a row"})
    (folder / "broken.jsonl").write_text("\n".join(broken) + "\n", encoding="utf-8")
    synonyms = {"broke": "cracked", "odd": "strange", "month": "long time", "flimsy": "shaky, fragile", "colour": "shade",
                "lovely": "charming, fine", "wonderful": "splendid", "early": "soon"}  # fmt: skip
    (folder / "synonyms.tsv").write_text("".join(f"{word}\t{others}\n" for word, others in synonyms.items()))


def lines(path: Path, rows: list[dict[str, object]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    where = Path(sys.argv[1] if len(sys.argv) > 1 else "shop")
    write(where)
    for path in sorted(where.iterdir()):
        print(f"{path}: {len(path.read_text(encoding='utf-8').splitlines())} lines")
