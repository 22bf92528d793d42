"""A few rows of each format of texts, which a tiny model can learn from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_COLOURS = ("red", "green", "blue", "black")
Row = dict[str, Any]


def _messages(item: str, colour: str, _: str) -> Row:
    turns = (("system", "Name the colour."), ("user", f"{item} is {colour}"), ("assistant", colour))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


_MAKERS: dict[str, Callable[[str, str, str], Row]] = {
    "messages": _messages,
    "prompt_completion": lambda item, colour, _: {"prompt": f"{item} is {colour}", "completion": colour},
    "instruction": lambda item, colour, _: {"instruction": f"{item} is {colour}", "output": colour},
    "question_answer": lambda item, colour, _: {"question": f"{item} is {colour}", "answer": colour},
    "source_target": lambda item, colour, _: {"source": f"{item} is {colour}", "target": colour},
    "text": lambda item, colour, _: {"text": f"{item} is {colour}, as it always was"},
    "text_label": lambda item, colour, _: {"text": f"{colour} {item}", "label": colour},
    "pair_label": lambda item, colour, other: {"sentence1": f"{colour} {item}", "sentence2": item, "label": colour},
    "preference": lambda item, colour, other: {"prompt": f"{item} is {colour}", "chosen": colour, "rejected": other},
    "rated": lambda item, colour, other: {
        "prompt": f"{item} is {colour}",
        "completion": colour if len(item) % 2 else other,
        "label": bool(len(item) % 2),
    },
    "scored_pairs": lambda item, colour, other: {
        "sentence1": f"{colour} {item}",
        "sentence2": colour,
        "score": len(colour) / 5,
    },
    "text_labels": lambda item, colour, other: {"text": f"{colour} {item}", "labels": sorted({colour, "thing"})},
    "text_score": lambda item, colour, _: {"text": f"{'a ' * len(colour)}end", "score": len(colour) / 2 + 0.25},
    "text_domain": lambda item, colour, other: {
        "text": f"{colour} {item}",
        "domain": "b" if len(item) % 2 else "a",
        "label": colour,
    },
    "text_task": lambda item, colour, _: {"text": f"{colour} {item}", "task": "colour", "label": colour},
    "extractive": lambda item, colour, _: {
        "question": f"{item}?",
        "context": f"it is {colour} now",
        "answers": [colour],
    },
    "pairs": lambda item, colour, _: {"anchor": f"{colour} {item}", "positive": f"it is {colour} {item}"},
    "tokens_tags": lambda item, colour, other: {"tokens": [colour, *item.split()], "tags": ["B-COLOUR", "O", "O"]},
}


def rows_of(formats: tuple[str, ...], count: int = 32) -> list[Row]:
    """Return rows of the first of these formats that there are samples of.

    Raises:
        ValueError: There are none: a test class names `rows` of its own then.
    """
    known = [name for name in formats if name in _MAKERS]
    if not known:
        raise ValueError(f"there are no sample rows of {', '.join(formats)}: set `rows` on the test class")
    make = _MAKERS[known[0]]
    return [make(f"item {i}", _COLOURS[i % 4], _COLOURS[(i + 1) % 4]) for i in range(count)]
