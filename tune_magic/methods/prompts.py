"""Learned tokens before every row: prompt tuning, p-tuning, prefix tuning."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field

from tune_magic.errors import TuneError
from tune_magic.methods.by_peft import PeftMethod
from tune_magic.recipe.schema import MethodOptions
from tune_magic.recipe.variant import Variant

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


class PromptOptions(MethodOptions):
    """Keys of `method: prompt`, named as in PEFT."""

    name: Literal["prompt"] = Field("prompt", description="Train embeddings of tokens that stand before every row.")
    num_virtual_tokens: int = Field(20, ge=1, le=1000, description="How many tokens that are.")
    prompt_tuning_init: Literal["random", "sample_vocab"] = Field(
        "sample_vocab", description="Their start: embeddings drawn from the vocabulary, or at random."
    )


class PTuningOptions(MethodOptions):
    """Keys of `method: p_tuning`, named as in PEFT."""

    name: Literal["p_tuning"] = Field("p_tuning", description="Train a small network that makes such embeddings.")
    num_virtual_tokens: int = Field(20, ge=1, le=1000, description="How many tokens stand before every row.")
    encoder_hidden_size: int | None = Field(None, ge=1, description="Width of the network; default: the model's.")


class PrefixOptions(MethodOptions):
    """Keys of `method: prefix`, named as in PEFT."""

    name: Literal["prefix"] = Field("prefix", description="Train keys and values that every layer sees before a row.")
    num_virtual_tokens: int = Field(20, ge=1, le=1000, description="For how many tokens.")
    prefix_projection: bool = Field(False, description="Make them by a small network, as in the paper.")
    encoder_hidden_size: int | None = Field(None, ge=1, description="Width of the network; default: the model's.")


class Prompt(PeftMethod):
    """Frozen base that reads learned embeddings before each row (Lester et al. 2021, arXiv:2104.08691)."""

    Options: ClassVar[type[MethodOptions]] = PromptOptions
    summary: ClassVar[str] = "Embeddings of a few tokens that stand before every row are trained, and nothing else."
    formula: ClassVar[str] = "y = model([p_1 … p_m; E(x)]);  p_1 … p_m are trained, m = num_virtual_tokens"
    source: ClassVar[str] = "Lester et al. 2021, arXiv:2104.08691."
    when: ClassVar[str] = (
        "Large models, and many tasks on one of them: a task is a small file. Small models learn little by it; it takes "
        "a high learning rate and many steps."
    )
    learning_rate: ClassVar[float] = 1e-2
    packs = False
    merges = False
    recomputes = False

    @property
    def num_virtual_tokens(self) -> int:
        """Positions of the model that the method takes."""
        return int(self.options.num_virtual_tokens)

    def config(self, model: PreTrainedModel, task: str) -> PeftConfig:
        """PEFT's configuration."""
        from peft import PromptTuningConfig

        start = self.options.prompt_tuning_init.upper()
        return PromptTuningConfig(task_type=task, num_virtual_tokens=self.num_virtual_tokens, prompt_tuning_init=start)

    @contextlib.contextmanager
    def without(self, model: Any) -> Iterator[None]:
        """The base model: no tokens before the rows, and of a classifier the head it began with.

        PEFT's own context knows language models only, and leaves the head as it is.
        """
        from peft.utils.other import AuxiliaryTrainingWrapper

        if hasattr(model, "prepare_inputs_for_generation"):
            with model.disable_adapter():
                yield
            return
        heads = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        forward, model.forward = model.forward, model.base_model.forward
        for head in heads:
            head.enable_adapters(False)
        try:
            yield
        finally:
            model.forward = forward
            for head in heads:
                head.enable_adapters(True)

    def merge(self, model: Any) -> PreTrainedModel:
        """There is no layer to fold learned tokens into."""
        raise TuneError(
            f"`{self.options.name}` puts learned tokens before each row; they cannot be folded into the model.",
            hint="Export it with `--to adapter`.",
        )


class PTuning(Prompt):
    """As prompt tuning, the embeddings made by a network that is trained with them (Liu et al. 2021, arXiv:2103.10385)."""

    Options = PTuningOptions
    summary = "A small network that makes the embeddings of tokens before every row is trained."
    formula = "y = model([g(e_1) … g(e_m); E(x)]);  g: three linear layers with ReLU between, trained with e_1 … e_m"
    source = "Liu et al. 2021, arXiv:2103.10385."
    when = "As `prompt`, where that learns slowly or depends on its start: the network ties the tokens together."
    learning_rate = 5e-3

    def config(self, model: PreTrainedModel, task: str) -> PeftConfig:
        """PEFT's configuration."""
        from peft import PromptEncoderConfig

        width = self.options.encoder_hidden_size or model.config.get_text_config().hidden_size
        return PromptEncoderConfig(
            task_type=task, num_virtual_tokens=self.num_virtual_tokens, encoder_hidden_size=width
        )


class Prefix(Prompt):
    """Frozen base that sees learned keys and values before each row, in every layer (Li and Liang 2021, arXiv:2101.00190).

    Without the network this is p-tuning v2 (Liu et al. 2022, arXiv:2110.07602).
    """

    Options = PrefixOptions
    summary = "Keys and values that every layer sees before a row are trained."
    formula = (
        "in each layer: attention(q, [P_K; K], [P_V; V]);  P_K and P_V are trained, for num_virtual_tokens positions; with "
        "`prefix_projection` a network makes them"
    )
    source = "Li and Liang 2021, arXiv:2101.00190; without the network Liu et al. 2022, arXiv:2110.07602."
    when = "As `prompt`, and more able, as every layer is told; the base answers for many tasks at once, each by its prefix."
    variants: ClassVar[Mapping[str, Variant]] = {
        "p_tuning_v2": Variant(
            options={"prefix_projection": False},
            summary="Keys and values that every layer sees before a row are trained as they are, without a network.",
            formula="in each layer: attention(q, [P_K; K], [P_V; V]);  P_K and P_V are trained",
            source="Liu et al. 2022, arXiv:2110.07602.",
            when="It is what `prefix` does unless told otherwise.",
        ),
    }
    _start: torch.Tensor | None = None

    def apply(self, model: PreTrainedModel, task: str) -> Any:
        """Wrap the model by PEFT; a language model starts from keys and values of its own, which disturb it least."""
        wrapped = super().apply(model, task)
        if self._start is not None:
            with torch.no_grad():
                wrapped.prompt_encoder["default"].embedding.weight.copy_(self._start)
        return wrapped

    def config(self, model: PreTrainedModel, task: str) -> PeftConfig:
        """PEFT's configuration."""
        from peft import PrefixTuningConfig

        options = self.options
        self._start = None if options.prefix_projection else _keys_and_values(model, task, self.num_virtual_tokens)
        width = options.encoder_hidden_size or model.config.get_text_config().hidden_size
        return PrefixTuningConfig(
            task_type=task, num_virtual_tokens=self.num_virtual_tokens, prefix_projection=options.prefix_projection,
            encoder_hidden_size=width,
        )  # fmt: skip


def _keys_and_values(model: PreTrainedModel, task: str, count: int) -> torch.Tensor | None:
    """Return keys and values of tokens drawn from the vocabulary, the first of which begins texts.

    Returns:
        Shape (count, layers * 2 * heads * width of a head), as PEFT keeps them; None for a model without such a cache.
    """
    config = model.config.get_text_config()
    if task != "CAUSAL_LM" or not hasattr(config, "num_key_value_heads"):
        return None
    ids = torch.randint(config.vocab_size, (1, count), device=model.device)
    if config.bos_token_id is not None:
        ids[0, 0] = config.bos_token_id
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    parts = [part[0].transpose(0, 1).flatten(1) for layer in cache.layers for part in (layer.keys, layer.values)]
    return torch.cat(parts, 1)
