"""Supervised fine-tuning: the likelihood of the answers, given what came before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tune_magic.objectives.base import Objective

if TYPE_CHECKING:
    import torch

    from tune_magic.training.target_states import TargetStates


class SFT(Objective):
    """Minus the log-likelihood of each trained token: completions and assistant turns; all of a plain text."""

    smooths = True

    def loss_sum(self, states: TargetStates) -> torch.Tensor:
        """Return the weighted sum of -log p(token | before)."""
        return (states.losses() * states.weights).sum()
