"""What an objective sees of tokens: hidden states that predict targets, and log-probabilities in chunks of logits."""

from __future__ import annotations

import functools
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
LogProbs = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of states and targets


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
        label_smoothing: Share of `losses` that is the mean over the vocabulary; 0 but in training.
    """

    states: torch.Tensor
    head: Head | None
    targets: torch.Tensor
    weights: torch.Tensor
    owners: torch.Tensor
    vocabulary: int
    head_is_trained: bool = True
    label_smoothing: float = 0.0

    def log_probs(self) -> torch.Tensor:
        """Return (T,) float32: the log-probability of each target. Logits never exist for more than a chunk."""
        return self._in_chunks(0.0)

    def losses(self) -> torch.Tensor:
        """Return (T,) float32: minus the log-probability of each target, in training with label smoothing.

        That is (1 - e) * -log p(target) + e * the mean of -log p over the vocabulary (Szegedy et al. 2016,
        arXiv:1512.00567).
        """
        return -self._in_chunks(self.label_smoothing)

    def _in_chunks(self, smoothing: float) -> torch.Tensor:
        log_probs = functools.partial(_log_probs, head=self.head, smoothing=smoothing)
        if self.head is None:
            return log_probs(self.states, self.targets)
        logits = _CHUNK_LOGITS.get(self.states.device.type, _CHUNK_LOGITS["cpu"])
        size = max(_LEAST_CHUNK, logits // self.vocabulary)
        if not self.head_is_trained:
            found: torch.Tensor = _FrozenHead.apply(self.states, self.targets, log_probs, size)  # type: ignore[no-untyped-call]
            return found
        pieces = zip(torch.split(self.states, size), torch.split(self.targets, size), strict=True)
        parts = [checkpoint(log_probs, *piece, use_reentrant=False) for piece in pieces]
        return torch.cat(parts) if parts else self.states.new_zeros(0, dtype=torch.float32)


class _FrozenHead(torch.autograd.Function):
    """Log-probabilities whose gradient is computed with them, while a chunk's logits are there.

    Each depends on its own state alone, and no parameter of the head wants a gradient: whatever an objective makes of
    the log-probabilities, its gradient is a factor for each row. So the head runs twice in all, not three times as with
    a checkpoint, and nothing of the vocabulary's size is kept.
    """

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, targets: torch.Tensor, compute: LogProbs, size: int) -> torch.Tensor:
        found = torch.empty(len(targets), dtype=torch.float32, device=states.device)
        wanted = ctx.needs_input_grad[0]
        gradients = torch.empty_like(states) if wanted else None
        for start in range(0, len(targets), size):
            chunk = slice(start, start + size)
            with torch.set_grad_enabled(wanted):
                piece = states[chunk].detach().requires_grad_(wanted)
                log_probs = compute(piece, targets[chunk])
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


def _log_probs(states: torch.Tensor, targets: torch.Tensor, head: Head | None, smoothing: float) -> torch.Tensor:
    logits = head(states) if head is not None else states
    return -functional.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=smoothing)
