"""LoRA: low-rank matrices beside frozen linear layers (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tune_magic.methods.by_peft import PeftMethod
from tune_magic.recipe.schema import MethodOptions, QuantizationOptions
from tune_magic.recipe.variant import Variant

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
        description="Train the length of each output's weights apart from their direction (DoRA, Liu et al. 2024).",
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
    summary = "Two small matrices beside each frozen linear layer are trained; their product is added to its weights."
    formula = "y = W x + (α / r) · B A x;  A: r × inputs, B: outputs × r, B = 0 at the start;  α = lora_alpha"
    source = "Hu et al. 2021, arXiv:2106.09685."
    when = (
        "The one to begin with: little memory, a small file, and `%export --to merged` folds it into the weights, so that "
        "answers cost nothing more."
    )
    variants: ClassVar[Mapping[str, Variant]] = {
        "dora": Variant(
            options={"use_dora": True},
            summary="LoRA turns the weights, and a trained length for each output scales them.",
            formula="W′ = m · (W + (α / r) B A) / ‖W + (α / r) B A‖, one length m and one norm an output;  m = ‖W‖ at the start",
            source="Liu et al. 2024, arXiv:2402.09353.",
            when="Small ranks, where LoRA's score falls short; steps take longer.",
        ),
        "rslora": Variant(
            options={"use_rslora": True},
            summary="LoRA whose update is divided by the root of the rank instead of the rank.",
            formula="y = W x + (α / √r) · B A x",
            source="Kalajdzievski 2023, arXiv:2312.03732.",
            when="Large ranks: with α / r the update shrinks as r grows, and a larger rank then learns no more.",
        ),
        "pissa": Variant(
            options={"init_lora_weights": "pissa"},
            summary="LoRA that starts as the principal part of the weights; what is left of them is frozen.",
            formula="W = U S Vᵀ;  at the start (α / r) B A = U_r S_r V_rᵀ, its r largest parts;  W − (α / r) B A is frozen",
            source="Meng et al. 2024, arXiv:2404.02948.",
            when="Faster first steps than LoRA's. The base is changed: no adapter can be exported, `merged` can.",
        ),
        "olora": Variant(
            options={"init_lora_weights": "olora"},
            summary="LoRA that starts from a QR decomposition of the weights, so that its columns are orthonormal.",
            formula="W = Q R;  at the start B = Q_r and A = R_r, the first r columns and rows;  W − (α / r) B A is frozen",
            source="Büyükakyüz 2024, arXiv:2406.01775.",
            when="As `pissa`, and quicker to start.",
        ),
        "loraplus": Variant(
            options={"loraplus_lr_ratio": 16.0},
            summary="LoRA whose second matrix learns at a higher rate than the first.",
            formula="A ← A − η · step(∂L/∂A);  B ← B − λ η · step(∂L/∂B);  λ = loraplus_lr_ratio",
            source="Hayou et al. 2024, arXiv:2402.12354.",
            when="Wide models, where B at A's rate learns too slowly; the rest costs as LoRA does.",
        ),
        "loftq": Variant(
            options={"init_lora_weights": "loftq"},
            recipe={"quantization": "nf4"},
            summary="LoRA beside weights in 4 bits that starts as what rounding them lost.",
            formula="(α / r) B A = the r largest parts of W − W_nf4 by singular values, at the start",
            source="Li et al. 2023, arXiv:2310.08659.",
            when="As `qlora`, where the rounded model is noticeably worse than the model.",
        ),
        "qlora": Variant(
            recipe={"quantization": "nf4"},
            summary="LoRA beside weights that are kept in 4 bits and unpacked as they are used.",
            formula="y = unpack(W_nf4) x + (α / r) · B A x",
            source="Dettmers et al. 2023, arXiv:2305.14314.",
            when="A model whose weights do not fit otherwise.",
        ),
    }

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
        wrapped = super().apply(model, task)
        if self.makes_up_for_rounding:
            from tune_magic.methods import loftq

            loftq.start(wrapped)
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
