"""Answers: greedy ones in batches of similar length, and one at a time as its tokens come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tune_magic.errors import TuneError

_BATCH = 32
_BATCH_TOKENS = 16_384  # most of a batch, with room for answers: keys and values of each are kept
_GOES_ON = frozenset({
    "llama", "qwen2", "qwen3", "mistral", "phi", "phi3", "smollm3", "olmo2", "stablelm", "gpt_neox", "gpt2", "gptj", "gpt_bigcode",
    "opt", "gemma", "cohere",
})  # fmt: skip
_WORTH = 64  # tokens that a shared beginning must save


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    between: Callable[[], None] | None = None,
    done: Callable[[int], None] | None = None,
    batch_size: int = _BATCH,
    adapters: Sequence[str] | None = None,
) -> list[str]:
    """Answer every prompt greedily and return the texts in the prompts' order, special tokens removed.

    Args:
        model: A Transformers or PEFT language model, in evaluation mode.
        tokenizer: Its tokenizer.
        prompts: Token ids, each of shape (length,).
        max_new_tokens: Longest answer in tokens; shorter after a prompt that leaves the model fewer positions.
        between: Called before each token; may raise to break off.
        done: Called with the number of prompts answered by each batch.
        batch_size: Prompts answered at once; sorted by length first, so that little is padding.
        adapters: PEFT's name of the adapter that answers each prompt, ``__base__`` for none; default: the active one.
    """
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    class Between(StoppingCriteria):  # the one hook Transformers calls at every token
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            if between is not None:
                between()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id
    config = GenerationConfig(
        do_sample=False,
        pad_token_id=pad,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_tokens(model, tokenizer),
    )
    encodes = model.config.is_encoder_decoder
    answers, left = [""] * len(prompts), len(prompts)
    for chosen, room in _batches([len(prompt) for prompt in prompts], max_new_tokens, positions_of(model), batch_size):
        config.max_new_tokens = room
        own = [prompts[index] for index in chosen]
        named = {} if adapters is None else {"adapter_names": [adapters[index] for index in chosen]}
        begun = shared_tokens(own) if adapters is None and _keeps_beginnings(model) else 0
        ids, mask = _left_padded(own, pad, begun)
        with torch.no_grad():
            if begun:
                named["past_key_values"] = _begin(model, ids[:1, :begun].to(device), len(own))
            out = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([Between()]),
                **named,
            )
        for row, index in enumerate(chosen):
            said = out[row] if encodes else out[row, ids.shape[1] :]  # a decoder's rows begin with what it was given
            answers[index] = tokenizer.decode(said.tolist(), skip_special_tokens=True)
        left -= len(chosen)
        if done is not None:
            done(len(chosen))
    if done is not None and left:
        done(left)
    return answers


def positions_of(model: Any) -> int | None:
    """Return how many tokens a language model has places for, prompt and answer together; None: there is no end.

    Learned tokens of an adapter take places; an encoder's prompt takes none of its decoder's.
    """
    known = getattr(model.config, "max_position_embeddings", None)
    if known is None or model.config.is_encoder_decoder:
        return None
    adapter = getattr(model, "active_peft_config", None)
    return int(known) - int(getattr(adapter, "num_virtual_tokens", None) or 0)


def _batches(
    lengths: Sequence[int], max_new_tokens: int, positions: int | None, batch_size: int
) -> Iterator[tuple[list[int], int]]:
    """Yield prompts of similar length by number, longest first, and the most tokens of their answers.

    A prompt that leaves less room than is asked for is answered by itself, so that no other is cut by it; one that
    leaves none is not answered.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    room = [max_new_tokens if positions is None else min(max_new_tokens, positions - length) for length in lengths]
    yield from (([index], room[index]) for index in order if 0 < room[index] < max_new_tokens)
    free = [index for index in order if room[index] == max_new_tokens]
    start = 0
    while start < len(free):
        fits = max(1, _BATCH_TOKENS // (lengths[free[start]] + max_new_tokens))
        yield free[start : start + min(batch_size, fits)], max_new_tokens
        start += min(batch_size, fits)


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


def stream(
    model: Any,
    tokenizer: Any,
    prompt: np.ndarray,
    sampling: Sampling,
    *,
    tell: Callable[[str, int], None] = lambda text, count: None,
    is_over: Callable[[], bool] = lambda: False,
) -> str:
    """Answer one prompt and return the text, special tokens removed.

    Args:
        model: A Transformers or PEFT language model, in evaluation mode.
        tokenizer: Its tokenizer.
        prompt: Token ids, shape (length,).
        sampling: How tokens are chosen.
        tell: Called with the text so far and its number of tokens, whenever whole characters have come.
        is_over: Called before each token; whether to end the answer here. May raise to break off.

    Raises:
        TuneError: The prompt leaves no place for an answer.
    """
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

    ids: list[int] = []

    class Teller(BaseStreamer):
        is_prompt = True

        def put(self, value: torch.Tensor) -> None:
            if self.is_prompt:
                self.is_prompt = False
                return
            ids.extend(value.flatten().tolist())
            text = tokenizer.decode(ids, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # the first bytes of a character that is not whole yet
                tell(text, len(ids))

        def end(self) -> None:
            pass

    class Over(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), is_over(), dtype=torch.bool, device=input_ids.device)

    positions = positions_of(model)
    room = sampling.max_new_tokens if positions is None else min(sampling.max_new_tokens, positions - len(prompt))
    if room < 1:
        raise TuneError(f"The text has {len(prompt)} tokens, and the model has {positions} places.", hint="Shorten it.")
    draws = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=room,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_tokens(model, tokenizer),
        **(draws if sampling.temperature > 0 else {"do_sample": False}),
    )
    device = next(model.parameters()).device
    torch.manual_seed(sampling.seed)
    tokens = torch.from_numpy(prompt.astype(np.int64))[None].to(device)
    with torch.no_grad():
        model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), generation_config=config, streamer=Teller(),
            stopping_criteria=StoppingCriteriaList([Over()]),
        )  # fmt: skip
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def shared_tokens(prompts: Sequence[np.ndarray]) -> int:
    """Return how many tokens all prompts begin with, one of each left over; 0 where computing them once saves little."""
    least, most = min(prompts, key=lambda prompt: prompt.tobytes()), max(prompts, key=lambda prompt: prompt.tobytes())
    size = min(map(len, prompts)) - 1
    differs = np.flatnonzero(least[:size] != most[:size])  # bytes are in order: what these two share, all do
    count = int(differs[0]) if len(differs) else size
    return count if (len(prompts) - 1) * count >= _WORTH else 0


def _keeps_beginnings(model: Any) -> bool:
    """Return whether rows may go on from keys and values of what they begin with: padding then stands in their middle.

    Families are on a list, since others count that padding without a word: in a window of attention, or in a state.
    """
    config = model.config.get_text_config()
    slides = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    learned = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None)
    return config.model_type in _GOES_ON and not (slides or learned or model.config.is_encoder_decoder)


def _begin(model: Any, tokens: torch.Tensor, rows: int) -> Any:
    """Return keys and values of tokens, (1, length), for so many rows."""
    cache = _inner(model)(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values
    cache.batch_repeat_interleave(rows)
    return cache


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _left_padded(prompts: Sequence[np.ndarray], pad: int, begun: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and mask, each (prompts, longest), with the padding behind the `begun` tokens that all share."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        for own, end in ((prompt[:begun], begun), (prompt[begun:], width)):
            ids[row, end - len(own) : end] = torch.from_numpy(own.astype(np.int64))
            mask[row, end - len(own) : end] = 1
    return ids, mask


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's own and those the model's authors name."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return sorted({token for token in [tokenizer.eos_token_id, *named] if token is not None})
