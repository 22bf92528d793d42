"""Attention over a forest of segments laid out in one row: each token sees its own segment so far and its ancestors.

A dense (S, S) mask computes every pair of tokens and hides most. Here the pairs that are seen are computed, and no
others: each segment with itself, segments of like length as one batch; and each inner segment with all its descendants,
which lie behind it, as one product. The parts of a softmax are joined by their log-sum-exp, as in FlashAttention (Dao et
al. 2022, arXiv:2205.14135), and its backward pass is exact for each part given the joined one. Nothing is repeated in
memory, however many rows share a prefix.

On the CPU this needs the kernel that also gives the log-sum-exp, which torch has but does not promise; without it, on
other devices, and with attention dropout, a dense mask is used.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd.function import once_differentiable

NAME = "tune_magic_tree"
_KERNEL = "_scaled_dot_product_flash_attention_for_cpu"
_MERGE_PAIRS = 4096  # so many pairs of padding cost what another call does

Nodes = Sequence[tuple[int, int, int]]


class _Alike(NamedTuple):
    """Segments computed as one batch of n rows and L columns.

    Attributes:
        shape: (n, L).
        tokens: (n * L,) int64, place in the row of each cell; where a segment is shorter, some token of the row.
        cells: (tokens,) int64, the cells that are no padding.
        own: (tokens,) int64, their places in the row.
    """

    shape: tuple[int, int]
    tokens: torch.Tensor
    cells: torch.Tensor
    own: torch.Tensor


class Tree:
    """What attention has to know of a packed row.

    Args:
        nodes: As in `packing.Batch`.
        device: Where attention runs.
    """

    def __init__(self, nodes: Nodes, device: torch.device) -> None:
        self.nodes = nodes
        self.device = device
        self.size = max(end for _, end, _ in nodes)
        self.inner = [node for node in nodes if node[2] > node[1]]
        self.alike = [_alike(group, device) for group in _of_like_length(nodes)]

    @functools.cached_property
    def mask(self) -> torch.Tensor:
        """The same as a mask: (1, 1, S, S) bool, True where row may look at column."""
        mask = torch.zeros(self.size, self.size, dtype=torch.bool)
        for start, end, stop in self.nodes:
            mask[start:end, start:end] = True
            mask[end:stop, start:end] = True
        return mask.tril()[None, None].to(self.device)

    def as_mask(self) -> torch.Tensor:
        """Return what a model is given as its attention mask: four dimensions, so that it is passed on as it is."""
        carrier = torch.empty((1, 1, self.size, 0), dtype=torch.bool, device=self.device)
        carrier.tree = self  # type: ignore[attr-defined]
        return carrier


def install() -> None:
    """Make the attention known to Transformers under `NAME`; for anything but a `Tree` it is the usual one."""
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
    """Attend as Transformers asks for it.

    Args:
        module: The attention layer.
        query: (B, H, S, D).
        key: (B, H or fewer, S, D).
        value: Like `key`.
        attention_mask: A mask, None, or what `Tree.as_mask` returned.
        dropout: Probability.
        scaling: Factor of the scores; None is 1 / sqrt(D).
        **options: Passed on where there is no tree.

    Returns:
        (B, S, H, D), and None for the scores.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    tree: Tree | None = getattr(attention_mask, "tree", None)
    if tree is None or dropout or query.device.type != "cpu" or not hasattr(torch.ops.aten, _KERNEL):
        mask = attention_mask if tree is None else tree.mask
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **options
        )
        return found
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]
    joined: torch.Tensor = _TreeAttention.apply(*rows, tree, scale)  # type: ignore[no-untyped-call]
    return joined[None], None


class _TreeAttention(torch.autograd.Function):
    """(S, H, D) queries, (S, K, D) keys and values to (S, H, D), K a divisor of H."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tree: Tree, scale: float
    ) -> torch.Tensor:
        joined = torch.empty(query.shape, dtype=query.dtype)
        log_sums = torch.empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
        for part in tree.alike:
            found, sums = _forward(*(_batch(x, part) for x in (query, key, value)), is_causal=True, scale=scale)
            joined.index_copy_(0, part.own, _unbatch(found, part))
            log_sums.index_copy_(0, part.own, _unbatch(sums[..., None], part)[..., 0])
        for start, end, stop in tree.inner:
            found, sums = _forward(
                _row(query[end:stop]), _row(key[start:end]), _row(value[start:end]), is_causal=False, scale=scale
            )
            before, new = log_sums[end:stop], sums[0].t()
            total = torch.logaddexp(before, new)
            share = (new - total).exp()[..., None].to(query.dtype)
            joined[end:stop].mul_(1 - share).addcmul_(found[0].transpose(0, 1), share)
            log_sums[end:stop] = total
        ctx.save_for_backward(query, key, value, joined, log_sums)
        ctx.tree, ctx.scale = tree, scale
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        query, key, value, joined, log_sums = ctx.saved_tensors
        heads = query.shape[1]
        key, value = _repeat(key, heads), _repeat(value, heads)
        gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
        for part in ctx.tree.alike:
            padded = gradient.new_zeros((part.shape[0] * part.shape[1], *gradient.shape[1:]))
            padded.index_copy_(0, part.cells, gradient.index_select(0, part.own))  # padding must not reach real keys
            found = _backward(
                padded.view(*part.shape, *gradient.shape[1:]).transpose(1, 2),
                _batch(query, part), _batch(key, part), _batch(value, part), _batch(joined, part),
                _batch(log_sums[..., None], part)[..., 0],
                is_causal=True, scale=ctx.scale,
            )  # fmt: skip
            for whole, piece in zip(gradients, found, strict=True):
                whole.index_copy_(0, part.own, _unbatch(piece, part))
        for start, end, stop in ctx.tree.inner:
            found = _backward(
                _row(gradient[end:stop]), _row(query[end:stop]), _row(key[start:end]), _row(value[start:end]),
                _row(joined[end:stop]), log_sums[end:stop].t()[None],
                is_causal=False, scale=ctx.scale,
            )  # fmt: skip
            places = ((end, stop), (start, end), (start, end))
            for whole, piece, (a, b) in zip(gradients, found, places, strict=True):
                whole[a:b] += piece[0].transpose(0, 1)
        few = ctx.saved_tensors[1].shape[1]
        return gradients[0], _gather(gradients[1], few), _gather(gradients[2], few), None, None


def _forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, is_causal: bool, scale: float) -> Any:
    """Return the attention, (n, H, L, D), and the log-sum-exp of its scores, (n, H, L) float32."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, scale=scale)


def _backward(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, joined: torch.Tensor,
    log_sums: torch.Tensor, *, is_causal: bool, scale: float,
) -> Any:  # fmt: skip
    """Return the gradients of queries, keys and values of one part of the softmax that `log_sums` is of."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, query, key, value, joined, log_sums, 0.0, is_causal, scale=scale
    )


def _row(x: torch.Tensor) -> torch.Tensor:
    """(L, H, D) to (1, H, L, D)."""
    return x.transpose(0, 1)[None]


def _batch(x: torch.Tensor, part: _Alike) -> torch.Tensor:
    """(S, H, D) to (n, H, L, D)."""
    return x.index_select(0, part.tokens).view(*part.shape, *x.shape[1:]).transpose(1, 2)


def _unbatch(x: torch.Tensor, part: _Alike) -> torch.Tensor:
    """(n, H, L, D) to (tokens, H, D), without the padding."""
    return x.transpose(1, 2).flatten(0, 1).index_select(0, part.cells)


def _repeat(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(S, K, D) to (S, H, D): each head of keys serves the H / K queries' heads that follow each other."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _gather(x: torch.Tensor, few: int) -> torch.Tensor:
    """(S, H, D) to (S, K, D), the sum over the heads that a head of keys served."""
    return x if x.shape[1] == few else x.view(len(x), few, -1, x.shape[-1]).sum(2)


def _of_like_length(nodes: Nodes) -> list[list[tuple[int, int, int]]]:
    """Group nodes so that padding costs less than the calls it saves."""
    groups: list[list[tuple[int, int, int]]] = []
    for node in sorted(nodes, key=lambda node: node[1] - node[0]):
        length = node[1] - node[0]
        shortest = groups[-1][-1] if groups else None
        if shortest is not None:
            before = shortest[1] - shortest[0]
            if len(groups[-1]) * (length**2 - before**2) <= _MERGE_PAIRS:
                groups[-1].append(node)
                continue
        groups.append([node])
    return groups


def _alike(group: Nodes, device: torch.device) -> _Alike:
    longest = max(end - start for start, end, _ in group)
    places = np.stack([np.minimum(np.arange(start, start + longest), end - 1) for start, end, _ in group])
    is_token = np.stack([np.arange(start, start + longest) < end for start, end, _ in group])
    cells = np.flatnonzero(is_token)
    tensors = (places.ravel(), cells, places.ravel()[cells])
    return _Alike(places.shape, *(torch.from_numpy(x).to(device) for x in tensors))
