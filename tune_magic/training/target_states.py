"""What an objective sees of tokens: hidden states that predict targets, and log-probabilities in chunks of logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

_CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**25}  # that fit a processor's cache; that fill a GPU
_LEAST_CHUNK = 32  # targets that are worth a product
Head = Callable[[torch.Tensor], torch.Tensor]
OfTarget = Callable[..., torch.Tensor]  # (logits, targets, others...) -> (T,) float32, each of its own row alone


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
        beside: What other models make of the same targets, in the same order, by role; without gradients.
    """

    states: torch.Tensor
    head: Head | None
    targets: torch.Tensor
    weights: torch.Tensor
    owners: torch.Tensor
    vocabulary: int
    head_is_trained: bool = True
    label_smoothing: float = 0.0
    beside: dict[str, TargetStates] = field(default_factory=dict)

    def log_probs(self) -> torch.Tensor:
        """Return (T,) float32: the log-probability of each target. Logits never exist for more than a chunk."""
        return self.each(_log_probs)

    def losses(self) -> torch.Tensor:
        """Return (T,) float32: minus the log-probability of each target, in training with label smoothing.

        That is (1 - e) * -log p(target) + e * the mean of -log p over the vocabulary (Szegedy et al. 2016,
        arXiv:1512.00567).
        """
        return -self.each(functools.partial(_log_probs, smoothing=self.label_smoothing))

    def each(self, function: OfTarget, *others: torch.Tensor) -> torch.Tensor:
        """Return (T,) float32: a function of each target's logits, of which there are never more than a chunk.

        Args:
            function: From (logits, targets, *others), cut to the same targets, to (targets,) float32; each number may
                depend on its own row of logits alone.
            others: More of each target, (T, ...), without gradients.
        """
        if self.head is None:
            return function(self.states, self.targets, *others)
        logits = _CHUNK_LOGITS.get(self.states.device.type, _CHUNK_LOGITS["cpu"])
        size = max(_LEAST_CHUNK, logits // self.vocabulary)
        if not self.head_is_trained:
            found: torch.Tensor = _FrozenHead.apply(self.states, self.head, function, size, self.targets, *others)  # type: ignore[no-untyped-call]
            return found
        columns = [torch.split(column, size) for column in (self.states, self.targets, *others)]
        pieces = zip(*columns, strict=True)
        parts = [checkpoint(_by_head, self.head, function, *piece, use_reentrant=False) for piece in pieces]
        return torch.cat(parts) if parts else self.states.new_zeros(0, dtype=torch.float32)

    def compared(self, role: str, function: OfTarget) -> torch.Tensor:
        """Return (T,) float32: a function of each target's logits and of those that the model beside gives it.

        Args:
            role: Of the model beside.
            function: From (logits, targets, their logits) to (targets,) float32, as in `each`.
        """
        theirs = self.beside[role]
        width = min(self.vocabulary, theirs.vocabulary)  # beyond it a head may be filled up, for no token

        def both(logits: torch.Tensor, targets: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                their_logits = states if theirs.head is None else theirs.head(states)
            return function(logits[..., :width], targets, their_logits[..., :width])

        return self.each(both, theirs.states)

    def ordered_as(self, other: TargetStates) -> TargetStates:
        """Return the same targets in the order in which another engine laid out the same examples."""
        ours = torch.argsort(self.owners, stable=True)  # of one example, targets come in the order of its tokens
        places = torch.empty_like(ours)
        places[torch.argsort(other.owners, stable=True)] = ours
        named = ("states", "targets", "weights", "owners")
        return replace(self, **{name: getattr(self, name).index_select(0, places) for name in named})


class _FrozenHead(torch.autograd.Function):
    """A number of each target whose gradient is computed with it, while a chunk's logits are there.

    Each depends on its own state alone, and no parameter of the head wants a gradient: whatever an objective makes of
    the numbers, its gradient is a factor for each row. So the head runs twice in all, not three times as with a
    checkpoint, and nothing of the vocabulary's size is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, head: Head, function: OfTarget, size: int, *others: torch.Tensor
    ) -> torch.Tensor:
        found = torch.empty(len(states), dtype=torch.float32, device=states.device)
        wanted = ctx.needs_input_grad[0]
        gradients = torch.empty_like(states) if wanted else None
        ctx.num_others = len(others)
        for start in range(0, len(states), size):
            chunk = slice(start, start + size)
            with torch.set_grad_enabled(wanted):
                piece = states[chunk].detach().requires_grad_(wanted)
                numbers = _by_head(head, function, piece, *(other[chunk] for other in others))
                if gradients is not None:
                    (gradients[chunk],) = torch.autograd.grad(numbers.sum(), piece)
            found[chunk] = numbers.detach()
        ctx.save_for_backward(gradients)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        (gradients,) = ctx.saved_tensors
        return gradients * upstream[:, None].to(gradients.dtype), None, None, None, *[None] * ctx.num_others


def _by_head(head: Head, function: OfTarget, states: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    return function(head(states), *others)


def _log_probs(logits: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    return -functional.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=smoothing)
