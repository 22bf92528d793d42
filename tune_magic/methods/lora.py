"""LoRA: low-rank matrices beside frozen linear layers (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tune_magic.methods.base import Method
from tune_magic.models.load import quiet
from tune_magic.recipe.schema import MethodOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LoraOptions(MethodOptions):
    """Keys of `method: lora`, named as in PEFT."""

    name: Literal["lora"] = Field("lora", description="Train low-rank matrices beside frozen linear layers.")
    r: int = Field(16, ge=1, description="Rank of the two matrices.")
    lora_alpha: float = Field(32.0, gt=0, description="The update is scaled by lora_alpha / r.")
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout before the matrices; above 0, prefixes are not shared."
    )
    target_modules: str | list[str] = Field("all-linear", description="Names of layers, or all-linear.")
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(r) instead (Kalajdzievski 2023).")


class Lora(Method):
    """Frozen base, two small matrices beside each target layer: W + (alpha / r) B A, with B zero at the start."""

    Options = LoraOptions
    adds = True
    trains_new_tokens = True

    def apply(self, model: PreTrainedModel, task: str) -> Any:
        """Wrap the model by PEFT, which also trains a head that is new."""
        from peft import LoraConfig, get_peft_model

        from tune_magic.methods import lora_linear, token_rows

        options = self.options
        config = LoraConfig(
            r=options.r,
            lora_alpha=options.lora_alpha,
            lora_dropout=options.lora_dropout,
            target_modules=options.target_modules,
            use_rslora=options.use_rslora,
            task_type=task,
            trainable_token_indices=list(self.new_tokens) or None,
        )
        with quiet():
            wrapped = get_peft_model(model, config)
        lora_linear.fuse(wrapped)
        token_rows.fuse(wrapped)
        return wrapped

    def inner(self, model: Any) -> PreTrainedModel:
        """The Transformers model, with PEFT's layers in it."""
        return model.get_base_model()

    def merge(self, model: Any) -> PreTrainedModel:
        """Fold the matrices into the layers."""
        return model.merge_and_unload()

    def without(self, model: Any) -> AbstractContextManager[Any]:
        """The base model: the matrices are passed by."""
        context: AbstractContextManager[Any] = model.disable_adapter()
        return context

    def has_active_dropout(self) -> bool:
        """LoRA's own dropout."""
        return bool(self.options.lora_dropout > 0)
