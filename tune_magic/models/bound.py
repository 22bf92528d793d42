"""Linear layers whose weights are bound while they are trained: to zeros, to few values, to a grid.

What is trained stays a parameter of its own; `free` puts plain layers with the resulting weights in their places.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

BLOCK = 32  # weights along the inputs that share a scale, as in ONNX Runtime's MatMulNBits and GGUF's Q4_0
_KEPT = "kept_weights"


class RoundedInTraining(nn.Linear):
    """A linear layer that is computed with its matrix rounded; the gradient passes to the matrix before rounding.

    Jacob et al. 2018, arXiv:1712.05877, with the straight-through estimator (Bengio et al. 2013, arXiv:1308.3432).
    Activations are not rounded.
    """

    rebuilds_matrix = True
    bits: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., inputs) to (..., outputs)."""
        return _product(x, self.weight, self)

    def dense(self, source: torch.Tensor) -> torch.Tensor:
        """Return the matrix that is computed with, (outputs, inputs)."""
        return on_grid(source, self.bits)

    def back(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient of what is trained from that of the matrix."""
        return gradient


class SharedValues(nn.Module):
    """A linear layer whose matrix has few distinct values; they are trained, which weight has which is not.

    Han et al. 2016, arXiv:1510.00149: the gradient of a value is the sum over the weights that have it.

    Args:
        values: (K,) distinct values.
        places: (outputs, inputs) uint8: which weight has which; where `has_zero`, 0 stands for zero, and others count from 1.
        bias: (outputs,), or None.
        has_zero: Zero is a value that is not trained.
    """

    rebuilds_matrix = True

    def __init__(
        self, values: torch.Tensor, places: torch.Tensor, bias: nn.Parameter | None, *, has_zero: bool
    ) -> None:
        super().__init__()
        self.codebook = nn.Parameter(values)
        self.codebook.is_matrix = True  # type: ignore[attr-defined] # decayed as the matrix that it stands for
        self.register_buffer("places", places, persistent=False)
        self.bias = bias
        self.has_zero = has_zero
        self.out_features, self.in_features = places.shape

    @property
    def weight(self) -> torch.Tensor:
        """The matrix, (outputs, inputs)."""
        return self.dense(self.codebook)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., inputs) to (..., outputs)."""
        return _product(x, self.codebook, self)

    def dense(self, source: torch.Tensor) -> torch.Tensor:
        """Return the matrix for values, (outputs, inputs)."""
        values = functional.pad(source, (1, 0)) if self.has_zero else source
        places: Any = self.places
        return values.index_select(0, places.flatten().int()).view(places.shape)

    def back(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the values from that of the matrix."""
        places: Any = self.places
        skipped = int(self.has_zero)
        sums = torch.bincount(
            places.flatten(), weights=gradient.float().flatten(), minlength=len(self.codebook) + skipped
        )
        return sums[skipped:]


def _product(x: torch.Tensor, source: torch.Tensor, layer: Any) -> torch.Tensor:
    """Return x W' + b, W' the layer's matrix made of `source`; it is made again for the backward pass, not kept."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    bias = None if layer.bias is None else layer.bias.to(dtype)
    result: torch.Tensor = _Product.apply(x.to(dtype), source, bias, layer)  # type: ignore[no-untyped-call]
    return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, source: torch.Tensor, bias: torch.Tensor | None, layer: Any) -> torch.Tensor:
        ctx.save_for_backward(x, source)
        ctx.layer = layer
        return functional.linear(x, layer.dense(source).to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, source = ctx.saved_tensors
        of_x = of_source = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ ctx.layer.dense(source).to(gradient.dtype)
        rows = gradient.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            of_source = ctx.layer.back(rows.t() @ x.flatten(0, -2)).to(source.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        return of_x, of_source, of_bias, None


def on_grid(matrix: torch.Tensor, bits: int) -> torch.Tensor:
    """Return a matrix rounded in blocks of 32 inputs with a scale each, as ONNX Runtime's MatMulNBits does when symmetric.

    Of a block, the number that is largest without its sign becomes -2^(bits - 1); rounding again changes nothing.

    Args:
        matrix: (outputs, inputs).
        bits: 4 or 8.
    """
    outputs, inputs = matrix.shape
    half = 2 ** (bits - 1)
    blocks = functional.pad(matrix.detach().float(), (0, -inputs % BLOCK)).view(outputs, -1, BLOCK)
    least, most = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    scale = torch.where(most > -least, most, least) / -half
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    rounded = (blocks / scale).round_().clamp_(-half, half - 1).mul_(scale)
    return rounded.view(outputs, -1)[:, :inputs].to(matrix.dtype)


def round_in_training(layer: nn.Linear, bits: int) -> RoundedInTraining:
    """Return a layer with the same parameters that is computed with its matrix rounded."""
    with torch.device("meta"):
        found = RoundedInTraining(layer.in_features, layer.out_features, bias=layer.bias is not None)
    found.weight, found.bias, found.bits = layer.weight, layer.bias, bits
    return found.train(layer.training)


def k_means(numbers: torch.Tensor, count: int, passes: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the means of so many clusters of numbers, ascending, and which cluster each number is of.

    Lloyd's algorithm from evenly spaced means (the start that Han et al. found best). Sorted numbers make clusters
    intervals, so that a pass takes no longer than looking up their ends.

    Args:
        numbers: Any shape.
        count: Of clusters; one that is empty keeps its mean.
        passes: At most so many.
    """
    ordered = numbers.flatten().double().sort().values
    sums = functional.pad(ordered.cumsum(0), (1, 0))
    means = torch.linspace(float(ordered[0]), float(ordered[-1]), count, dtype=torch.float64, device=ordered.device)
    for _ in range(passes):
        ends = torch.searchsorted(ordered, (means[1:] + means[:-1]) / 2)
        edges = functional.pad(ends, (1, 0))
        edges = torch.cat([edges, edges.new_tensor([len(ordered)])])
        sizes = edges.diff()
        better = torch.where(sizes > 0, sums[edges].diff() / sizes.clamp_min(1), means)
        if torch.equal(better, means):
            break
        means = better
    means = means.to(numbers.dtype)
    return means, torch.bucketize(numbers, (means[1:] + means[:-1]) / 2)


def keep_zeros(layer: Any, kept: torch.Tensor) -> None:
    """Set the weights of a linear layer to zero that are not kept, now and whenever `mask_weights` is called.

    Args:
        layer: With a `weight`.
        kept: Of the shape of that, bool.
    """
    layer.register_buffer(_KEPT, kept, persistent=False)
    with torch.no_grad():
        layer.weight.mul_(kept)


def masked_layers(model: nn.Module) -> list[Any]:
    """Return the layers that keep zeros."""
    return [module for module in model.modules() if _KEPT in module._buffers]


def mask_gradients(layers: list[Any]) -> None:
    """Let the gradient of what is zero be zero, before gradients are clipped and optimizers count them."""
    for layer in layers:
        if layer.weight.grad is not None:
            layer.weight.grad.mul_(layer.kept_weights)


@torch.no_grad()
def mask_weights(layers: list[Any]) -> None:
    """Set to zero what an optimizer moved: those with states in 8 bits may."""
    for layer in layers:
        layer.weight.mul_(layer.kept_weights)


def free(model: nn.Module) -> None:
    """Put plain linear layers in the place of all that are bound, with the weights they compute with, in place."""
    for layer in masked_layers(model):
        delattr(layer, _KEPT)
    for path, layer in [
        item for item in model.named_modules() if isinstance(item[1], RoundedInTraining | SharedValues)
    ]:
        source = layer.weight if isinstance(layer, RoundedInTraining) else layer.codebook
        with torch.device("meta"):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight = nn.Parameter(layer.dense(source).detach(), requires_grad=source.requires_grad)
        plain.bias = layer.bias
        model.set_submodule(path, plain.train(layer.training))
