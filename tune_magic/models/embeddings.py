"""Rows of the embeddings for new tokens: made from their pieces, and hidden where the model is to be as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tune_magic.models.load import quiet


def num_embeddings(model: Any) -> int | None:
    """Return how many tokens a model has embeddings for; None where it reads images or sound."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:  # models of sound
        return None
    return None if weight is None else len(weight)


def extend(model: Any, size: int, pieces: Sequence[Sequence[int]]) -> None:
    """Give a model an embedding for each new token: the mean of those of its pieces, in the head too.

    Args:
        model: A Transformers model, changed in place.
        size: Tokens that the tokenizer knew before; the new ones are numbered from there.
        pieces: Of each new token, the tokens it was cut into before.
    """
    output = model.get_output_embeddings()
    matrices = [model.get_input_embeddings().weight, *([output.weight] if output is not None else [])]
    if size + len(pieces) > len(matrices[0]):
        with quiet():
            model.resize_token_embeddings(size + len(pieces), mean_resizing=False)
        output = model.get_output_embeddings()
        matrices = [model.get_input_embeddings().weight, *([output.weight] if output is not None else [])]
    if output is not None and getattr(output, "bias", None) is not None:
        matrices.append(output.bias)
    with torch.no_grad():
        for matrix in {id(matrix): matrix for matrix in matrices}.values():
            for number, ids in enumerate(pieces, start=size):
                matrix[number] = matrix[list(ids)].mean(0)


@contextlib.contextmanager
def hidden(model: Any, size: int) -> Iterator[None]:
    """While inside, a language model has no token from number `size` on: the head gives them no probability.

    Args:
        model: A Transformers model that was extended.
        size: Tokens that its tokenizer knew before.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return

    def hide(_module: Any, _given: Any, logits: torch.Tensor) -> torch.Tensor:
        kept = torch.arange(logits.shape[-1], device=logits.device) < size
        return logits.masked_fill(~kept, float("-inf"))

    handle = head.register_forward_hook(hide)
    try:
        yield
    finally:
        handle.remove()
