"""Greedy answers to many prompts, written together: rows leave as they end, and others take their places."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch

from tune_magic.models.decode import Decoding

_FAMILIES = frozenset({
    "llama", "qwen2", "qwen3", "mistral", "phi", "phi3", "smollm3", "olmo2", "stablelm", "gpt_neox", "gpt2", "gptj", "gpt_bigcode",
    "opt", "gemma", "cohere",
})  # fmt: skip
_HARMLESS = frozenset({  # what a model's own settings of generation may say without changing greedy answers
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p",
    "max_length", "max_new_tokens", "use_cache", "return_dict_in_generate", "output_attentions", "output_hidden_states",
    "output_scores", "output_logits", "transformers_version", "_from_model_config",
})  # fmt: skip
_BY_LENGTH = ("longrope", "dynamic")  # positions that depend on the longest of the rows
_WORTH = 64  # tokens that a shared beginning must save
_ENDED = 0.25  # of the rows; taking some out copies the keys and values of all others


def fits(model: Any) -> bool:
    """Return whether this module writes a model's answers: padding may stand in the middle of its rows.

    Families are on a list, since others count that padding without a word: in a window of attention, or in a state.
    """
    config = model.config.get_text_config()
    slides = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    learned = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None)
    turns = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if (
        config.model_type not in _FAMILIES
        or slides
        or learned
        or turns in _BY_LENGTH
        or model.config.is_encoder_decoder
    ):
        return False
    return _HARMLESS.issuperset(model.generation_config.to_diff_dict())


class Greedy:
    """Writes the answers; what prompts that join at once begin with is computed once.

    Args:
        model: A language model that `fits`, in evaluation mode.
        prompts: Token ids, each of shape (length,).
        rooms: The most tokens of each answer; a prompt without any is not answered.
        ends: Tokens that end an answer.
        places: Rows written at once.
        tokens: Most tokens of these rows, with room for answers: keys and values of each are kept.
    """

    def __init__(
        self, model: Any, prompts: Sequence[np.ndarray], rooms: Sequence[int], ends: Collection[int], *, places: int, tokens: int
    ) -> None:  # fmt: skip
        self._model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._prompts, self._rooms, self._ends = prompts, rooms, frozenset(ends)
        self._places, self._tokens = places, tokens
        answered = [index for index, room in enumerate(rooms) if room > 0]
        self._waiting = deque(sorted(answered, key=lambda index: len(prompts[index]), reverse=True))
        self._decoding = Decoding(self._model)
        self._beginning = shared_tokens([prompts[index] for index in answered]) if answered else 0
        self._begun: Any = None  # keys and values of what all prompts begin with
        self._rows: list[int] = []  # the prompt of each row, ended ones too until they are taken out
        self._taken: list[int] = []  # tokens that each row was given after its prompt
        self._over: set[int] = set()
        self.answers: list[list[int]] = [[] for _ in prompts]

    def write(self, between: Callable[[], None], done: Callable[[int], None]) -> list[list[int]]:
        """Write all answers; return the tokens of each, with that which ended it.

        Args:
            between: Called before each token; may raise to break off.
            done: Called with how many answers have ended.
        """
        while self._waiting or self._rows:
            between()
            joining = self._joining()
            if joining:
                logits = self._begin(joining)
                self._rows += joining
                self._taken += [0] * len(joining)
                self._note(joining, logits, done)
            else:
                last = [self.answers[index][-1] for index in self._rows]
                self._note(self._rows, self._decoding.step(last), done)
                self._taken = [count + 1 for count in self._taken]
            self._take_out()
        return self.answers

    def _joining(self) -> list[int]:
        """Take as many of the waiting prompts, longest first, as fit; none before half of what fits alone is free."""
        if not self._waiting:
            return []
        longest = self._prompts[self._waiting[0]]
        width = max(self._decoding.width, len(longest))
        left = max(
            (self._rooms[index] - taken for index, taken in zip(self._rows, self._taken, strict=True)), default=0
        )
        rows = count = len(self._rows)
        for index in self._waiting:
            left = max(left, self._rooms[index])
            if count == self._places or ((count + 1) * (width + left) > self._tokens and count):
                break
            count += 1
        alone = min(self._places, max(1, self._tokens // (len(longest) + self._rooms[self._waiting[0]])))
        if rows and count - rows < min(alone / 2, len(self._waiting)):
            return []
        return [self._waiting.popleft() for _ in range(count - rows)]

    def _begin(self, joining: Sequence[int]) -> torch.Tensor:
        """Compute prompts, which become the last rows; return the logits of the token after each, (prompts, vocabulary)."""
        own = [self._prompts[index] for index in joining]
        device = next(self._model.parameters()).device
        shared = shared_tokens(own)
        if len(own) * (shared - self._beginning) <= shared:  # what these share beyond all others is not worth a pass
            shared = self._beginning
        ids, mask = (tensor.to(device) for tensor in left_padded(own, shared))
        cache = self._cache_of(ids[:1, :shared])
        if cache is not None:
            cache.batch_repeat_interleave(len(own))
        logits, cache = self._decoding.read_together(ids[:, shared:], mask, cache)
        self._decoding.add(cache, mask)
        return logits

    def _cache_of(self, ids: torch.Tensor) -> Any:
        """Return keys and values of what prompts begin with, shape (1, tokens); None of nothing."""
        if not ids.numel():
            return None
        if ids.shape[1] == self._beginning and self._begun is not None:
            return copy.deepcopy(self._begun)
        _, cache = self._decoding.read_together(ids, torch.ones_like(ids))
        if ids.shape[1] == self._beginning:
            self._begun = copy.deepcopy(cache)
        return cache

    def _note(self, rows: Sequence[int], logits: torch.Tensor, done: Callable[[int], None]) -> None:
        """Add the likeliest token to each of these rows that has not ended."""
        ended = 0
        for index, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
            if index in self._over:
                continue
            answer = self.answers[index]
            answer.append(token)
            if token in self._ends or len(answer) == self._rooms[index]:
                self._over.add(index)
                ended += 1
        if ended:
            done(ended)

    def _take_out(self) -> None:
        """Take ended rows out: when they are many, or one would go on beyond the places that the model has."""
        ended = [place for place, index in enumerate(self._rows) if index in self._over]
        at_the_end = any(self._taken[place] >= self._rooms[self._rows[place]] for place in ended)
        if at_the_end or len(ended) >= _ENDED * len(self._rows):
            stay = [place for place in range(len(self._rows)) if place not in ended]
            self._decoding.keep(stay)
            self._rows = [self._rows[place] for place in stay]
            self._taken = [self._taken[place] for place in stay]


def shared_tokens(prompts: Sequence[np.ndarray]) -> int:
    """Return how many tokens all prompts begin with, one of each left over; 0 where computing them once saves little."""
    least, most = min(prompts, key=lambda prompt: prompt.tobytes()), max(prompts, key=lambda prompt: prompt.tobytes())
    size = max(0, min(map(len, prompts)) - 1)
    differs = np.flatnonzero(least[:size] != most[:size])  # bytes are in order: what these two share, all do
    count = int(differs[0]) if len(differs) else size
    return count if (len(prompts) - 1) * count >= _WORTH else 0


def left_padded(prompts: Sequence[np.ndarray], begun: int = 0, pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and mask, each (prompts, longest), with the padding behind the `begun` tokens that all share."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        for own, end in ((prompt[:begun], begun), (prompt[begun:], width)):
            ids[row, end - len(own) : end] = torch.from_numpy(own.astype(np.int64))
            mask[row, end - len(own) : end] = 1
    return ids, mask
