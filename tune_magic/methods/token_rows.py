"""Embeddings of new tokens, trained beside a frozen matrix.

PEFT's layer writes its rows into a copy of the whole matrix in every pass, whose gradient is as large. Here the matrix
stays where it is: tokens from a number on are looked up in the rows, and the head's outputs for them are a small
product beside the large one.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch.nn import functional


class FusedTokenRows(TrainableTokensLayer):
    """PEFT's layer of trained tokens, with a forward pass of our own wherever it would compute the same."""

    def forward_adapters(self, x: torch.Tensor, active_adapters: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map tokens to embeddings, or states to logits."""
        found = None if args or kwargs else self._rows(active_adapters)
        if found is None:
            result: torch.Tensor = super().forward_adapters(x, active_adapters, *args, **kwargs)
            return result
        first, rows = found
        return self._looked_up(x, first, rows) if self._is_embedding else self._logits(x, first, rows)

    @property
    def _is_embedding(self) -> bool:
        return isinstance(self.base_layer, torch.nn.Embedding)

    def _rows(self, names: Any) -> tuple[int, torch.Tensor] | None:
        """Return the first new token and the rows; None where PEFT must compute."""
        if self.disable_adapters or self.merged or len(names or ()) != 1:
            return None
        (name,) = names
        rows = self.trainable_tokens_delta[name]
        indices = self.token_indices[name]
        in_line = indices == list(range(indices[0], indices[0] + len(indices)))
        plain = type(self.base_layer) in (torch.nn.Embedding, torch.nn.Linear)
        frozen = not self.base_layer.weight.requires_grad
        same = rows.dtype == self.base_layer.weight.dtype
        return (indices[0], rows) if in_line and plain and frozen and same else None

    def _looked_up(self, tokens: torch.Tensor, first: int, rows: torch.Tensor) -> torch.Tensor:
        is_new = (tokens >= first) & (tokens < first + len(rows))
        own = functional.embedding((tokens - first).clamp(0, len(rows) - 1), rows)
        return torch.where(is_new.unsqueeze(-1), own, self.base_layer(tokens))

    def _logits(self, states: torch.Tensor, first: int, rows: torch.Tensor) -> torch.Tensor:
        weight, bias = self.base_layer.weight, self.base_layer.bias
        end = first + len(rows)
        parts = [(weight[:first], slice(0, first)), (rows, slice(first, end)), (weight[end:], slice(end, None))]
        return torch.cat(
            [
                functional.linear(states, matrix, None if bias is None else bias[place])
                for matrix, place in parts
                if len(matrix)
            ],
            -1,
        )


def fuse(model: torch.nn.Module) -> int:
    """Make every layer of trained tokens a fused one; returns how many."""
    found = [module for module in model.modules() if type(module) is TrainableTokensLayer]
    for module in found:
        module.__class__ = FusedTokenRows  # the same state, so that PEFT saves and merges it as it does its own
    return len(found)
