"""A general set, to see what a model forgets: everyday questions with answers to choose among, and English prose.

The questions are made here, always the same ones; the prose is the reference manual that comes with Python.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_CHOICES = 4
_OF_EACH = 12  # questions of a kind
_PARAGRAPHS = 32
_LEAST_CHARACTERS, _MOST_CHARACTERS = 240, 700
_CODE = ("::", ">>>", "--", "==", "http", "`", "|", "...", "[")

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December",
)  # fmt: skip
_CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Germany": "Berlin", "Egypt": "Cairo",
    "Greece": "Athens", "Austria": "Vienna", "Portugal": "Lisbon", "Russia": "Moscow", "Ireland": "Dublin", "Cuba": "Havana",
}  # fmt: skip
_OPPOSITES = {
    "hot": "cold", "big": "small", "early": "late", "empty": "full", "wet": "dry", "heavy": "light", "old": "new",
    "rich": "poor", "open": "closed", "loud": "quiet", "fast": "slow", "strong": "weak",
}  # fmt: skip
_KINDS = {
    "an animal": ("horse", "rabbit", "eagle"), "a fruit": ("apple", "banana", "cherry"), "a colour": ("green", "purple", "yellow"),
    "a metal": ("iron", "copper", "silver"), "a tool": ("hammer", "saw", "drill"), "a musical instrument": ("piano", "violin", "flute"),
}  # fmt: skip
_PAST = {
    "go": "went", "see": "saw", "eat": "ate", "write": "wrote", "take": "took", "run": "ran", "buy": "bought",
    "think": "thought", "swim": "swam", "break": "broke", "give": "gave", "know": "knew",
}  # fmt: skip
_PLACES = {
    "a fish": "in water", "a patient": "in a hospital", "a pilot": "in an aeroplane", "a pupil": "at a school",
    "a judge": "in a court", "a farmer": "on a farm", "a star": "in the sky", "a loaf of bread": "in a bakery",
    "a lion": "in a zoo", "a book": "in a library", "a goalkeeper": "on a football pitch", "a sailor": "on a ship",
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question with answers to choose among.

    Attributes:
        kind: What it asks for, for people to read.
        text: The question.
        choices: The answers.
        right: Number of the right one.
    """

    kind: str
    text: str
    choices: tuple[str, ...]
    right: int


def questions() -> list[Question]:
    """Return the questions, those of a kind together, the same ones each time."""
    draw = np.random.default_rng(0)
    kinds = (_sums, _successors, _pairs_of_words, _members)
    return [question for kind in kinds for question in kind(draw)]


def paragraphs() -> list[str]:
    """Return paragraphs of prose of some 60 to 120 words, from all over the manual of this Python."""
    from pydoc_data.topics import topics

    parts = (" ".join(part.split()) for name in sorted(topics) for part in topics[name].split("\n\n"))
    prose = dict.fromkeys(part for part in parts if _is_prose(part))
    chosen = np.linspace(0, len(prose) - 1, _PARAGRAPHS).astype(int)
    return [list(prose)[place] for place in dict.fromkeys(chosen.tolist())]


def _is_prose(text: str) -> bool:
    is_fit = _LEAST_CHARACTERS <= len(text) <= _MOST_CHARACTERS and text[0].isupper() and text.endswith(".")
    return is_fit and not any(mark in text for mark in _CODE)


def _asked(draw: np.random.Generator, kind: str, text: str, right: str, others: Sequence[str]) -> Question:
    """Return a question whose answers are in a drawn order."""
    wrong = [other for other in dict.fromkeys(others) if other != right]
    drawn = [wrong[place] for place in draw.choice(len(wrong), _CHOICES - 1, replace=False)]
    choices = [right, *drawn]
    order = draw.permutation(_CHOICES).tolist()
    return Question(kind, text, tuple(choices[place] for place in order), order.index(0))


def _sums(draw: np.random.Generator) -> Iterator[Question]:
    for number in range(_OF_EACH):
        a, b = (int(value) for value in draw.integers(2, 10 if number < _OF_EACH // 2 else 40, 2))
        near = [str(a + b + off) for off in (-10, -2, -1, 1, 2, 10)]
        yield _asked(draw, "sums", f"What is {a} plus {b}?", str(a + b), near)


def _successors(draw: np.random.Generator) -> Iterator[Question]:
    for names, what in ((_DAYS, "day"), (_MONTHS, "month")):
        for before, after in itertools.islice(itertools.pairwise(names), _OF_EACH // 2):
            yield _asked(
                draw, f"{what}s", f"Which {what} comes after {before}?", after, [n for n in names if n != before]
            )


def _pairs_of_words(draw: np.random.Generator) -> Iterator[Question]:
    asked = (
        ("capitals", "What is the capital of {}?", _CAPITALS),
        ("opposites", "What is the opposite of “{}”?", _OPPOSITES),
        ("past tense", "What is the past tense of “{}”?", _PAST),
        ("places", "Where do you usually find {}?", _PLACES),
    )
    for kind, text, pairs in asked:
        for given, right in pairs.items():
            yield _asked(draw, kind, text.format(given), right, list(pairs.values()))


def _members(draw: np.random.Generator) -> Iterator[Question]:
    for kind, members in _KINDS.items():
        others = [name for other, names in _KINDS.items() if other != kind for name in names]
        for right in members[: _OF_EACH // 6]:
            yield _asked(draw, "kinds of things", f"Which of these is {kind}?", right, others)
