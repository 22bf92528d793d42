"""Answers in OpenAI's forms, whole and in pieces."""

from __future__ import annotations

import abc
import math
import secrets
import time
from collections.abc import Sequence
from typing import Any

from tune_magic.serving.scheduler import Piece
from tune_magic.serving.writing import Likely


class Form(abc.ABC):
    """The form of an answer, the same in all of its pieces.

    Args:
        model: As it was asked for.
        num_prompt_tokens: Of all prompts.
    """

    prefix: str
    whole: str
    piece: str

    def __init__(self, model: str, num_prompt_tokens: int) -> None:
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._num_prompt_tokens = num_prompt_tokens

    @abc.abstractmethod
    def choice(self, index: int, text: str, reason: str | None, likely: Sequence[Likely] | None) -> dict[str, Any]:
        """Return one text."""

    def begun(self, index: int) -> dict[str, Any] | None:
        """Return what a text begins with when it is sent in pieces, if anything."""
        return None

    @abc.abstractmethod
    def more(self, piece: Piece, likely: Sequence[Likely] | None) -> dict[str, Any]:
        """Return a further piece of a text."""

    def answer(self, choices: Sequence[dict[str, Any]], num_tokens: int) -> dict[str, Any]:
        """Return the whole answer."""
        return self._head | {"object": self.whole, "choices": list(choices), "usage": self._usage(num_tokens)}

    def part(self, choices: Sequence[dict[str, Any]], **further: Any) -> dict[str, Any]:
        """Return a piece of the answer."""
        return self._head | {"object": self.piece, "choices": list(choices)} | further

    def last(self, num_tokens: int) -> dict[str, Any]:
        """Return the piece that tells the numbers of tokens."""
        return self.part([], usage=self._usage(num_tokens))

    def _usage(self, num_tokens: int) -> dict[str, int]:
        prompt = self._num_prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": num_tokens, "total_tokens": prompt + num_tokens}


class ChatForm(Form):
    """A message of an assistant."""

    prefix, whole, piece = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, text: str, reason: str | None, likely: Sequence[Likely] | None) -> dict[str, Any]:
        """Return one message."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "finish_reason": reason, "logprobs": _chat_likely(likely)}

    def begun(self, index: int) -> dict[str, Any]:
        """Return who speaks."""
        return self._delta(index, {"role": "assistant", "content": ""}, None, None)

    def more(self, piece: Piece, likely: Sequence[Likely] | None) -> dict[str, Any]:
        """Return more of a message."""
        return self._delta(piece.index, {"content": piece.text} if piece.text else {}, piece.reason, likely)

    def _delta(
        self, index: int, delta: dict[str, str], reason: str | None, likely: Sequence[Likely] | None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "finish_reason": reason, "logprobs": _chat_likely(likely)}


class TextForm(Form):
    """A text that goes on from a prompt."""

    prefix, whole, piece = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, num_prompt_tokens: int) -> None:
        super().__init__(model, num_prompt_tokens)
        self._offsets: dict[int, int] = {}

    def choice(self, index: int, text: str, reason: str | None, likely: Sequence[Likely] | None) -> dict[str, Any]:
        """Return one text, or more of it."""
        return {"index": index, "text": text, "finish_reason": reason, "logprobs": self._likely(index, likely)}

    def more(self, piece: Piece, likely: Sequence[Likely] | None) -> dict[str, Any]:
        """Return more of a text."""
        return self.choice(piece.index, piece.text, piece.reason, likely)

    def _likely(self, index: int, likely: Sequence[Likely] | None) -> dict[str, Any] | None:
        if likely is None:
            return None
        offsets = []
        for one in likely:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(one.text)
        return {
            "tokens": [one.text for one in likely], "token_logprobs": [_finite(one.logprob) for one in likely],
            "top_logprobs": [{text: _finite(value) for text, value in one.others} for one in likely],
            "text_offset": offsets,
        }  # fmt: skip


def _chat_likely(likely: Sequence[Likely] | None) -> dict[str, Any] | None:
    if likely is None:
        return None
    content = [
        _word(one.text, one.logprob) | {"top_logprobs": [_word(text, value) for text, value in one.others]}
        for one in likely
    ]
    return {"content": content, "refusal": None}


def _word(text: str, logprob: float) -> dict[str, Any]:
    is_whole = "\ufffd" not in text  # else its bytes are not known
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode()) if is_whole else None}


def _finite(value: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what has no probability."""
    return value if math.isfinite(value) else -9999.0


def classified(model: str, rows: Sequence[dict[str, Any]], num_tokens: int, *, are_classes: bool) -> dict[str, Any]:
    """Return what a model found in texts: the likeliest class and every probability, or whatever it finds by name.

    Args:
        model: As it was asked for.
        rows: Of each text what was found, by name.
        num_tokens: Of the texts.
        are_classes: Whether these are probabilities of classes, one of which is right.
    """
    data = [
        {"index": index, "label": max(row, key=lambda name: row[name]), "probabilities": _plain(row)}
        if are_classes else {"index": index, "found": _plain(row)}
        for index, row in enumerate(rows)
    ]  # fmt: skip
    return {
        "id": f"classify-{secrets.token_hex(12)}", "object": "list", "created": int(time.time()), "model": model,
        "data": data, "usage": {"prompt_tokens": num_tokens, "completion_tokens": 0, "total_tokens": num_tokens},
    }  # fmt: skip


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: Python's numbers and lists, null for what is no number."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
