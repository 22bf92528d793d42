"""Frozen trunk: the head alone, or with the last layers (Howard and Ruder 2018, arXiv:1801.06146, section 3.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tune_magic.errors import TuneError
from tune_magic.methods.base import Method
from tune_magic.models.layers import after, before, heads_of, layers_of, stacks_of
from tune_magic.recipe.schema import MethodOptions, QuantizationOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FreezeOptions(MethodOptions):
    """Keys of `method: freeze`."""

    name: Literal["freeze"] = Field("freeze", description="Train the head and the last layers, freeze the rest.")
    trainable_layers: int = Field(0, ge=0, description="Last layers that are trained beside the head.")


class Freeze(Method):
    """Everything is frozen but what comes after the last frozen layer.

    That is the head, and with it final norm or pooler: whatever the backbone computes after its layers. The frozen part
    only describes the rows, so it draws no dropout, and its outputs can be kept from one epoch to the next.
    """

    Options = FreezeOptions
    in_place = True
    summary = "The last layers and what follows them, a final norm or pooler and a classifier's head, are trained; the rest is frozen."
    formula = (
        "h = layer_(n−k)(… layer_1(x)), frozen;  y = head(norm(layer_n(… layer_(n−k+1)(h)))), trained;  "
        "k = trainable_layers"
    )
    source = "Donahue et al. 2014 (DeCAF), arXiv:1310.1531; of language models Howard and Ruder 2018, arXiv:1801.06146."
    when = (
        "A classifier with few rows, on a model that knows such texts: the frozen layers are computed once for all epochs. "
        "A language model has no head of its own and needs `trainable_layers` of 1 or more."
    )
    learning_rate = 1e-3

    def why_not_on(self, base: QuantizationOptions) -> str | None:
        """A head can be trained on any base, rounded layers cannot."""
        return super().why_not_on(base) if self.options.trainable_layers else None

    def apply(self, model: PreTrainedModel, task: str) -> PreTrainedModel:
        """Freeze the trunk.

        Raises:
            TuneError: Nothing would be trained, the model has fewer layers, or it is an encoder with a decoder.
        """
        count = self.options.trainable_layers
        if len(stacks_of(model)) > 1:
            raise TuneError(
                "`freeze` is for models that are one stack of layers; this one has an encoder and a decoder.",
                hint="`method: lora` goes to both; `unfreeze` trains the decoder's layers first, then the encoder's.",
            )
        if task == "CAUSAL_LM" and not count:
            raise TuneError(
                "A language model has no head of its own to train.", hint="Try `trainable_layers: 2` with `freeze`."
            )
        layers = layers_of(model)
        if count > len(layers):
            raise TuneError(f"`trainable_layers` must be at most {len(layers)}, the model's layers, got {count}.")
        model.requires_grad_(False)
        top = [layers[number] for number in range(len(layers) - count, len(layers))]
        for module in (*top, *after(model, layers), *heads_of(model, task)):
            module.requires_grad_(True)
        return model

    def to_training(self, model: Any) -> None:
        """Put what is trained into training mode, and the frozen part into evaluation mode."""
        model.train()
        layers = layers_of(model)
        frozen = len(layers) - self.options.trainable_layers
        for module in (*before(model, layers), *layers[:frozen]):
            module.eval()
