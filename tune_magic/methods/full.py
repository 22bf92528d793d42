"""Full fine-tuning: every parameter is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tune_magic.methods.base import Method
from tune_magic.recipe.schema import MethodOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FullOptions(MethodOptions):
    """Keys of `method: full`."""

    name: Literal["full"] = Field("full", description="Train every parameter.")


class Full(Method):
    """Every parameter of the model is trained: the most freedom, the most memory (16 bytes a parameter in fp32)."""

    Options = FullOptions
    trains_new_tokens = True

    def apply(self, model: PreTrainedModel, task: str) -> PreTrainedModel:
        """Make every parameter trainable."""
        model.requires_grad_(True)
        return model
