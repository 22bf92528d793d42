"""Attention within each of several rows that lie behind each other without padding, in both directions.

Only attention has to know where rows end; everything else of an encoder works token by token. So the layers run over
real tokens alone, and queries, keys and values are padded for the attention product and nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

NAME = "tune_magic_rows"


class Rows:
    """What attention has to know of a packed row.

    Args:
        nodes: As in `packing.Batch`, none of them shared.
        device: Where attention runs.
    """

    def __init__(self, nodes: Sequence[tuple[int, int, int]], device: torch.device) -> None:
        self.size = max(end for _, end, _ in nodes)
        width = max(end - start for start, end, _ in nodes)
        padded = np.zeros((len(nodes), width), dtype=np.int64)  # a place of padding repeats the first token
        real = np.zeros((len(nodes), width), dtype=bool)
        for row, (start, end, _) in enumerate(nodes):
            padded[row, : end - start] = np.arange(start, end)
            real[row, : end - start] = True
        self.shape = padded.shape
        self.into = torch.from_numpy(padded.ravel()).to(device)
        self.out = torch.from_numpy(np.flatnonzero(real)).to(device)
        self.mask = None if real.all() else torch.from_numpy(real)[:, None, None].to(device)

    def as_mask(self) -> torch.Tensor:
        """Return what a model is given as its attention mask: four dimensions, so that it is passed on as it is."""
        carrier = torch.empty((1, 1, self.size, 0), dtype=torch.bool, device=self.into.device)
        carrier.rows = self  # type: ignore[attr-defined]
        return carrier


def install() -> None:
    """Make the attention known to Transformers under `NAME`; for anything but `Rows` it is the usual one."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as Transformers asks for it: (1, H, S, D) each, the result (1, S, H, D)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows: Rows | None = getattr(attention_mask, "rows", None)
    if rows is None:
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return found

    def padded(states: torch.Tensor) -> Any:
        by_token: Any = _Pad.apply(states[0].transpose(0, 1), rows)  # type: ignore[no-untyped-call]
        return by_token.view(*rows.shape, *by_token.shape[1:]).transpose(1, 2)

    joined = torch.nn.functional.scaled_dot_product_attention(
        padded(query), padded(key), padded(value), attn_mask=rows.mask, dropout_p=dropout, scale=scaling
    )
    unpadded: Any = _Unpad.apply(joined.transpose(1, 2).flatten(0, 1), rows)  # type: ignore[no-untyped-call]
    return unpadded[None], None


class _Pad(torch.autograd.Function):
    """(tokens, H, D) to (rows * width, H, D). No gradient comes from padding, so each token has one place to look at."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, rows: Rows) -> Any:
        ctx.rows = rows
        return states.index_select(0, rows.into)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient.index_select(0, ctx.rows.out), None


class _Unpad(torch.autograd.Function):
    """(rows * width, H, D) to (tokens, H, D), whose padding gets a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, rows: Rows) -> torch.Tensor:
        ctx.rows = rows
        return states.index_select(0, rows.out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        padded = gradient.new_zeros(len(ctx.rows.into), *gradient.shape[1:])
        return padded.index_copy_(0, ctx.rows.out, gradient), None
