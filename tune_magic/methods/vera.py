"""VeRA: two vectors beside random matrices that all layers share (Kopiczko et al. 2024, arXiv:2310.11454)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tune_magic.methods.by_peft import PeftMethod, targets
from tune_magic.recipe.schema import MethodOptions

if TYPE_CHECKING:
    from peft import VeraConfig
    from transformers import PreTrainedModel


class VeraOptions(MethodOptions):
    """Keys of `method: vera`, named as in PEFT."""

    name: Literal["vera"] = Field("vera", description="Train two vectors a layer beside shared random matrices.")
    r: int = Field(256, ge=1, description="Rank of the shared matrices.")
    d_initial: float = Field(0.1, gt=0, description="Start of the first vector.")
    vera_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the matrices.")
    projection_prng_key: int = Field(0, ge=0, description="Seed of the shared matrices, which are not saved.")
    target_modules: list[str] | None = Field(None, description="Names of layers; PEFT knows them for most models.")


class Vera(PeftMethod):
    """Frozen base and frozen random A and B for all layers; each trains d and b in W + diag(b) B diag(d) A."""

    Options = VeraOptions
    summary = "Two vectors are trained for each linear layer, beside frozen random matrices that all layers share."
    formula = (
        "y = W x + b ⊙ B (d ⊙ A x);  A: r × inputs and B: outputs × r random and frozen;  b = 0 and d = d_initial at the "
        "start"
    )
    source = "Kopiczko et al. 2024, arXiv:2310.11454."
    when = "As LoRA, where files must be smaller still: their size no longer grows with r times the width."
    learning_rate = 5e-3

    def config(self, model: PreTrainedModel, task: str) -> VeraConfig:
        """PEFT's configuration."""
        from peft import VeraConfig

        options = self.options
        return VeraConfig(
            task_type=task, r=options.r, d_initial=options.d_initial, vera_dropout=options.vera_dropout,
            projection_prng_key=options.projection_prng_key, save_projection=False, **targets(options.target_modules),
        )  # fmt: skip

    def has_active_dropout(self) -> bool:
        """VeRA's own dropout."""
        return bool(self.options.vera_dropout > 0)
