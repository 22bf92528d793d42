"""Frozen trunk: the head alone, or with the last layers (Howard and Ruder 2018, arXiv:1801.06146, section 3.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tune_magic.errors import TuneError
from tune_magic.methods.base import Method
from tune_magic.recipe.schema import MethodOptions

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class FreezeOptions(MethodOptions):
    """Keys of `method: freeze`."""

    name: Literal["freeze"] = Field("freeze", description="Train the head and the last layers, freeze the rest.")
    trainable_layers: int = Field(0, ge=0, description="Last layers that are trained beside the head.")


class Freeze(Method):
    """Everything is frozen but what comes after the last frozen layer.

    That is the head, and with it final norm or pooler: whatever the backbone computes after its layers.
    """

    Options = FreezeOptions

    def apply(self, model: PreTrainedModel, task: str) -> PreTrainedModel:
        """Freeze the trunk."""
        count = self.options.trainable_layers
        if task == "CAUSAL_LM" and not count:
            raise TuneError(
                "A language model has no head of its own to train.", hint="Try `trainable_layers: 2` with `freeze`."
            )
        layers = layers_of(model)
        if count > len(layers):
            raise TuneError(f"`trainable_layers` must be at most {len(layers)}, the model's layers, got {count}.")
        model.requires_grad_(False)
        top = [layers[number] for number in range(len(layers) - count, len(layers))]
        for module in (*top, *_after(model, layers), *_head(model, task)):
            module.requires_grad_(True)
        return model


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the stack of layers of a Transformers model: its longest list of modules."""
    from torch import nn

    stacks = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
    return max(stacks, key=len)


def _after(model: PreTrainedModel, layers: nn.ModuleList) -> list[nn.Module]:
    """Modules of the backbone that it defines after its layers: a final norm, a pooler."""
    from torch import nn

    children = list(model.base_model.children())
    place = next(number for number, child in enumerate(children) if any(m is layers for m in child.modules()))
    return [child for child in children[place + 1 :] if not isinstance(child, nn.Embedding)]


def _head(model: PreTrainedModel, task: str) -> list[nn.Module]:
    """Modules beside the backbone; a language model's output matrix may be its embedding and stays frozen."""
    return [] if task == "CAUSAL_LM" else [child for child in model.children() if child is not model.base_model]
