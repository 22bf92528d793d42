"""Norm tuning: only the scales and shifts of normalisation layers are trained (Zhao et al. 2023, arXiv:2312.11420)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tune_magic.methods.by_peft import PeftMethod
from tune_magic.recipe.schema import MethodOptions

if TYPE_CHECKING:
    from peft import LNTuningConfig
    from transformers import PreTrainedModel


class LNTuningOptions(MethodOptions):
    """Keys of `method: ln_tuning`, named as in PEFT."""

    name: Literal["ln_tuning"] = Field("ln_tuning", description="Train the normalisation layers only.")
    target_modules: list[str] | None = Field(None, description="Names of layers; default: all that normalise.")


class LNTuning(PeftMethod):
    """Frozen base, trained norms: about one parameter in five hundred."""

    Options = LNTuningOptions
    summary = "Only the scales, and where there are any the shifts, of the normalisation layers are trained."
    formula = "y = γ ⊙ normalise(x) + β;  γ and β are trained, all else is frozen"
    source = "Zhao et al. 2023, arXiv:2312.11420."
    when = "Another tone or form of answers rather than new knowledge, at next to no memory; nothing is added to the model."
    learning_rate = 1e-3

    def config(self, model: PreTrainedModel, task: str) -> LNTuningConfig:
        """PEFT's configuration."""
        from peft import LNTuningConfig

        found = [name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()]
        norms = [name.removesuffix(".base_layer") for name in found if ".ln_tuning_layers." not in name]
        return LNTuningConfig(task_type=task, target_modules=self.options.target_modules or norms)

    def merge(self, model: Any) -> PreTrainedModel:
        """Put the trained norms in their places, and the trained head, which PEFT leaves wrapped here."""
        from peft.utils.other import ModulesToSaveWrapper

        merged = super().merge(model)
        for name, module in list(merged.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                whole = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
                merged.set_submodule(name, whole)
        return merged
