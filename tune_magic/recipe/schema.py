"""The keys of a recipe, each with its type, bounds and help text.

Names are those of Transformers, PEFT and TRL. Forms, completions, the JSON schema and the tables in the README are all
generated from here.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tune_magic import plugins

Scheduler = Literal[
    "linear", "cosine", "constant", "cosine_with_restarts", "polynomial", "inverse_sqrt", "warmup_stable_decay",
    "reduce_lr_on_plateau",
]  # fmt: skip
Optimizer = Literal["adamw", "sgd", "adafactor", "lion", "adamw_8bit", "lion_8bit", "paged_adamw_8bit"]
Quantization = Literal["none", "nf4", "fp4", "int8"]
PruneBy = Literal["magnitude", "wanda"]
Rounding = Literal["none", "int8", "int4"]
Dtype = Literal["auto", "float32", "bfloat16"]
Sampling = Literal["random", "group_by_length", "group_by_prefix"]
OnBadRows = Literal["error", "skip"]
Balance = Literal["none", "resample"]
Cleaning = Literal[
    "duplicates", "near_duplicates", "leaks", "contradictions", "overlong", "encoding", "personal", "secrets"
]


class Part(BaseModel):
    """Base of every part of a recipe: unknown keys are faults, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = str(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and "bool" not in annotation and ("int" in annotation or "float" in annotation):
            raise ValueError(f"must be a number, got {str(value).lower()}.")
        return value


class MethodOptions(Part):
    """Base of a method's options; each method plug-in adds its own keys."""

    name: str = Field(description="Method by which parameters are made trainable.")


class ObjectiveOptions(Part):
    """Base of an objective's options; each objective plug-in adds its own keys."""

    name: str = Field("", description="What is minimised.")


def standard_columns() -> list[str]:
    """Return the names that formats know columns by, in the order the formats are tried."""
    formats = sorted((kind for _, kind in plugins.working("format")), key=lambda kind: kind.rank)
    return list(dict.fromkeys(name for kind in formats for name in (*kind.needs, *kind.uses)))


def check_template(template: str) -> str:
    """Return a template whose `{column}` places can be filled.

    Raises:
        ValueError: An open brace, or anything but a column's name in a place.
    """
    try:
        places = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"the template {template!r} has a brace too many or too few ({error}).") from None
    for _, column, spec, conversion in places:
        if column == "" or spec or conversion:
            raise ValueError(f"the template {template!r} may only have names of columns in its braces.")
    return template


class ColumnTemplate(Part):
    """Texts of a row, with `{column}` where a column's value goes."""

    system: str | None = Field(None, description="System message.")
    prompt: str = Field(description="What the model is given.")
    completion: str = Field(description="What it learns to answer.")

    @field_validator("system", "prompt", "completion")
    @classmethod
    def _places(cls, value: str | None) -> str | None:
        return value if value is None else check_template(value)


class SourceOptions(Part):
    """How the rows of one source become text."""

    format: str | None = Field(None, description="Format of the rows; detected from their columns by default.")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Your column for each standard name: `{prompt: question, completion: answer}`.",
    )
    template: str | ColumnTemplate | None = Field(
        None, description="A text with `{column}` places, or `{system:, prompt:, completion:}`."
    )

    @field_validator("columns")
    @classmethod
    def _standard_names(cls, value: dict[str, str]) -> dict[str, str]:
        known = standard_columns()
        unknown = [name for name in value if name not in known]
        if unknown:
            raise ValueError(f"`{unknown[0]}` is no standard name. There are: {', '.join(known)}.")
        return value

    @model_validator(mode="after")
    def _one_way(self) -> SourceOptions:
        if self.template is not None and set(self.columns) - {"label"}:
            raise ValueError("`columns` and `template` are two ways to say the same; keep one.")
        return self

    @field_validator("template")
    @classmethod
    def _places(cls, value: str | ColumnTemplate | None) -> str | ColumnTemplate | None:
        if isinstance(value, str):
            check_template(value)
        return value


class AugmentOptions(Part):
    """Base of an augmenter's options; each augmenter plug-in adds its own keys."""

    kind: str = Field(description="What makes rows out of rows.")
    share: float = Field(0.5, gt=0, le=10, description="Rows made for each training row.")


class CallbackOptions(Part):
    """Base of a callback's options; each callback plug-in adds its own keys."""

    name: str = Field(description="What looks on while a model is trained.")


class MixedSource(SourceOptions):
    """One more source to train on."""

    data: str = Field(description="A file, `$name` or hub id.")
    weight: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="Rows of it in an epoch for each row of `train`. Default: by `mix_temperature`.",
    )


class DataOptions(SourceOptions):
    """Where the rows come from and how they become text."""

    train: str = Field(
        description="A .jsonl, .json, .csv, .tsv, .txt, .parquet or .arrow file, `$name` of a DataFrame, `datasets` object "
        "or list of dicts, or a hub id: `org/name`, `org/name@subset:split`. A part of one: `rows.jsonl[:80%]`."
    )
    held_out: str | float | None = Field(
        None,
        description="Rows to evaluate on: a file, `$name`, hub id, a share such as `10%` or 0.1, or 0 for none. "
        "Default: 10%, at least 16 and at most 500 rows, never more than a third.",
    )
    test: str | None = Field(None, description="Rows for `%evaluate` that no choice was made on.")
    mix: list[MixedSource] = Field(
        default_factory=list,
        description="More sources to train on beside `train`: `{chat.jsonl: 0.3}` gives three rows of it for ten of "
        "`train`; a list of names takes all of their rows.",
    )
    mix_temperature: float = Field(
        1.0, ge=1, description="Of sources without a weight: 1 takes all rows, more evens their sizes out."
    )
    replay: str | None = Field(None, description="Rows of an earlier training, mixed in so that it is not forgotten.")
    replay_share: float = Field(0.1, gt=0, lt=1, description="Their share of the rows of an epoch.")
    augment: list[SerializeAsAny[AugmentOptions]] = Field(
        default_factory=list,
        description="Rows made of training rows, the answers and classes kept: `{noise: 0.5, synonyms: 0.2}` adds half as "
        "many with slips of the keyboard, and a fifth with synonyms. Shown by `%tune data` before they are used.",
    )
    balance: Balance = Field(
        "none",
        description="`resample`: rows of rarer classes come again, until each class is as frequent as the first.",
    )
    on_bad_rows: OnBadRows = Field(
        "error", description="What rows that do not fit do: stop with an error, or be skipped and listed in the run."
    )
    clean: list[Cleaning] = Field(
        default_factory=list, description="What is mended or left out before training, recorded in the run."
    )
    group_by: str | None = Field(
        None, description="A column; rows with the same value are never split between training and held-out."
    )
    chat_template: bool = Field(
        True, description="Wrap prompt and completion as user and assistant turns where the model has a chat template."
    )
    min_trained_share: float = Field(
        0.001,
        ge=0,
        le=1,
        description="Refuse rows of whose tokens a smaller share is trained: a wrong column, or a cut.",
    )

    @field_validator("mix", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        """Read `{chat.jsonl: 0.3}`, names, and lists of them."""
        if isinstance(value, str):
            return [{"data": value}]
        if isinstance(value, Mapping) and "data" not in value:
            return [{"data": str(name), "weight": weight} for name, weight in value.items()]
        items = [value] if isinstance(value, Mapping) else value
        return (
            [{"data": item} if isinstance(item, str) else item for item in items] if isinstance(items, list) else value
        )

    @field_validator("augment", mode="before")
    @classmethod
    def _augmenters(cls, value: Any) -> Any:
        """Read `noise`, `{noise: 0.5}`, and lists of names and mappings with `kind`, each by its plug-in's keys."""
        if isinstance(value, Mapping) and "kind" not in value:
            value = [{"kind": name, "share": share} for name, share in value.items()]
        items = value if isinstance(value, list) else [value]
        return [_plugged("augmenter", "kind", {"kind": item} if isinstance(item, str) else item) for item in items]

    @field_validator("clean", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("held_out")
    @classmethod
    def _share(cls, value: str | float | None) -> str | float | None:
        if isinstance(value, float) and not 0 <= value < 1:
            raise ValueError(f"as a share must be at least 0 and below 1, got {value:g}.")
        return value


def _plugged(kind: str, key: str, item: Any) -> Part:
    """Return the options of a plug-in, checked by its own keys.

    Args:
        kind: Of the plug-in: augmenter, callback.
        key: Under which `item` names it.
        item: A mapping.

    Raises:
        ValueError: Naming what is wrong.
    """
    if isinstance(item, Part):
        return item
    known = plugins.names(kind)
    if not isinstance(item, Mapping) or item.get(key) not in known:
        name = item.get(key) if isinstance(item, Mapping) else item
        raise ValueError(f"there is no {kind} {name!r}. There are: {', '.join(known) or 'none'}.")
    options: type[Part] = plugins.get(kind, item[key]).Options
    try:
        return options.model_validate(item)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (item[key], *first["loc"])))
        raise ValueError(f"{where}: {first['msg']}, got {first['input']!r}.") from None


class SchedulerOptions(Part):
    """What the shapes of the learning rate leave open."""

    num_cycles: int = Field(1, ge=1, description="Times that `cosine_with_restarts` falls.")
    power: float = Field(1.0, gt=0, description="Of `polynomial`: 1 is a line, more falls early.")
    decay_ratio: float = Field(0.2, gt=0, le=1, description="Share of the steps in which `warmup_stable_decay` falls.")
    min_lr_rate: float = Field(0.0, ge=0, lt=1, description="Where a falling rate ends, as a share of its peak.")
    factor: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="What `reduce_lr_on_plateau` multiplies the rate by when held-out loss falls no more.",
    )
    patience: int = Field(
        1, ge=0, description="Evaluations without a better held-out loss that it bears before it does so."
    )


class VocabularyOptions(Part):
    """Words that the tokenizer is given as tokens of their own."""

    corpus: str | None = Field(
        None,
        description="Rows whose frequent words become tokens: a file, `$name`, hub id, or `train` for the training rows.",
    )
    size: int = Field(256, ge=1, le=20_000, description="Most tokens made of the corpus; those that save most.")
    min_count: int = Field(10, ge=2, description="How often a word must come in the corpus.")
    tokens: list[str] = Field(default_factory=list, description="Words, or marks such as `<gene>`, that become tokens.")

    @field_validator("tokens", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("tokens")
    @classmethod
    def _words(cls, value: list[str]) -> list[str]:
        if any(not token.strip() or token != token.strip() for token in value):
            raise ValueError("must be words or marks, without spaces around them.")
        return list(dict.fromkeys(value))

    @property
    def extends(self) -> bool:
        """Whether there is anything to add."""
        return self.corpus is not None or bool(self.tokens)


class RetainOptions(Part):
    """What keeps the model near where it started, so that less is forgotten; `data.replay` is another way."""

    l2_sp: float = Field(
        0.0,
        ge=0,
        description="Factor of half the squared distance of the trained weights from their start (L2-SP, Li et al. 2018); "
        "of LoRA, that of its update from none. A classifier's head is left free.",
    )
    ewc: float = Field(
        0.0,
        ge=0,
        description="Factor of half the sum of F (w - start)^2 over all trained weights, heads included, and of LoRA its matrices "
        "themselves (elastic weight consolidation, Kirkpatrick et al. 2017). F is the diagonal of the empirical Fisher "
        "information: how much rows of an earlier task depend on each weight.",
    )
    ewc_data: str | None = Field(None, description="Rows of the earlier task for `ewc`: a file, `$name` or hub id.")
    ewc_rows: int = Field(200, ge=1, description="How many of them F is the mean over, drawn by the seed.")
    kl_base: float = Field(
        0.0,
        ge=0,
        description="Factor of KL(base || model), by which the predictions of the trained tokens are kept near those before "
        "training (learning without forgetting, Li and Hoiem 2016); language models that are a decoder alone.",
    )

    @model_validator(mode="after")
    def _rows_of_the_earlier_task(self) -> RetainOptions:
        if self.ewc > 0 and self.ewc_data is None:
            raise ValueError("`ewc` needs `ewc_data`, rows of what should not be forgotten.")
        if self.ewc_data is not None and self.ewc == 0:
            raise ValueError("`ewc_data` is used by `ewc` alone; give it a factor, such as `ewc: 100`.")
        return self


class QuantizationOptions(Part):
    """How the frozen matrices of the model's layers are kept."""

    kind: Quantization = Field(
        "none",
        description="`nf4` or `fp4`, 4 bits in blocks of 64 (QLoRA, Dettmers et al. 2023), or `int8`, 8 bits with one scale "
        "a row; embeddings, norms and heads stay as they are. `load_in_4bit: true` is nf4, `load_in_8bit: true` int8.",
    )
    double_quant: bool | None = Field(
        None, description="Keep the scales of the blocks in 8 bits too. Default: true for nf4 and fp4."
    )

    @model_validator(mode="after")
    def _of_blocks(self) -> QuantizationOptions:
        if self.double_quant is not None and not self.is_4bit:
            raise ValueError(f"`double_quant` is for nf4 and fp4, which have scales of blocks; `kind` is {self.kind}.")
        return self

    @property
    def is_on(self) -> bool:
        """Whether anything is quantised."""
        return self.kind != "none"

    @property
    def is_4bit(self) -> bool:
        """Whether a weight has 4 bits."""
        return self.kind in ("nf4", "fp4")

    @property
    def quantizes_scales(self) -> bool:
        """Whether the scales of blocks are quantised too."""
        return self.is_4bit and self.double_quant is not False


class CompressOptions(Part):
    """What makes the model smaller before it is trained; training then recovers what was lost."""

    drop_layers: float | int | list[int] | None = Field(
        None,
        description="Layers left out: a share such as 0.2, a count, or a list of numbers from 0. Shares and counts take those "
        "that change what they are given least, by 1 - cosine over training rows (ShortGPT, Men et al. 2024).",
    )
    prune_neurons: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the neurons between the two matrices of each feed-forward layer that is left out, those of least "
        "|activation| x weight norm over training rows. As many in every layer; a multiple of 32, or of 8, is kept.",
    )
    prune_heads: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the key-value heads of each attention layer that is left out, with the query heads that read them, "
        "by the same measure; decoders whose configuration says the size of a head.",
    )
    prune_weights: float | str = Field(
        0.0,
        description="Share of the weights of each matrix of the layers that is set to zero and stays so, or `2:4`, two of "
        "every four neighbours (Han et al. 2015). Methods that train the weights themselves.",
    )
    prune_by: PruneBy = Field(
        "magnitude",
        description="What `prune_weights` keeps: the largest |W| of a matrix, or of each of its rows the largest |W| x norm of "
        "its input over training rows (Wanda, Sun et al. 2023).",
    )
    share_weights: int | None = Field(
        None,
        ge=2,
        le=256,
        description="Distinct values of each matrix of the layers, by k-means; the values are trained, which weight has which is "
        "not (Deep Compression, Han et al. 2016). With `prune_weights`, zero is one of them.",
    )
    tie_layers: int | None = Field(
        None,
        ge=2,
        description="So many neighbouring layers have the same weights, those of the first of them (ALBERT, Lan et al. 2020).",
    )
    quantize_aware: Rounding = Field(
        "none",
        description="Compute with the matrices of the layers rounded to 8 or 4 bits in blocks of 32, as exports to ONNX round "
        "them, and train what is rounded (straight-through, Jacob et al. 2018), so that rounding at the export costs no more.",
    )
    calibration_rows: int = Field(
        64,
        ge=1,
        description="Training rows over which layers, neurons, heads and inputs are measured, drawn by the seed.",
    )

    @field_validator("drop_layers", "prune_neurons", "prune_heads", "prune_weights", mode="before")
    @classmethod
    def _percent(cls, value: Any) -> Any:
        """Read `25%` as a share."""
        if isinstance(value, str) and value.strip().endswith("%"):
            try:
                return float(value.strip()[:-1]) / 100
            except ValueError:
                raise ValueError(f"`{value}` is no share.") from None
        return value

    @field_validator("drop_layers", "prune_weights")
    @classmethod
    def _within(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, float) and not 0 <= value < 1:
            raise ValueError(f"as a share must be at least 0 and below 1, got {value:g}.")
        if isinstance(value, str) and value != "2:4":
            raise ValueError(f"must be a share such as 0.5, or 2:4, got {value!r}.")
        if isinstance(value, int) and value < 0:
            raise ValueError(f"must be at least 0, got {value}.")
        if isinstance(value, list) and (any(number < 0 for number in value) or len(set(value)) < len(value)):
            raise ValueError(f"must be different numbers of layers from 0, got {value}.")
        return value

    @model_validator(mode="after")
    def _together(self) -> CompressOptions:
        if self.share_weights is not None and self.rounds:
            raise ValueError(
                "`share_weights` and `quantize_aware` both decide which values a weight may have; keep one."
            )
        if self.prune_by == "wanda" and self.tie_layers:
            raise ValueError(
                "`prune_by: wanda` would leave each of the tied layers other weights of the same matrix; take `magnitude`."
            )
        if self.prune_by != "magnitude" and not self.prunes_weights:
            raise ValueError(
                "`prune_by` is used by `prune_weights` alone; give it a share, such as `prune_weights: 0.5`."
            )
        return self

    @property
    def prunes_weights(self) -> bool:
        """Whether single weights are set to zero."""
        return bool(self.prune_weights)

    @property
    def rounds(self) -> bool:
        """Whether matrices are rounded as they are used."""
        return self.quantize_aware != "none"

    @property
    def bits(self) -> int:
        """Bits of a rounded weight."""
        return int(self.quantize_aware.removeprefix("int"))

    @property
    def reshapes(self) -> bool:
        """Whether layers, neurons or heads go."""
        return bool(self.drop_layers or self.prune_neurons or self.prune_heads)

    @property
    def constrains(self) -> list[str]:
        """Keys that bind the values of weights while they are trained."""
        found = {
            "prune_weights": self.prunes_weights, "share_weights": self.share_weights is not None,
            "tie_layers": self.tie_layers is not None, "quantize_aware": self.rounds,
        }  # fmt: skip
        return [key for key, is_on in found.items() if is_on]

    @property
    def is_on(self) -> bool:
        """Whether anything is compressed."""
        return self.reshapes or bool(self.constrains)


class EvalOptions(Part):
    """Evaluation on held-out rows while training."""

    steps: int | None = Field(None, ge=1, description="Steps between evaluations; default: about eight in a run.")
    early_stopping_patience: int | None = Field(
        None, ge=1, description="Stop after this many evaluations without a better held-out loss."
    )
    early_stopping_threshold: float = Field(0.0, ge=0, description="How much lower counts as better.")
    samples: int = Field(1, ge=0, le=8, description="Held-out prompts answered at each evaluation, for you to read.")
    max_new_tokens: int = Field(64, ge=1, description="Longest answer of those samples, in tokens.")


class Recipe(Part):
    """What is trained. Its normalised content, with the fingerprints of data and model, is the run's identity."""

    model: str = Field(description="A folder, a model in the cache, an installed wheel, or a hub id.")
    data: DataOptions = Field(description="A path, `$name`, hub id, or a mapping with `train` and more.")
    objective: SerializeAsAny[ObjectiveOptions] | None = Field(
        None,
        description="What is minimised, with its options. Default: what the rows' format is for, such as classify for a text "
        "and its label, and sft for what has no other.",
    )
    method: SerializeAsAny[MethodOptions] = Field(description="How parameters are made trainable, with its options.")
    vocabulary: VocabularyOptions = Field(
        default_factory=lambda: VocabularyOptions.model_validate({}),
        description="New words for the tokenizer: a corpus, or a mapping.",
    )
    retain: RetainOptions = Field(
        default_factory=lambda: RetainOptions.model_validate({}),
        description="What keeps the model near where it started: `{kl_base: 0.1}`.",
    )
    quantization: QuantizationOptions = Field(
        default_factory=lambda: QuantizationOptions.model_validate({}),
        description="Keep the frozen base in fewer bits: a kind, or a mapping.",
    )
    compress: CompressOptions = Field(
        default_factory=lambda: CompressOptions.model_validate({}),
        description="Make the model smaller before it is trained: `{drop_layers: 0.2}`.",
    )
    learning_rate: float = Field(2e-4, gt=0, le=10, description="Peak learning rate.")
    num_train_epochs: float = Field(3.0, gt=0, description="Passes over the training rows.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps, instead of epochs.")
    batch_size: int = Field(8, ge=1, description="Examples per optimizer step, whatever fits at once.")
    microbatch_tokens: int = Field(
        2048, ge=16, description="Most tokens computed at once, fewer where memory needs it; never changes the result."
    )
    gradient_checkpointing: bool | None = Field(
        None, description="Compute activations twice instead of keeping them. Default: only where memory needs it."
    )
    max_length: int = Field(1024, ge=8, description="Longest example in tokens; longer ones are cut at the end.")
    lr_scheduler_type: Scheduler = Field("linear", description="Shape of the learning rate after warm-up.")
    lr_scheduler_kwargs: SchedulerOptions = Field(
        default_factory=lambda: SchedulerOptions.model_validate({}), description="What that shape leaves open."
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the steps in which the learning rate rises.")
    warmup_steps: int | None = Field(None, ge=0, description="The same in steps; wins over the ratio.")
    weight_decay: float = Field(
        0.0, ge=0, description="Weight decay on matrices, apart from the gradient, but for `sgd`, which adds it to it."
    )
    optim: Optimizer = Field(
        "adamw",
        description="What steps along the gradients: AdamW; SGD with momentum, half its state; Adafactor, next to none, "
        "whose steps are in proportion to the parameters (with `full`, not beside LoRA's zeros); Lion, the sign of a mean "
        "of gradients (a third to a tenth of AdamW's learning rate). `_8bit`: states of a "
        "quarter the size; `paged`: GPU states that may move to the machine's memory (on a CPU, as without).",
    )
    adam_beta1: float = Field(
        0.9,
        ge=0,
        lt=1,
        description="AdamW's decay of the first moment, SGD's momentum, the mean's share in Lion's step.",
    )
    adam_beta2: float = Field(
        0.999, ge=0, lt=1, description="AdamW's decay of the second moment, Lion's of its mean (its paper takes 0.99)."
    )
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's denominator floor.")
    label_smoothing_factor: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the training loss that is the mean over all tokens or classes instead of the right one's, so "
        "that the model does not grow too sure; held-out loss stays plain. 0.1 is usual.",
    )
    neftune_noise_alpha: float | None = Field(
        None,
        gt=0,
        description="Noise on the embeddings in training, drawn evenly up to this / sqrt(tokens of the row * width) (NEFTune); "
        "5 to 15 is usual. Prompts that rows share are then computed for each row.",
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Average the trained parameters over the steps, each time average = d * average + (1 - d) * parameters "
        "with d = min(this, (1 + step) / (10 + step)); evaluations, checkpoints and all later use are of the average. "
        "0.99 to 0.9999 is usual.",
    )
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are scaled down to this norm; 0 turns it off.")
    dtype: Dtype = Field("auto", description="Compute precision; auto is bfloat16 where the hardware is fast at it.")
    share_prefixes: bool = Field(True, description="Compute a prompt that rows share once; exact, faster.")
    torch_compile: bool = Field(
        False, description="Compile the layers (torch.compile), for long runs on a GPU; on a CPU it gains little."
    )
    train_sampling_strategy: Sampling = Field(
        "random",
        description="Which rows meet in a step: any, or those alike in length or beginning, which is faster and makes "
        "gradients noisier.",
    )
    cache_frozen_layers: bool = Field(
        True, description="Keep what frozen layers put out on disk, in half precision, where no layer below is trained."
    )
    seed: int = Field(42, ge=0, le=2**32 - 1, description="Seed of data order, split and initial weights.")
    eval: EvalOptions = Field(
        default_factory=lambda: EvalOptions.model_validate({}), description="Held-out evaluation."
    )
    callbacks: list[SerializeAsAny[CallbackOptions]] = Field(
        default_factory=list,
        description="What looks on at each step and evaluation, logs numbers of its own, and may end the run: a name, names, "
        "or `{name: {options}}`.",
    )
    save_steps: int | None = Field(None, ge=1, description="Steps between checkpoints; default: at each evaluation.")
    save_total_limit: int = Field(2, ge=2, description="Newest checkpoints kept, beside the best.")

    @field_validator("callbacks", mode="before")
    @classmethod
    def _callbacks(cls, value: Any) -> Any:
        """Read `watch`, `{watch: {every: 10}}`, and lists of names and mappings, each by its plug-in's keys."""
        if isinstance(value, Mapping) and "name" not in value:
            value = [{**(options or {}), "name": name} for name, options in value.items()]
        items = value if isinstance(value, list) else [value]
        found = [_plugged("callback", "name", {"name": item} if isinstance(item, str) else item) for item in items]
        names = [getattr(options, "name", "") for options in found]
        if len(set(names)) < len(names):
            raise ValueError(f"has one of them twice: {', '.join(names)}.")
        return found

    def normalised(self) -> dict[str, Any]:
        """Return every key with its value, defaults included: the part of the identity that the recipe decides."""
        return self.model_dump(mode="json")

    def short(self) -> dict[str, Any]:
        """Return the keys the user gave in the form people write: a path for data, a name for a method."""
        content = self.given()
        for part, only in (("data", "train"), ("method", "name"), ("objective", "name"), ("quantization", "kind")):
            if set(content.get(part) or {}) == {only}:
                content[part] = content[part][only]
        return content

    def given(self) -> dict[str, Any]:
        """Return the keys the user gave, normalised, without defaults."""
        return self.model_dump(mode="json", exclude_unset=True)
