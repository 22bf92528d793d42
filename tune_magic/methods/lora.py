"""LoRA: low-rank matrices beside frozen linear layers (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tune_magic.methods.by_peft import PeftMethod
from tune_magic.recipe.schema import MethodOptions, QuantizationOptions

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
    init_lora_weights: Literal["default", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora", "loftq"] = (
        Field(
            "default",
            description="Start of the matrices: an update of nothing, or the principal part of the weights themselves (`pissa`, "
            "Meng et al. 2024; `pissa_niter_16` approximates it; `olora`), which then learns first; or of what 4-bit "
            "quantisation took from them (`loftq`, Li et al. 2023).",
        )
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
        self.makes_up_for_rounding = self.options.init_lora_weights == "loftq"

    def why_not_on(self, base: QuantizationOptions) -> str | None:
        """Starts that write into the base need float weights, and `loftq` 4-bit ones."""
        start = self.options.init_lora_weights
        if self.makes_up_for_rounding and not base.is_4bit:
            return "`init_lora_weights: loftq` makes up for what 4 bits lose, so it needs `quantization: nf4` or `fp4`"
        if base.is_on and not self.adds:
            return f"`init_lora_weights: {start}` takes its start out of the base's weights, which are rounded"
        return None

    def config(self, model: PreTrainedModel, task: str) -> LoraConfig:
        """PEFT's configuration."""
        from peft import LoraConfig

        options = self.options
        own = ("default", "loftq")  # the second is ours: PEFT's needs a GPU
        start: Any = True if options.init_lora_weights in own else options.init_lora_weights
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
        from tune_magic.methods import loftq, lora_linear, token_rows

        wrapped = super().apply(model, task)
        if self.makes_up_for_rounding:
            loftq.start(wrapped)
        lora_linear.fuse(wrapped)
        token_rows.fuse(wrapped)
        return wrapped

    def learning_rate_factor(self, name: str) -> float:
        """LoRA+'s ratio for the second matrices."""
        return self.options.loraplus_lr_ratio or 1.0 if ".lora_B." in name else 1.0

    def has_active_dropout(self) -> bool:
        """LoRA's own dropout."""
        return bool(self.options.lora_dropout > 0)
