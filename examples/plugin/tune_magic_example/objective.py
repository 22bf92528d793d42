"""An objective: tokens that the model is already sure of count less."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from tune_magic.objectives.sft import SFT
from tune_magic.recipe.schema import ObjectiveOptions


class FocalTokensOptions(ObjectiveOptions):
    """Keys of `objective: focal_tokens`."""

    name: Literal["focal_tokens"] = Field(
        "focal_tokens", description="Likelihood of the answers; sure tokens count less."
    )
    gamma: float = Field(1.0, ge=0, le=10, description="How much less; 0 is plain `sft`.")


class FocalTokens(SFT):
    """The focal loss, token by token; rows, model and everything else are those of `sft`."""

    Options = FocalTokensOptions
    summary = "The likelihood of the answers, with less weight on tokens that are right already."
    formula = "-sum (1 - p)^gamma log p"
    source = "Lin et al. 2017, Focal Loss for Dense Object Detection, arXiv:1708.02002"
    when = "Most tokens of an answer are easy, as in JSON, and few carry the decision."

    def loss_sum(self, states: Any) -> Any:
        """Return the weighted *sum*: the loop divides by the step's weight."""
        log_p = states.log_probs()  # (tokens,), float32
        unsure = (-log_p.expm1()).clamp_min(1e-12) ** self.options.gamma  # 1 - p
        return -(unsure * log_p * states.weights).sum()
