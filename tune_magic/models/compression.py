"""A model made smaller before it is trained: what was chosen is put on it in the same way whenever it is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tune_magic.errors import TuneError
from tune_magic.models.layers import layers_of
from tune_magic.models.quantise import linear_layers
from tune_magic.models.shrink import check_one_stack, shrink
from tune_magic.recipe.schema import CompressOptions

if TYPE_CHECKING:
    import torch
    from torch import nn

MASK, PLACES, VALUES = "mask/", "places/", "values/"  # of a linear layer's name, in `Compression.tensors`
_FLOAT_BITS = 32
_SCALE_BITS = 0.5  # a weight's share of the 16 bits that a block of 32 has for its scale


@dataclass
class Compression:
    """What was chosen for a run.

    Attributes:
        options: The recipe's.
        kept: Layers, neurons and heads that stay, see `shrink`.
        tensors: By kind and name of a linear layer: the bits of a mask (packed, eight in a byte), which weight has which
            value, and the values at the start.
        facts: What a plan says of it, JSON-ready.
    """

    options: CompressOptions
    kept: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def apply(self, model: Any) -> None:
        """Make a model, as it was loaded, the compressed one, in place.

        Raises:
            TuneError: It is not of a kind that can be.
        """
        self.reshape(model)
        if self.options.constrains:
            for path, layer in bindable(model, self.options):
                self._bind(model, path, layer)
        if self.options.tie_layers is not None:
            tie(model, self.options.tie_layers)  # layers that were put in the place of others, too

    def reshape(self, model: Any) -> None:
        """Take out what does not stay, and tie layers: what masks and values are chosen for."""
        if self.options.reshapes or self.options.tie_layers is not None:
            check_one_stack(model)
        shrink(model, self.kept)
        if self.options.tie_layers is not None:
            tie(model, self.options.tie_layers)

    def _bind(self, model: Any, path: str, layer: Any) -> None:
        from tune_magic.models import bound

        mask = self.tensors.get(f"{MASK}{path}")
        if self.options.share_weights is not None:
            values, places = self.tensors[f"{VALUES}{path}"], self.tensors[f"{PLACES}{path}"]
            shared = bound.SharedValues(
                values.to(layer.weight.device, layer.weight.dtype), places.to(layer.weight.device), layer.bias,
                has_zero=self.options.prunes_weights,
            )  # fmt: skip
            model.set_submodule(path, shared.train(layer.training))
            return
        if self.options.rounds:
            layer = bound.round_in_training(layer, self.options.bits)
            model.set_submodule(path, layer)
        if mask is not None:
            bound.keep_zeros(layer, unpack(mask, layer.weight.shape).to(layer.weight.device))


def release(model: Any, options: CompressOptions) -> None:
    """Give a compressed model plain layers with the weights it computes with, in place; tied layers become copies.

    Every reader of a tuned model sees it so: Transformers' configuration knows no bound weights.
    """
    from torch import nn

    from tune_magic.models import bound

    if options.constrains:
        bound.free(model)
    if options.tie_layers is not None:
        seen: set[int] = set()
        for layer in layers_of(model):
            for owner, name, parameter in list(_parameters(layer)):
                if id(parameter) in seen:
                    own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                    setattr(owner, name, own)
                else:
                    seen.add(id(parameter))


def bindable(model: Any, options: CompressOptions) -> list[tuple[str, Any]]:
    """Return the linear layers of a model's stacks whose weights can be bound, with their names.

    Raises:
        TuneError: There is none, or one of another form.
    """
    from torch import nn

    found = linear_layers(model)
    others = [path for path, layer in found if not isinstance(layer, nn.Linear)]
    keys = [key for key in options.constrains if key in ("share_weights", "quantize_aware")]
    if keys and others:
        raise TuneError(
            f"`{keys[0]}` is for linear layers, and {others[0]} is GPT-2's Conv1D.", hint="Try `prune_weights: 0.5`."
        )
    if not found:
        raise TuneError("This model's layers have no linear layers whose weights `compress` could bind.")
    return found


def tie(model: Any, size: int) -> None:
    """Give each group of `size` neighbouring layers the parameters of its first, in place.

    Raises:
        TuneError: Neighbours are of different shapes.
    """
    layers = list(layers_of(model))
    for number, layer in enumerate(layers):
        first = layers[number - number % size]
        if first is layer:
            continue
        theirs, ours = list(_parameters(first)), list(_parameters(layer))
        if [(name, p.shape) for _, name, p in theirs] != [(name, p.shape) for _, name, p in ours]:
            raise TuneError(
                f"`tie_layers: {size}` needs neighbours of one shape, and layers {number - number % size} and {number} differ.",
                hint="Leave it out; `drop_layers` makes the model smaller too.",
            )
        for (owner, name, _), (_, _, parameter) in zip(ours, theirs, strict=True):
            setattr(owner, name, parameter)


def _parameters(layer: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield (owner, its name there, parameter) of all parameters of a layer, in order."""
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield module, name, parameter


def pack(mask: torch.Tensor) -> torch.Tensor:
    """Return a mask as bytes, eight weights each."""
    import numpy as np
    import torch

    return torch.from_numpy(np.packbits(mask.cpu().numpy().ravel()))


def unpack(packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return the mask of a shape."""
    import numpy as np
    import torch

    bits = np.unpackbits(packed.cpu().numpy(), count=math.prod(shape))
    return torch.from_numpy(bits.astype(bool)).view(shape)


def sizes(model: Any, options: CompressOptions) -> dict[str, Any]:
    """Return how large a compressed model is, JSON-ready.

    ``parameters`` of the model as others load it; ``distinct`` of them that are not copies; ``zeros`` of these;
    ``packed_bytes``, an estimate of what they take where zeros, shared values and rounded weights are stored as such: a
    bit for whether a weight is zero, the number of its value, or its 4 or 8 bits and scales; float32 else.

    Args:
        model: That `Compression.apply` was applied to, before any method.
        options: The recipe's.
    """
    from tune_magic.models import bound

    in_layers = {id(layer) for _, layer in [*linear_layers(model), *_bound_layers(model)]}
    seen: set[int] = set()
    found = {"parameters": 0, "distinct": 0, "zeros": 0}
    bits = 0.0
    for module in model.modules():
        own = [*module._parameters.values()]
        if isinstance(module, bound.SharedValues):
            own = [module.bias]
            count, is_new = module.places.numel(), id(module.codebook) not in seen  # type: ignore[operator]
            seen.add(id(module.codebook))
            found["parameters"] += count
            if is_new:
                found["distinct"] += count
                found["zeros"] += int((module.dense(module.codebook) == 0).sum())
                levels = len(module.codebook) + module.has_zero
                bits += count * math.ceil(math.log2(levels)) + _FLOAT_BITS * len(module.codebook)
        for parameter in own:
            if parameter is None:
                continue
            is_matrix = id(module) in in_layers and parameter is module.weight
            found["parameters"] += parameter.numel()
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            zeros = int((parameter == 0).sum()) if is_matrix and options.prunes_weights else 0
            found["distinct"] += parameter.numel()
            found["zeros"] += zeros
            each = (options.bits + _SCALE_BITS) if is_matrix and options.rounds else _FLOAT_BITS
            bits += (parameter.numel() - zeros) * each
            bits += parameter.numel() if is_matrix and options.prunes_weights else 0
    return {**found, "packed_bytes": round(bits / 8)}


def _bound_layers(model: Any) -> list[tuple[str, Any]]:
    from tune_magic.models.bound import RoundedInTraining

    return [item for item in model.named_modules() if isinstance(item[1], RoundedInTraining)]
