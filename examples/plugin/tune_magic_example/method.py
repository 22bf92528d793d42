"""A method: one trained factor for each output of the linear layers of the attention and the feed-forward parts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field

from tune_magic.methods.base import Method
from tune_magic.models.layers import heads_of, layers_of
from tune_magic.recipe.schema import MethodOptions


class OutputScaleOptions(MethodOptions):
    """Keys of `method: output_scale`."""

    name: Literal["output_scale"] = Field("output_scale", description="Train a factor for each output of a layer.")
    start: float = Field(1.0, gt=0, description="What every factor is at first; 1 leaves the model as it is.")


class Scaled(torch.nn.Module):
    """A linear layer whose outputs are multiplied."""

    def __init__(self, linear: torch.nn.Linear, start: float) -> None:
        super().__init__()
        self.linear = linear
        self.factor = torch.nn.Parameter(torch.full((linear.out_features,), start, dtype=torch.float32))
        self.is_on = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (Wx + b) * factor."""
        y = self.linear(x)
        return y * self.factor.to(y.dtype) if self.is_on else y


class OutputScale(Method):
    """Factors of outputs, the base frozen."""

    Options = OutputScaleOptions
    summary = "One factor for each output of every linear layer; everything else stays frozen."
    formula = "y = s * (W x + b), s trained"
    source = "Lian et al. 2022, Scaling and Shifting Your Features, arXiv:2210.08823 (without the shift)"
    when = "Very few parameters, next to nothing to store, and the result merges into the weights."

    def apply(self, model: Any, task: str) -> Any:
        """Put a factor behind every linear layer of the blocks; a head that is new is trained too."""
        model.requires_grad_(False)
        for block in layers_of(model):
            for name, module in list(block.named_modules()):
                if isinstance(module, torch.nn.Linear):
                    parent, _, own = name.rpartition(".")
                    setattr(block.get_submodule(parent), own, Scaled(module, self.options.start))
        for head in heads_of(model, task):
            head.requires_grad_(True)
        self.adds = task == "CAUSAL_LM"  # a head that is trained in place is not as it was
        return model

    def merge(self, model: Any) -> Any:
        """Multiply the rows of each matrix by their factors."""
        for parent in list(model.modules()):
            for name, module in list(parent.named_children()):
                if isinstance(module, Scaled):
                    with torch.no_grad():
                        module.linear.weight.mul_(module.factor[:, None])
                        if module.linear.bias is not None:
                            module.linear.bias.mul_(module.factor)
                    setattr(parent, name, module.linear)
        return model

    @contextlib.contextmanager
    def without(self, model: Any) -> Iterator[None]:
        """The base: no factor counts."""
        layers = [module for module in model.modules() if isinstance(module, Scaled)]
        for layer in layers:
            layer.is_on = False
        try:
            yield
        finally:
            for layer in layers:
                layer.is_on = True
