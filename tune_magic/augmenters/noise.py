"""Slips of the keyboard: letters swapped, left out, doubled, or hit beside."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from pydantic import Field

from tune_magic.augmenters.base import Augmenter
from tune_magic.recipe.schema import AugmentOptions

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_WORD = re.compile(r"[^\W\d_]{3,}")


class NoiseOptions(AugmentOptions):
    """Keys of `noise`."""

    strength: float = Field(0.1, gt=0, le=1, description="Share of the words that get a slip.")


class Noise(Augmenter):
    """Puts a slip of the keyboard into some words of a text, at least into one."""

    Options = NoiseOptions

    def change(self, texts: Sequence[str], draw: np.random.Generator, tell: Callable[[int], None]) -> list[str | None]:
        """Return each text with slips, None where it has no word of three letters."""
        found = []
        for number, text in enumerate(texts, start=1):
            found.append(self._slipped(text, draw))
            tell(number)
        return found

    def _slipped(self, text: str, draw: np.random.Generator) -> str | None:
        words = list(_WORD.finditer(text))
        if not words:
            return None
        chosen = draw.random(len(words)) < self.options.strength
        if not chosen.any():
            chosen[draw.integers(len(words))] = True
        parts, end = [], 0
        for word in (word for word, slips in zip(words, chosen, strict=True) if slips):
            parts += [text[end : word.start()], _slip(word[0], draw)]
            end = word.end()
        return "".join([*parts, text[end:]])


def _slip(word: str, draw: np.random.Generator) -> str:
    """Return a word with one slip."""
    place = int(draw.integers(len(word) - 1))
    before, letter, after = word[:place], word[place], word[place + 1 :]
    match int(draw.integers(4)):
        case 0 if letter != after[0]:
            return f"{before}{after[0]}{letter}{after[1:]}"
        case 1:
            return before + after
        case 2:
            return f"{before}{letter}{letter}{after}"
        case _:
            return f"{before}{_neighbour(letter, draw)}{after}"


def _neighbour(letter: str, draw: np.random.Generator) -> str:
    """Return a letter beside another on the keyboard; one that is not on it is doubled."""
    row = next((row for row in _ROWS if letter.lower() in row), None)
    if row is None:
        return letter * 2
    place = row.index(letter.lower())
    beside = [row[near] for near in (place - 1, place + 1) if 0 <= near < len(row)]
    hit = beside[int(draw.integers(len(beside)))]
    return hit.upper() if letter.isupper() else hit
