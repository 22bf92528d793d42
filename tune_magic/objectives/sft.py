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
    summary = "The model learns to write the answers: minus the log-likelihood of their tokens, given what came before."
    formula = (
        "L = − Σ_t w_t log p(x_t | x_1 … x_(t−1)) / Σ_t w_t;  w = 1 for tokens of completions and assistant turns and of "
        "plain texts, 0 for those of prompts"
    )
    source = "Maximum likelihood; on instructions and answers Ouyang et al. 2022, arXiv:2203.02155."
    when = "Rows that show what should be said: chats, prompts with completions, instructions, plain texts."

    def loss_sum(self, states: TargetStates) -> torch.Tensor:
        """Return the weighted sum of -log p(token | before)."""
        return (states.losses() * states.weights).sum()
