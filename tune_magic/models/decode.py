"""Texts written token by token, several at once: rows join and leave at any token, each with its own choice of tokens."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_TOLERANCE = 1e-3  # of the largest logit: rounding differs with what else is computed, and a wrong position is far more
_COLDEST = 1e-5  # colder ones divide logits into infinities, and take the likeliest token anyway
_CHECKED = ((5, 9, 7), 3)  # prompts' lengths, and tokens written after them


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: Longest answer in tokens.
        temperature: 0 takes the likeliest token; higher ones draw more freely.
        top_p: Share of probability, from the likeliest down, that is drawn from.
        seed: Of what is drawn.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Decoding:
    """Rows that one decoder writes on together.

    Keys and values of shorter rows begin with padding that nothing looks at, so a row is computed from its own tokens, at
    its own positions, whoever is beside it. A prompt is computed by itself and then joins the others.

    Args:
        model: A Transformers decoder in evaluation mode, with the layers of an adapter in it, if any.
        pads: Whether there may be several rows; otherwise the model keeps what it saw in its own way.
    """

    def __init__(self, model: Any, *, pads: bool = True) -> None:
        self._model = model
        self._pads = pads
        self._takes = inspect.signature(model.forward).parameters.keys()
        self._cache: Any = None
        self._mask = torch.zeros((0, 0), dtype=torch.long)

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return len(self._mask)

    @property
    def width(self) -> int:
        """How many places of keys and values are kept for each row."""
        return self._mask.shape[1]

    def join(self, prompt: np.ndarray, before: Any = None) -> torch.Tensor:
        """Compute a prompt, which becomes the last row, and return the logits of the token after it, (vocabulary,).

        Args:
            prompt: Token ids, shape (length,).
            before: What learned tokens give the model before each row: embeddings of shape (1, tokens, width), or a cache
                of keys and values.
        """
        logits, cache, mask = self.read(prompt, before)
        self.add(cache, mask)
        return logits

    def read(self, prompt: np.ndarray, before: Any = None) -> tuple[torch.Tensor, Any, torch.Tensor]:
        """Compute a prompt and return logits, keys and values, and mask, for `add`; nothing changes yet. See `join`."""
        device = next(self._model.parameters()).device
        ids = torch.from_numpy(prompt.astype(np.int64))[None].to(device)
        given: dict[str, Any] = {"input_ids": ids, "past_key_values": self._new_cache()}
        seen = 0
        if isinstance(before, torch.Tensor):
            embedded = self._model.get_input_embeddings()(ids)
            given = {"inputs_embeds": torch.cat([before.to(embedded.dtype), embedded], 1)} | given
            del given["input_ids"]
            seen = before.shape[1]
        elif before is not None:
            given["past_key_values"], seen = before, before.get_seq_length()
        mask = torch.ones((1, seen + ids.shape[1]), dtype=torch.long, device=device)
        with torch.no_grad():
            outputs = self._model(**given, attention_mask=mask, use_cache=True, **self._last_alone())
        return outputs.logits[0, -1].float(), outputs.past_key_values, mask

    def read_together(self, ids: torch.Tensor, mask: torch.Tensor, cache: Any = None) -> tuple[torch.Tensor, Any]:
        """Compute prompts of left-padded rows; return logits after each, (rows, vocabulary), keys and values; see `read`.

        Args:
            ids: Shape (rows, tokens).
            mask: 1 where there is a token, shape (rows, tokens of the cache and these).
            cache: Keys and values of the tokens before these.
        """
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        cache = self._new_cache() if cache is None else cache
        with torch.no_grad():
            outputs = self._model(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **self._placed(positions),
                **self._last_alone(),
            )  # fmt: skip
        return outputs.logits[:, -1].float(), outputs.past_key_values

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Write the next token of each row and return the logits of the one after it, (rows, vocabulary)."""
        ids = torch.tensor(tokens, device=self._mask.device)[:, None]
        positions = self._mask.sum(1, keepdim=True)
        self._mask = torch.cat([self._mask, torch.ones_like(ids)], 1)
        with torch.no_grad():
            outputs = self._model(
                input_ids=ids, attention_mask=self._mask, past_key_values=self._cache, use_cache=True,
                **self._placed(positions),
            )  # fmt: skip
        self._cache = outputs.past_key_values
        logits: torch.Tensor = outputs.logits[:, -1].float()
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Let only these rows go on, in this order; places where none of them has a token go too."""
        if list(rows) == list(range(self.num_rows)):
            return
        if not rows:
            self._cache, self._mask = None, self._mask[:0, :0]
            return
        chosen = torch.tensor(list(rows), device=self._mask.device)
        mask = self._mask[chosen]
        needed = mask.any(0).nonzero()[:, 0]
        self._mask = mask[:, needed]
        for layer in self._cache.layers:
            layer.keys, layer.values = (kept[chosen][:, :, needed] for kept in (layer.keys, layer.values))

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache() if self._pads else None

    def _placed(self, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        """Positions, for a model that does not find them by its mask."""
        return {"position_ids": positions} if "position_ids" in self._takes else {}

    def _last_alone(self) -> dict[str, int]:
        """Whole prompts of logits are not needed."""
        return {"logits_to_keep": 1} if "logits_to_keep" in self._takes else {}

    def add(self, cache: Any, mask: torch.Tensor) -> None:
        """Let what was read be the last row, or rows."""
        if not self.num_rows:
            self._cache, self._mask = cache, mask
            return
        width = max(self._mask.shape[1], mask.shape[1])
        self._mask = torch.cat([_padded(self._mask, width, -1), _padded(mask, width, -1)])
        for mine, other in zip(self._cache.layers, cache.layers, strict=True):
            mine.keys = torch.cat([_padded(mine.keys, width, -2), _padded(other.keys, width, -2)])
            mine.values = torch.cat([_padded(mine.values, width, -2), _padded(other.values, width, -2)])


def _padded(values: torch.Tensor, width: int, dimension: int) -> torch.Tensor:
    """Return values with zeros before them, `width` along a dimension counted from the end."""
    before = width - values.shape[dimension]
    return torch.nn.functional.pad(values, [0, 0] * (-dimension - 1) + [before, 0])


def why_alone(model: Any) -> str | None:
    """Return why rows of a model cannot be written together, found by writing a few both ways; None where they can."""
    from transformers.cache_utils import DynamicLayer

    lengths, count = _CHECKED
    prompts = [np.arange(length) % 3 + 3 + place for place, length in enumerate(lengths)]
    try:
        alone = [_written([prompt], model, count)[0] for prompt in prompts]
        together = Decoding(model)
        together.join(prompts[0])
        if not all(type(layer) is DynamicLayer for layer in together._cache.layers):
            return "it keeps more than keys and values of what it saw"
        found = _written(prompts, model, count)
    except Exception as error:  # noqa: BLE001 - whatever a model cannot do, it can do one row at a time
        return f"{type(error).__name__} with several rows"
    largest = max(float(logits.abs().max()) for logits in alone)
    apart = max(float((one - other).abs().max()) for one, other in zip(alone, found, strict=True))
    return None if apart <= _TOLERANCE * largest else f"logits differ by {apart:.2g} of {largest:.2g}"


def _written(prompts: Sequence[np.ndarray], model: Any, count: int) -> list[torch.Tensor]:
    """Write some tokens after prompts that join one after the other; returns each row's logits, (tokens, vocabulary)."""
    decoding = Decoding(model)
    rows: list[list[torch.Tensor]] = []
    for prompt in prompts:
        if rows:  # those that are there have gone on meanwhile, by one token more for each that joins
            for row, logits in zip(rows, decoding.step([4] * len(rows)), strict=True):
                row.append(logits)
        rows.append([decoding.join(prompt)])
    for _ in range(count):
        for row, logits in zip(rows, decoding.step([4] * len(rows)), strict=True):
            row.append(logits)
    return [torch.stack(row[: count + 1]) for row in rows]


class Draw:
    """Chooses the tokens of one text, one after the other.

    Args:
        sampling: How; the seed decides what is drawn, the same on every run.
        presence_penalty: Taken off the logit of each token that was chosen before.
        frequency_penalty: Taken off as often as it was.
        repetition_penalty: What logits of tokens of prompt and text are divided by, as its authors may want of a model.
        prompt: Token ids before the text.
    """

    def __init__(
        self, sampling: Sampling, *, presence_penalty: float = 0.0, frequency_penalty: float = 0.0,
        repetition_penalty: float = 1.0, prompt: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self._sampling = sampling
        self._penalties = presence_penalty, frequency_penalty
        self._repetition_penalty = repetition_penalty
        self._seen = list(prompt)
        self._chosen: Counter[int] = Counter()
        self._generator: torch.Generator | None = None
        self._is_greedy = sampling.temperature < _COLDEST

    @property
    def is_plain(self) -> bool:
        """Whether it is always the likeliest token."""
        return self._is_greedy and not any(self._penalties) and self._repetition_penalty == 1

    def choose(self, logits: torch.Tensor) -> int:
        """Return the next token by its logits, shape (vocabulary,)."""
        scores = self._penalised(logits)
        token = int(scores.argmax()) if self._is_greedy else self._drawn(scores)
        self._chosen[token] += 1
        if self._repetition_penalty != 1:
            self._seen.append(token)
        return token

    def _penalised(self, logits: torch.Tensor) -> torch.Tensor:
        if self._repetition_penalty != 1:
            from transformers import RepetitionPenaltyLogitsProcessor

            ids = torch.tensor([self._seen], device=logits.device)
            logits = RepetitionPenaltyLogitsProcessor(float(self._repetition_penalty))(ids, logits[None])[0]
        if not (any(self._penalties) and self._chosen):
            return logits
        presence, frequency = self._penalties
        tokens = torch.tensor(list(self._chosen), device=logits.device)
        often = torch.tensor(list(self._chosen.values()), device=logits.device, dtype=logits.dtype)
        return logits.index_add(0, tokens, -(presence + frequency * often))

    def _drawn(self, scores: torch.Tensor) -> int:
        from transformers import TemperatureLogitsWarper, TopPLogitsWarper

        if self._generator is None:
            self._generator = torch.Generator(scores.device).manual_seed(self._sampling.seed)
        nothing = torch.empty((1, 0), dtype=torch.long)
        scores = TemperatureLogitsWarper(float(self._sampling.temperature))(nothing, scores[None])
        if self._sampling.top_p < 1:
            scores = TopPLogitsWarper(float(self._sampling.top_p))(nothing, scores)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
