"""OFT: the weights are turned by orthogonal blocks (Qiu et al. 2023, arXiv:2306.07280)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tune_magic.methods.by_peft import PeftMethod, targets
from tune_magic.recipe.schema import MethodOptions

if TYPE_CHECKING:
    from peft import OFTConfig
    from transformers import PreTrainedModel


class OFTOptions(MethodOptions):
    """Keys of `method: oft`, named as in PEFT."""

    name: Literal["oft"] = Field("oft", description="Train rotations of the weights, in blocks.")
    oft_block_size: int = Field(32, ge=2, description="Size of a block; larger turns more, with more parameters.")
    target_modules: list[str] | None = Field(None, description="Names of layers; PEFT knows them for most models.")


class OFT(PeftMethod):
    """Frozen base whose weights are multiplied by block-diagonal rotations: angles between neurons stay as they are."""

    Options = OFTOptions
    summary = "Each frozen weight matrix is multiplied by a trained rotation, made of blocks along its diagonal."
    formula = (
        "y = W R x;  R = diag(R_1, …, R_k), R_i = (I + Q_i)(I − Q_i)⁻¹ with Q_i = −Q_iᵀ (the inverse by a few terms of its "
        "series);  Q = 0 at the start"
    )
    source = "Qiu et al. 2023, arXiv:2306.07280."
    when = "Where a model should keep what it can do: a rotation leaves lengths of neurons and angles between them as they are."
    learning_rate = 1e-3

    def config(self, model: PreTrainedModel, task: str) -> OFTConfig:
        """PEFT's configuration."""
        from peft import OFTConfig

        size = self.options.oft_block_size
        return OFTConfig(task_type=task, r=0, oft_block_size=size, **targets(self.options.target_modules))
