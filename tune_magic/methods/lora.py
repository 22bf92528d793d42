"""LoRA: low-rank matrices beside frozen linear layers (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tune_magic.methods.by_peft import PeftMethod
from tune_magic.recipe.schema import MethodOptions

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

_INTO_BASE = ("pissa", "pissa_niter_16", "olora")  # these take their start out of the base's weights


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
    use_dora: bool = Field(
        False,
        description="Train the length of each column of the weights apart from its direction (DoRA, Liu et al. 2024).",
    )
    init_lora_weights: Literal["default", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora"] = Field(
        "default",
        description="Start of the matrices: an update of nothing, or the principal part of the weights themselves (`pissa`, "
        "Meng et al. 2024; `pissa_niter_16` approximates it; `olora`), which then learns first.",
    )
    loraplus_lr_ratio: float | None = Field(
        None,
        gt=0,
        description="Learning rate of the second matrix as a multiple of the first's (LoRA+, Hayou et al. 2024).",
    )


class Lora(PeftMethod):
    """Frozen base, two small matrices beside each target layer: W + (alpha / r) B A, with B zero at the start."""

    Options = LoraOptions
    trains_new_tokens = True

    def __init__(self, options: MethodOptions) -> None:
        super().__init__(options)
        self.adds = self.options.init_lora_weights not in _INTO_BASE

    def config(self, model: PreTrainedModel, task: str) -> LoraConfig:
        """PEFT's configuration."""
        from peft import LoraConfig

        options = self.options
        start: Any = True if options.init_lora_weights == "default" else options.init_lora_weights
        return LoraConfig(
            r=options.r,
            lora_alpha=options.lora_alpha,
            lora_dropout=options.lora_dropout,
            target_modules=options.target_modules,
            use_rslora=options.use_rslora,
            use_dora=options.use_dora,
            init_lora_weights=start,
            task_type=task,
            trainable_token_indices=self._token_rows(model),
        )

    def _token_rows(self, model: PreTrainedModel) -> dict[str, list[int]] | None:
        """Return the rows that are trained of the embeddings and of a head that is not the same matrix."""
        if not self.new_tokens:
            return None
        modules = [model.get_input_embeddings(), model.get_output_embeddings()]
        if modules[1] is not None and modules[1].weight is modules[0].weight:
            modules.pop()  # PEFT ties its rows too
        names = {id(module): name for name, module in model.named_modules()}
        return {names[id(module)]: list(self.new_tokens) for module in modules if module is not None}

    def apply(self, model: PreTrainedModel, task: str) -> Any:
        """Wrap the model by PEFT, and compute its layers by functions of our own where they are plain."""
        wrapped = super().apply(model, task)
        _fuse(wrapped)
        return wrapped

    def add(self, model: Any, name: str, task: str) -> None:
        """Put one more pair of matrices beside the layers; layers that had none are computed as the others are."""
        super().add(model, name, task)
        _fuse(model)

    def learning_rate_factor(self, name: str) -> float:
        """LoRA+'s ratio for the second matrices."""
        return self.options.loraplus_lr_ratio or 1.0 if ".lora_B." in name else 1.0

    def has_active_dropout(self) -> bool:
        """LoRA's own dropout."""
        return bool(self.options.lora_dropout > 0)


def _fuse(model: Any) -> None:
    from tune_magic.methods import lora_linear, token_rows

    lora_linear.fuse(model)
    token_rows.fuse(model)
