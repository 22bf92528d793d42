"""Answers: greedy ones of many prompts together, and one at a time as its tokens come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from tune_magic.errors import TuneError
from tune_magic.models import greedy
from tune_magic.models.decode import Sampling
from tune_magic.models.greedy import left_padded

_BATCH = 32
_BATCH_TOKENS = 16_384  # most of a batch, with room for answers: keys and values of each are kept


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
        done: Called with how many prompts were answered since.
        batch_size: Prompts answered at once, by length, so that little is padding.
        adapters: PEFT's name of the adapter that answers each prompt, ``__base__`` for none; default: the active one.
    """
    answered = 0

    def count(ended: int) -> None:
        nonlocal answered
        answered += ended
        if done is not None:
            done(ended)

    positions = positions_of(model)
    rooms = [
        0 if not len(prompt) else max_new_tokens if positions is None else min(max_new_tokens, positions - len(prompt))
        for prompt in prompts
    ]
    if adapters is None and greedy.fits(model):
        ends = end_tokens(model, tokenizer)
        writer = greedy.Greedy(model, prompts, rooms, ends, places=batch_size, tokens=_BATCH_TOKENS)
        written = writer.write(between or (lambda: None), count)
    else:
        written = _by_transformers(
            model,
            tokenizer,
            prompts,
            rooms=rooms,
            between=between,
            done=count,
            batch_size=batch_size,
            adapters=adapters,
        )
    if len(prompts) > answered:
        count(len(prompts) - answered)  # those that are empty, or leave no place for an answer
    return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in written]


def _by_transformers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[np.ndarray],
    *,
    rooms: Sequence[int],
    between: Callable[[], None] | None,
    done: Callable[[int], None],
    batch_size: int,
    adapters: Sequence[str] | None,
) -> list[list[int]]:
    """Return the tokens of answers that Transformers writes, batch by batch; see `generate`."""
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    class Between(StoppingCriteria):  # the one hook Transformers calls at every token
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            if between is not None:
                between()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    device = next(model.parameters()).device
    config = GenerationConfig(
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_tokens(model, tokenizer),
    )
    answers: list[list[int]] = [[] for _ in prompts]
    for chosen in _batches([len(prompt) for prompt in prompts], rooms, batch_size):
        config.max_new_tokens = rooms[chosen[0]]
        named = {} if adapters is None else {"adapter_names": [adapters[index] for index in chosen]}
        ids, mask = left_padded([prompts[index] for index in chosen], pad=tokenizer.pad_token_id)
        with torch.no_grad():
            out = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([Between()]),
                **named,
            )
        # a decoder's rows begin with what it was given
        said = out if model.config.is_encoder_decoder else out[:, ids.shape[1] :]
        for index, tokens in zip(chosen, said.tolist(), strict=True):
            answers[index] = tokens
        done(len(chosen))
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


def _batches(lengths: Sequence[int], rooms: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield prompts of similar length and equal room by number, longest first.

    A prompt that leaves less room than is asked for is answered by itself, so that no other is cut by it; one that
    leaves none is not answered.
    """
    order = sorted((i for i, room in enumerate(rooms) if room > 0), key=lambda i: lengths[i], reverse=True)
    most = max(rooms, default=0)
    yield from ([index] for index in order if rooms[index] < most)
    free = [index for index in order if rooms[index] == most]
    start = 0
    while start < len(free):
        size = min(batch_size, max(1, _BATCH_TOKENS // (lengths[free[start]] + most)))
        yield free[start : start + size]
        start += size


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


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's own and those the model's authors name."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return sorted({token for token in [tokenizer.eos_token_id, *named] if token is not None})
