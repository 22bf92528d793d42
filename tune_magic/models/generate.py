"""Answers: greedy ones in batches of similar length, and one at a time as its tokens come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_BATCH = 20


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
        max_new_tokens: Longest answer in tokens.
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
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_tokens(model, tokenizer),
    )
    encodes = model.config.is_encoder_decoder
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, mask = _left_padded([prompts[index] for index in chosen], pad)
        named = {} if adapters is None else {"adapter_names": [adapters[index] for index in chosen]}
        with torch.no_grad():
            out = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([Between()]),
                **named,
            )
        for row, index in enumerate(chosen):
            own = out[row] if encodes else out[row, ids.shape[1] :]  # a decoder's rows begin with what it was given
            answers[index] = tokenizer.decode(own.tolist(), skip_special_tokens=True)
        if done is not None:
            done(len(chosen))
    return answers


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

    draws = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
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


def _left_padded(prompts: Sequence[np.ndarray], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and mask, each (prompts, longest), with the padding before each prompt."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's own and those the model's authors name."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return sorted({token for token in [tokenizer.eos_token_id, *named] if token is not None})
