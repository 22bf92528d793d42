"""Full fine-tuning: every parameter is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from tune_magic.methods.base import Method
from tune_magic.models.layers import depths_of
from tune_magic.recipe.schema import MethodOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ByLayerOptions(MethodOptions):
    """Keys of methods that tell layers apart."""

    layer_lr_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Learning rate of a layer as a share of that of the one above it: below 1, lower layers change less "
        "(Howard and Ruder 2018 take 1 / 2.6).",
    )


class FullOptions(ByLayerOptions):
    """Keys of `method: full`."""

    name: Literal["full"] = Field("full", description="Train every parameter.")


class Full(Method):
    """Every parameter of the model is trained: the most freedom, the most memory (16 bytes a parameter in fp32)."""

    Options: ClassVar[type[MethodOptions]] = FullOptions
    trains_new_tokens = True
    in_place = True
    summary = "Every parameter of the model is trained; nothing is added and nothing is frozen."
    formula = (
        "θ ← θ − η_l · step(∂L/∂θ) for every parameter θ;  "
        "η_l = η · layer_lr_decay^(n + 1 − l) in layer l of n, η at the head, the least at the embeddings"
    )
    source = "The usual way. Rates by layer: Howard and Ruder 2018, arXiv:1801.06146."
    when = (
        "Many rows, or texts far from what the model has read, and memory for it: 16 bytes a parameter with AdamW in "
        "float32 (weight 4, gradient 4, optimizer 8). The base does not stay in the run: a checkpoint is a whole model."
    )
    learning_rate = 5e-5

    def apply(self, model: PreTrainedModel, task: str) -> PreTrainedModel:
        """Make every parameter trainable."""
        model.requires_grad_(True)
        self._depths = depths_of(model, task)
        return model

    def learning_rate_factor(self, name: str) -> float:
        """The decay, once for each layer from the top down; embeddings lie lowest."""
        factor: float = self.options.layer_lr_decay ** self._depths[name]
        return factor
