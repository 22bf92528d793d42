"""Bottleneck adapters in a frozen model (Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021, arXiv:2005.00247).

Where a block hands its result to the residual stream, by its last linear layer, the adapter adds a small network of it:
y + W_up f(W_down y). W_up starts as zero, so the model starts as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from tune_magic.errors import TuneError
from tune_magic.methods.base import Method
from tune_magic.models.layers import heads_of, stacks_of
from tune_magic.recipe.schema import MethodOptions
from tune_magic.recipe.variant import Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION = "att"  # in the name of every attention block
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
}


class BottleneckOptions(MethodOptions):
    """Keys of `method: bottleneck`."""

    name: Literal["bottleneck"] = Field("bottleneck", description="Train small networks between frozen blocks.")
    placement: Literal["houlsby", "pfeiffer"] = Field(
        "pfeiffer", description="After attention and feed-forward of each layer, or after the feed-forward alone."
    )
    bottleneck_size: int = Field(48, ge=1, description="Width of the small networks.")
    activation: Literal["relu", "gelu", "silu"] = Field("gelu", description="What they compute in between.")


class Adapter(nn.Module):
    """A linear layer and, after it, a bottleneck.

    Args:
        base_layer: The frozen layer, (..., inputs) to (..., width).
        width: Of what it gives.
        options: The method's.
    """

    def __init__(self, base_layer: nn.Module, width: int, options: BottleneckOptions) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(width, options.bottleneck_size)  # in float32, as PEFT keeps what is trained
        self.up = nn.Linear(options.bottleneck_size, width)
        self.activation = _ACTIVATIONS[options.activation]
        self.is_on = True
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., inputs) to (..., width)."""
        y: torch.Tensor = self.base_layer(x)
        if not self.is_on:
            return y
        added: torch.Tensor = self.up(self.activation(self.down(y.to(self.down.weight.dtype))))
        return y + added.to(y.dtype)


class Bottleneck(Method):
    """Frozen base with small trained networks after its blocks, and a classifier's new head."""

    Options = BottleneckOptions
    summary = "Small networks after the blocks of each frozen layer are trained."
    formula = (
        "y′ = y + W_up f(W_down y + b_down) + b_up, where a block hands y to the residual stream;  W_up = 0 and b_up = 0 at "
        "the start"
    )
    source = "Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021, arXiv:2005.00247."
    when = (
        "Encoders that classify, and tasks for which LoRA's linear change is not enough. It cannot be merged, so answers "
        "cost a little more."
    )
    learning_rate = 3e-4
    variants: ClassVar[Mapping[str, Variant]] = {
        "houlsby": Variant(
            options={"placement": "houlsby"},
            summary="A small network after the attention and one after the feed-forward block of each layer are trained.",
            formula="y′ = y + W_up f(W_down y + b_down) + b_up, for y of attention and y of feed-forward",
            source="Houlsby et al. 2019, arXiv:1902.00751.",
            when="Twice the parameters of `pfeiffer`, where its score falls short.",
        ),
        "pfeiffer": Variant(
            options={"placement": "pfeiffer"},
            summary="A small network after the feed-forward block of each layer is trained.",
            formula="y′ = y + W_up f(W_down y + b_down) + b_up, for y of feed-forward alone",
            source="Pfeiffer et al. 2021, arXiv:2005.00247.",
            when="It is what `bottleneck` does unless told otherwise: half the parameters of `houlsby`.",
        ),
    }
    merges = False
    adds = True

    def apply(self, model: PreTrainedModel, task: str) -> Any:
        """Put the adapters into the layers; a head that is new is trained too.

        Raises:
            TuneError: The layers have no blocks that end in a linear layer.
        """
        model.requires_grad_(False)
        self.adds = task == "CAUSAL_LM"  # a head that is trained is not as it was
        for layer in (layer for stack in stacks_of(model) for layer in stack):
            ends = last_linear_layers(layer)
            if self.options.placement == "pfeiffer":
                ends = ends[-1:]
            for parent, name, width in ends:
                setattr(parent, name, Adapter(getattr(parent, name), width, self.options))
        for head in heads_of(model, task):
            head.requires_grad_(True)
        return model

    @contextlib.contextmanager
    def without(self, model: Any) -> Iterator[None]:
        """The base model: the adapters are passed by."""
        adapters = [module for module in model.modules() if isinstance(module, Adapter)]
        for adapter in adapters:
            adapter.is_on = False
        try:
            yield
        finally:
            for adapter in adapters:
                adapter.is_on = True

    def merge(self, model: Any) -> PreTrainedModel:
        """A network that bends cannot be folded into a linear layer."""
        raise TuneError(
            "Bottleneck adapters are networks of their own; they cannot be folded into the model.",
            hint="`run.load()` gives the model with its adapters; `lora` can be merged.",
        )


def last_linear_layers(layer: nn.Module) -> list[tuple[nn.Module, str, int]]:
    """Return the last linear layer of each attention block, and of the rest of a layer at the end: parent, name, outputs.

    Raises:
        TuneError: One of them has none.
    """
    found: dict[str, tuple[nn.Module, str, int]] = {}
    for path, module in layer.named_modules():
        width = _outputs(module)
        if width is not None:
            parent, _, name = path.rpartition(".")
            found[_attention_of(path)] = (layer.get_submodule(parent), name, width)
    rest = found.pop("", None)
    if rest is None or not found:
        raise TuneError(
            "The layers of this model have no attention and feed-forward blocks that end in a linear layer.",
            hint="`method: lora` goes to any linear layer.",
        )
    return [*found.values(), rest]


def _attention_of(path: str) -> str:
    """Return the path of the attention block that a module is in; empty where it is in none.

    Example:
        >>> _attention_of("layer.1.EncDecAttention.o")
        'layer.1.EncDecAttention'
    """
    parts = path.split(".")
    place = next((number for number, part in enumerate(parts, start=1) if _ATTENTION in part.lower()), 0)
    return ".".join(parts[:place])


def _outputs(module: nn.Module) -> int | None:
    """Return the outputs of a linear layer, Transformers' Conv1D of GPT-2 included."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return module.out_features
    return int(module.nf) if isinstance(module, Conv1D) else None
