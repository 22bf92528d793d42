"""One text as it is written: its tokens, what of it is certain, where and why it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tune_magic.models.decode import Draw

_HALF = "\ufffd"  # the first bytes of a character that is not whole yet


@dataclass(frozen=True)
class Likely:
    """A token, and how likely it was.

    Attributes:
        text: Of the token, as far as it is one by itself.
        logprob: Natural logarithm of its probability, before temperature and penalties.
        others: The likeliest tokens there, each with theirs.
    """

    text: str
    logprob: float
    others: tuple[tuple[str, float], ...] = ()


class Writing:
    """A text that grows by a token at a time.

    Args:
        tokenizer: Of the model that writes.
        draw: Chooses its tokens.
        room: Most tokens.
        ends: Tokens that end it, which it does not show.
        stops: Texts that end it, which it does not hold.
        num_likely: Likeliest tokens told of each place; None tells no probabilities.
        before: Last tokens of a text that it goes on with: a tokenizer may write a word's space only where one stands before.

    Attributes:
        ids: Its tokens so far, that which ended it too.
        reason: Why it ended: ``stop`` or ``length``; None while it goes on.
    """

    def __init__(
        self, tokenizer: Any, draw: Draw, room: int, *, ends: Sequence[int], stops: Sequence[str] = (),
        num_likely: int | None = None, before: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.draw = draw
        self.ids: list[int] = []
        self.reason: str | None = None
        self._tokenizer = tokenizer
        self._room = room
        self._ends = frozenset(ends)
        self._stops = tuple(stop for stop in stops if stop)
        self._told = 0  # characters
        self._before = list(before)
        self._from, self._settled = (
            0,
            len(self._before),
        )  # tokens before and with the text so far, those before it counted
        self._text = ""  # of the tokens that are settled
        self._num_likely = num_likely
        self._likely: list[Likely] = []

    @property
    def tells_likely(self) -> bool:
        """Whether probabilities are told."""
        return self._num_likely is not None

    def take(self, logits: torch.Tensor, token: int | None = None) -> tuple[str, list[Likely]]:
        """Go on by a token and return what is certain of the text since the last call, and its tokens' probabilities.

        Args:
            logits: Of the next token, shape (vocabulary,).
            token: The likeliest, where it is known and `draw` is plain.
        """
        token = self.draw.choose(logits) if token is None else token
        self.ids.append(token)
        if self._num_likely is not None and token not in self._ends:
            self._likely.append(self._judged(logits, token, self._num_likely))
        if token in self._ends:
            self.reason = "stop"
        elif len(self.ids) >= self._room:
            self.reason = "length"
        return self._more()

    def _more(self) -> tuple[str, list[Likely]]:
        text = self._decoded()
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            text, self.reason = text[: min(found)], "stop"
        elif self.reason is None:
            text = text[: len(text) - self._uncertain(text)]
        if len(text) <= self._told and self.reason is None:
            return "", []
        more, self._told = text[self._told :], max(self._told, len(text))
        likely, self._likely = self._likely, []
        return more, likely

    def _decoded(self) -> str:
        """Return the text so far; only its last tokens are decoded, together with some before them."""
        tokens = [*self._before, *self.ids] if self._from < len(self._before) else None
        first = self._from - len(self._before)
        near = tokens[self._from :] if tokens else self.ids[first:]
        known = self._plain(near[: self._settled - self._from])
        text = self._text + self._plain(near)[len(known) :]
        if not text.endswith(_HALF):
            self._text, self._from, self._settled = text, self._settled, len(self._before) + len(self.ids)
        return text

    def _plain(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _uncertain(self, text: str) -> int:
        """Return how many characters at the end may change, or be the beginning of a text that ends it."""
        half = len(text) - len(text.rstrip(_HALF))
        begun = [
            size
            for stop in self._stops
            for size in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:size])
        ]
        return max([half, *begun])

    def _judged(self, logits: torch.Tensor, token: int, count: int) -> Likely:
        logs = logits.log_softmax(-1)
        best = logs.topk(min(count, len(logs)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return Likely(self._word(token), float(logs[token]), tuple((self._word(one), value) for one, value in pairs))

    def _word(self, token: int) -> str:
        """Return a token's text, with the space that some tokenizers write only behind another token."""
        last = [*self._before, *self.ids[:-1]][-1:]
        known = str(self._tokenizer.decode(last))
        word = str(self._tokenizer.decode([*last, token]))
        return (
            word[len(known) :]
            if _HALF not in known and word.startswith(known)
            else str(self._tokenizer.decode([token]))
        )
