"""NEFTune: noise on the embeddings of the tokens in training (Jain et al. 2023, arXiv:2310.05914)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from tune_magic.training.packing import Batch


@contextlib.contextmanager
def on_embeddings(embeddings: torch.nn.Module, batch: Batch, alpha: float) -> Iterator[None]:
    """While inside, add to each component of an embedding a number drawn evenly from -a to a, a = alpha / sqrt(L d).

    L is the length of the token's own row, whatever lies beside it or pads it, and d the width. The numbers come from
    torch's generator, one token after the other, so that they do not depend on how a step is cut into microbatches.

    Args:
        embeddings: From token ids, of the batch's shape, to (..., d).
        batch: What is computed.
        alpha: How much; the paper takes 5 to 15.
    """
    lengths = row_lengths(batch)

    def add(_module: torch.nn.Module, _given: object, output: torch.Tensor) -> torch.Tensor:
        if output.shape[:-1] != lengths.shape:
            return output  # other ids than the batch's
        real = torch.from_numpy(np.flatnonzero(lengths)).to(output.device)
        width = output.shape[-1]
        bounds = alpha / np.sqrt(lengths[lengths > 0] * width)
        drawn = torch.empty(len(real), width, dtype=output.dtype, device=output.device).uniform_(-1, 1)
        scaled = drawn * torch.from_numpy(bounds).to(output.device, output.dtype)[:, None]
        return output + torch.zeros_like(output).flatten(0, -2).index_copy(0, real, scaled).view_as(output)

    handle = embeddings.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def row_lengths(batch: Batch) -> np.ndarray:
    """Return for each token the length of its row, int64 of the batch's shape; 0 for padding.

    Of a tree, whose trunk lies in several rows, that of the longest.
    """
    if batch.attention is not None:
        return np.asarray(batch.attention * batch.attention.sum(1, keepdims=True))
    lengths = np.zeros(batch.input_ids.shape, dtype=np.int64)
    for start, end, stop in batch.nodes:
        lengths[:, start:end] = batch.position_ids[:, start:stop].max() + 1
    return lengths
