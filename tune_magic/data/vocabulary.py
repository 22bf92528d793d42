"""New words for a tokenizer: which words of a corpus are worth a token of their own, and what they save.

A word that comes often and is cut into many pieces costs memory and time, and its meaning is spread over tokens that
mean something else. As a token of its own it costs one embedding, which starts as the mean of its pieces' (Gee et al.
2022, arXiv:2210.06069).
"""

from __future__ import annotations

import bisect
import copy
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tune_magic import files
from tune_magic.errors import DataError, TuneError

FORMAT = 1
FILE = "vocabulary.json"
_WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*")
_SHORTEST, _LONGEST = 3, 40  # characters of a word
_SAMPLED = 2000  # texts that fertility is measured on
_WEIGHED = 4  # times as many candidates as tokens are wanted are weighed exactly
_LEAST_FOUND = 0.5  # of the words chosen, as tokens in the texts they were chosen from
_SHOWN = 8


@dataclass(frozen=True)
class NewToken:
    """A token that a tokenizer is given.

    Attributes:
        content: What it stands for, with the space before it where the tokenizer keeps spaces.
        whole_word: It is taken only between the ends of a word, in the form the tokenizer brings texts to (lower case,
            say); otherwise wherever the content stands, letter by letter.
    """

    content: str
    whole_word: bool = False


@dataclass(frozen=True)
class NewTokens:
    """What a tokenizer is extended by.

    Attributes:
        tokens: In the order they are added.
        facts: What the plan says of them, JSON-ready.
    """

    tokens: tuple[NewToken, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write them to a run folder, for `load`; without them a checkpoint means nothing."""
        content = {"format": FORMAT, "tokens": [asdict(token) for token in self.tokens], "facts": self.facts}
        files.write_json(folder / FILE, content)

    @classmethod
    def load(cls, folder: Path) -> NewTokens | None:
        """Return what `save` wrote; None where it wrote nothing.

        Raises:
            TuneError: The file is damaged.
        """
        try:
            content = json.loads((folder / FILE).read_text(encoding="utf-8"))
            return cls(tuple(NewToken(**token) for token in content["tokens"]), content["facts"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TuneError(f"The run's {FILE} cannot be read.") from error


def extended(tokenizer: Any, tokens: Sequence[NewToken]) -> Any:
    """Return a tokenizer that knows these tokens too; their numbers follow the ones it has."""
    from tokenizers import AddedToken

    extended = copy.deepcopy(tokenizer)
    extended.add_tokens([
        AddedToken(token.content, single_word=token.whole_word, normalized=token.whole_word) for token in tokens
    ])  # fmt: skip
    return extended


def choose(tokenizer: Any, texts: Iterable[str], given: Sequence[str], *, size: int, min_count: int) -> NewTokens:
    """Return the tokens that save most, beside those that are given.

    Words are weighed by what the tokenizer would save on all words that begin with them. Whether a token is written
    with the space before it or as a whole word is tried on the texts: both must give them back as they are.

    Args:
        tokenizer: The model's own.
        texts: A corpus.
        given: Tokens that are wanted in any case: words, or marks such as `<gene>`.
        size: Most tokens chosen from the corpus.
        min_count: How often a word must come in it.

    Raises:
        DataError: The tokenizer has all of them as tokens, or no word comes often enough.
        TuneError: With such tokens the tokenizer would not give texts back as they are.
    """
    counts, sample = _count(texts, _normaliser(tokenizer))
    found = []
    for whole_word in (False, True):
        words = counts[True] + counts[False] if whole_word else counts[True]
        tokens = _marked(tokenizer, given, whole_word)
        known = {token.content for token in tokens}
        chosen = _worth(tokenizer, words, whole_word=whole_word, size=size, min_count=min_count)
        tokens += [token for token in chosen if token.content not in known]
        if tokens and (measured := _measure(tokenizer, tokens, sample)) is not None:
            found.append((measured, tokens))
        elif not tokens:
            found.append(({}, tokens))
    if not found:
        raise TuneError("With new tokens this tokenizer would not give texts back as they are; it cannot be extended.")
    facts, tokens = min(found, key=lambda pair: pair[0].get("fertility_after", float("inf")))
    if not tokens:
        raise DataError(
            f"No word comes {min_count} times or more that the tokenizer does not have as a token already.",
            hint="Lower `min_count` under `vocabulary:`, or leave `vocabulary` out.",
        )
    shown = [token.content.strip() for token in tokens[:_SHOWN]]
    return NewTokens(tuple(tokens), {"added": len(tokens), "examples": shown, **facts})


def _count(texts: Iterable[str], normalise: Callable[[str], str]) -> tuple[dict[bool, Counter[str]], list[str]]:
    """Return how often each word comes, by whether a space stands before it, and some of the texts, drawn evenly."""
    counts, sample, chance = {True: Counter[str](), False: Counter[str]()}, list[str](), np.random.default_rng(0)
    for number, text in enumerate(texts):
        for match in _WORD.finditer(normalise(text)):
            if _SHORTEST <= len(match[0]) <= _LONGEST:
                counts[match.string[match.start() - 1 : match.start()] == " "][match[0]] += 1
        place = number if number < _SAMPLED else int(chance.integers(number + 1))
        if place < _SAMPLED:
            sample[place : place + 1] = [text]
    return counts, sample


def _normaliser(tokenizer: Any) -> Callable[[str], str]:
    """Return what brings a text to the form in which a tokenizer of whole words knows it."""
    normalizer = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None
    wordpiece = type(normalizer).__name__ == "BertNormalizer"
    return normalizer.normalize_str if normalizer is not None and wordpiece else str


def _marked(tokenizer: Any, given: Sequence[str], whole_word: bool) -> list[NewToken]:
    """Return the tokens that were asked for; marks stand alone, words as the tokenizer keeps them."""
    tokens = [
        NewToken(_written(text, whole_word), whole_word) if _WORD.fullmatch(text) else NewToken(text) for text in given
    ]
    pieces = _pieces(tokenizer, [token.content for token in tokens])
    return [token for token, count in zip(tokens, pieces, strict=True) if count > 1]


def _written(word: str, whole_word: bool) -> str:
    return word if whole_word else f" {word}"


def _pieces(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Return the number of tokens of each text."""
    return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []


def _worth(tokenizer: Any, counts: Counter[str], *, whole_word: bool, size: int, min_count: int) -> list[NewToken]:
    """Return the words that save most tokens as tokens of their own."""
    words = sorted(counts)
    pieces = dict(zip(words, _pieces(tokenizer, [f" {word}" for word in words]), strict=True))
    frequent = [word for word in words if counts[word] >= min_count and pieces[word] > 1]
    frequent.sort(key=lambda word: (counts[word] * (1 - pieces[word]), word))
    savings = {word: counts[word] * (pieces[word] - 1) for word in frequent[: _WEIGHED * size]}
    if not whole_word:  # a token is taken too where a longer word begins with it
        longer = {word: _beginning_with(word, words) for word in savings}
        ends = [other[len(word) :] for word, others in longer.items() for other in others]
        end_pieces = iter(_pieces(tokenizer, ends))
        for word, others in longer.items():
            savings[word] += sum(counts[other] * (pieces[other] - 1 - next(end_pieces)) for other in others)
    best = sorted((word for word in savings if savings[word] > 0), key=lambda word: (-savings[word], word))
    return [NewToken(_written(word, whole_word), whole_word) for word in best[:size]]


def _beginning_with(word: str, words: list[str]) -> list[str]:
    """Return the longer ones of sorted words that begin with a word."""
    start = bisect.bisect_right(words, word)
    return words[start : bisect.bisect_left(words, word + "\U0010ffff", start)]


def _measure(tokenizer: Any, tokens: Sequence[NewToken], texts: Sequence[str]) -> dict[str, Any] | None:
    """Return tokens a word before and after; None where texts do not come back, or the tokens are not found in them."""
    after = extended(tokenizer, tokens)
    encoded = [each(list(texts), add_special_tokens=False)["input_ids"] for each in (tokenizer, after)]
    pairs = zip(*encoded, strict=True)
    if any(tokenizer.decode(old) != after.decode(new) for old, new in pairs):
        return None
    found = sum(number >= len(tokenizer) for ids in encoded[1] for number in ids)
    if found < _LEAST_FOUND * _occurrences(tokenizer, tokens, texts):
        return None
    words = max(1, sum(len(text.split()) for text in texts))
    fertility = [sum(map(len, ids)) / words for ids in encoded]
    return {"fertility_before": round(fertility[0], 4), "fertility_after": round(fertility[1], 4)}


def _occurrences(tokenizer: Any, tokens: Sequence[NewToken], texts: Sequence[str]) -> int:
    counts, _ = _count(texts, _normaliser(tokenizer))
    return sum(counts[True][token.content.strip()] for token in tokens)
