"""Attention over a forest of segments laid out in one row: each token sees its own segment so far and its ancestors.

A dense (S, S) mask computes every pair of tokens and hides most. Here the pairs that are seen are computed, and no
others: each segment with itself, and each inner segment with all its descendants, which lie behind it, as one product.
The parts of a softmax are joined by their log-sum-exp, as in FlashAttention (Dao et al. 2022, arXiv:2205.14135), and
its backward pass is exact for each part given the joined one. Nothing is repeated in memory, however many rows share a
prefix.

On the CPU this needs the kernel that also gives the log-sum-exp, which torch has but does not promise. A GPU is given the
same tree as a block mask of FlexAttention (Dong et al. 2024, arXiv:2412.05496), which skips blocks of pairs that nobody
sees. Elsewhere, and with attention dropout, a dense mask is used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "tune_magic_tree"
_KERNEL = "_scaled_dot_product_flash_attention_for_cpu"
Way = Literal["pairs", "flex", "dense"]

Nodes = Sequence[tuple[int, int, int]]


class Tree:
    """What attention has to know of a packed row.

    Args:
        nodes: As in `packing.Batch`.
        device: Where attention runs.
        way: How it is computed; None: `way_on` the device.
    """

    def __init__(self, nodes: Nodes, device: torch.device, way: Way | None = None) -> None:
        self.nodes = nodes
        self.device = device
        self.way = way or way_on(device)
        self.size = max(end for _, end, _ in nodes)
        stops = np.empty(self.size, dtype=np.int64)
        for start, end, stop in nodes:
            stops[start:end] = stop
        self._stops = torch.from_numpy(stops).to(device)

    @property
    def sees(self) -> Callable[[Any, Any, torch.Tensor, torch.Tensor], torch.Tensor]:
        """Whether tokens see others, as FlexAttention asks for it: what lies under a node comes right behind it."""
        stops = self._stops

        def sees(_batch: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return (key <= query) & (query < stops[key])

        return sees

    @functools.cached_property
    def mask(self) -> torch.Tensor:
        """The same as a mask: (1, 1, S, S) bool, True where row may look at column."""
        places = torch.arange(self.size, device=self.device)
        return self.sees(None, None, places[:, None], places[None, :])[None, None]

    @functools.cached_property
    def blocks(self) -> BlockMask:
        """The same as FlexAttention takes it."""
        return create_block_mask(self.sees, None, None, self.size, self.size, self.device)

    def as_mask(self) -> torch.Tensor:
        """Return what a model is given as its attention mask: four dimensions, so that it is passed on as it is."""
        if self.way == "dense":
            return self.mask
        carrier = torch.empty((1, 1, self.size, 0), dtype=torch.bool, device=self.device)
        carrier.tree = self  # type: ignore[attr-defined]
        return carrier


def way_on(device: torch.device) -> Way:
    """Return how attention over trees is computed on a device."""
    if device.type == "cuda":
        return "flex"
    return "pairs" if device.type == "cpu" and hasattr(torch.ops.aten, _KERNEL) else "dense"


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
    tree: Tree | None = getattr(attention_mask, "tree", None)
    if tree is not None and not dropout:
        # under autocast rotated queries and keys are wider than values; torch's own attention narrows them, too
        query, key = query.to(value.dtype), key.to(value.dtype)
        if tree.way == "flex":
            found: tuple[torch.Tensor, Any] = flex_attention_forward(
                module, query, key, value, tree.blocks, scaling=scaling
            )
            return found[0], None
        if query.shape[1] % key.shape[1] == 0:  # otherwise the kernel would end the process
            return _attend_in_pairs(query, key, value, tree, scaling), None
    mask = attention_mask if tree is None else tree.mask
    output: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, **options
    )
    return output


@torch.compiler.disable
def _attend_in_pairs(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tree: Tree, scaling: float | None
) -> torch.Tensor:
    """Attend as `_attend` does; never traced, since each row has other nodes."""
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]
    joined: torch.Tensor = _TreeAttention.apply(*rows, tree, scale)  # type: ignore[no-untyped-call]
    return joined[None]


class _TreeAttention(torch.autograd.Function):
    """(S, H, D) queries, (S, K, D) keys and values to (S, H, D), K a divisor of H."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tree: Tree, scale: float
    ) -> torch.Tensor:
        joined = torch.empty(query.shape, dtype=query.dtype)
        log_sums = torch.empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
        for start, end, _ in tree.nodes:
            own = slice(start, end)
            joined[own], log_sums[own] = _forward(query[own], key[own], value[own], is_causal=True, scale=scale)
        for start, end, stop in tree.nodes:
            if end == stop:
                continue
            own, below = slice(start, end), slice(end, stop)
            found, sums = _forward(query[below], key[own], value[own], is_causal=False, scale=scale)
            total = torch.logaddexp(log_sums[below], sums)
            share = (sums - total).exp()[..., None].to(query.dtype)
            joined[below].mul_(1 - share).addcmul_(found, share)
            log_sums[below] = total
        ctx.save_for_backward(query, key, value, joined, log_sums)
        ctx.tree, ctx.scale = tree, scale
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        query, key, value, joined, log_sums = ctx.saved_tensors

        def part(rows: slice, columns: slice, is_causal: bool) -> tuple[torch.Tensor, ...]:
            return _backward(
                gradient[rows], query[rows], key[columns], value[columns], joined[rows], log_sums[rows],
                is_causal=is_causal, scale=ctx.scale,
            )  # fmt: skip

        of_query, of_key, of_value = (torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value))
        for start, end, _ in ctx.tree.nodes:
            own = slice(start, end)
            of_query[own], of_key[own], of_value[own] = part(own, own, is_causal=True)
        for start, end, stop in ctx.tree.nodes:
            if end == stop:
                continue
            own, below = slice(start, end), slice(end, stop)
            found = part(below, own, is_causal=False)
            of_query[below] += found[0]
            of_key[own] += found[1]
            of_value[own] += found[2]
        return of_query, of_key, of_value, None, None


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention, (L, H, D), and the log-sum-exp of its scores, (L, H) float32."""
    kernel = getattr(torch.ops.aten, _KERNEL)
    found, sums = kernel(*map(_heads_first, (query, key, value)), 0.0, is_causal, scale=scale)
    return found[0].transpose(0, 1), sums[0].t()


def _backward(*given: torch.Tensor, is_causal: bool, scale: float) -> tuple[torch.Tensor, ...]:
    """Return the gradients of queries, keys and values of one part of a softmax.

    Args:
        *given: Gradient, queries, keys, values, the joined result, each (L, H, D), and the joined log-sum-exp, (L, H).
        is_causal: Whether the part is a segment with itself.
        scale: Factor of the scores.
    """
    kernel = getattr(torch.ops.aten, f"{_KERNEL}_backward")
    *parts, sums = given
    found = kernel(*map(_heads_first, parts), sums.t()[None], 0.0, is_causal, scale=scale)
    return tuple(x[0].transpose(0, 1) for x in found)


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """(L, H, D) to (1, H, L, D)."""
    return x.transpose(0, 1)[None]
