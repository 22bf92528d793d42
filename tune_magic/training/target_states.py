"""What an objective sees of tokens: hidden states that predict targets, and log-probabilities in chunks of logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

_CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**25}  # that fit a processor's cache; that fill a GPU
_LEAST_CHUNK = 32  # targets that are worth a product
Head = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class TargetStates:
    """What an objective sees of a microbatch with T targets.

    Attributes:
        states: (T, width) hidden states that predict the targets, or (T, vocabulary) logits when `head` is None.
        head: The output head.
        targets: (T,) token ids.
        weights: (T,) float32.
        owners: (T,) number of the example in the microbatch.
        vocabulary: Outputs of the head.
        head_is_trained: Whether the head has parameters that want a gradient.
    """

    states: torch.Tensor
    head: Head | None
    targets: torch.Tensor
    weights: torch.Tensor
    owners: torch.Tensor
    vocabulary: int
    head_is_trained: bool = True

    def log_probs(self) -> torch.Tensor:
        """Return (T,) float32: the log-probability of each target. Logits never exist for more than a chunk."""
        if self.head is None:
            return _log_probs(self.states, self.targets, None)
        logits = _CHUNK_LOGITS.get(self.states.device.type, _CHUNK_LOGITS["cpu"])
        size = max(_LEAST_CHUNK, logits // self.vocabulary)
        if not self.head_is_trained:
            found: torch.Tensor = _FrozenHead.apply(self.states, self.targets, self.head, size)  # type: ignore[no-untyped-call]
            return found
        pieces = zip(torch.split(self.states, size), torch.split(self.targets, size), strict=True)
        parts = [checkpoint(_log_probs, *piece, self.head, use_reentrant=False) for piece in pieces]
        return torch.cat(parts) if parts else self.states.new_zeros(0, dtype=torch.float32)


class _FrozenHead(torch.autograd.Function):
    """Log-probabilities whose gradient is computed with them, while a chunk's logits are there.

    Each depends on its own state alone, and no parameter of the head wants a gradient: whatever an objective makes of
    the log-probabilities, its gradient is a factor for each row. So the head runs twice in all, not three times as with
    a checkpoint, and nothing of the vocabulary's size is kept.
    """

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, targets: torch.Tensor, head: Head, size: int) -> torch.Tensor:
        found = torch.empty(len(targets), dtype=torch.float32, device=states.device)
        wanted = ctx.needs_input_grad[0]
        gradients = torch.empty_like(states) if wanted else None
        for start in range(0, len(targets), size):
            chunk = slice(start, start + size)
            with torch.set_grad_enabled(wanted):
                piece = states[chunk].detach().requires_grad_(wanted)
                log_probs = _log_probs(piece, targets[chunk], head)
                if gradients is not None:
                    (gradients[chunk],) = torch.autograd.grad(log_probs.sum(), piece)
            found[chunk] = log_probs.detach()
        ctx.save_for_backward(gradients)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        (gradients,) = ctx.saved_tensors
        return gradients * upstream[:, None].to(gradients.dtype), None, None, None


def _log_probs(states: torch.Tensor, targets: torch.Tensor, head: Head | None) -> torch.Tensor:
    logits = head(states) if head is not None else states
    return -functional.cross_entropy(logits.float(), targets, reduction="none")
