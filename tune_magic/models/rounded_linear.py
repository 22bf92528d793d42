"""Linear layers whose matrix is kept in 4 or 8 bits by bitsandbytes, and multiplied as it is after rounding.

bitsandbytes' own forward passes round activations too, to 8 bits, or on processors with AVX512-BF16 to bfloat16 from
the first evaluation on. Importing this module imports bitsandbytes, which takes seconds.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
from bitsandbytes import functional as bnb
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tune_magic.recipe.schema import QuantizationOptions


class Linear4bit(bitsandbytes.nn.Linear4bit):  # PEFT knows them by this name
    """A frozen linear layer, its matrix in blocks of 64 numbers of 4 bits with a scale each.

    Attributes:
        original: The matrix before rounding, (outputs, inputs), where a method still has to read it.
    """

    rounded = True
    original: torch.Tensor | None = None

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the rounded matrix, (outputs, inputs)."""
        matrix: torch.Tensor = bnb.dequantize_4bit(self.weight.data, self.weight.quant_state)
        return matrix.to(dtype)

    def scale_bytes(self) -> int:
        """Return what the scales take."""
        state = self.weight.quant_state
        tensors = [state.absmax, *([state.offset, state.state2.absmax] if state.nested else [])]
        return sum(tensor.nbytes for tensor in tensors)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., inputs) to (..., outputs)."""
        result: torch.Tensor = super().forward(x) if x.is_cuda else product(x, self)
        return result


class Linear8bitLt(bitsandbytes.nn.Linear8bitLt):
    """A frozen linear layer, its matrix in 8 bits with one scale a row.

    Attributes:
        original: The matrix before rounding, (outputs, inputs), where a method still has to read it.
    """

    rounded = True
    original: torch.Tensor | None = None

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the rounded matrix, (outputs, inputs)."""
        matrix: torch.Tensor = self.weight.data.to(dtype)
        return matrix.mul_(self.weight.SCB.unsqueeze(1).mul(1 / 127))

    def scale_bytes(self) -> int:
        """Return what the scales take."""
        return int(self.weight.SCB.nbytes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., inputs) to (..., outputs)."""
        return product(x, self)


def product(x: torch.Tensor, layer: Any) -> torch.Tensor:
    """Return x W' + b; of a layer's matrix nothing but the packed form is kept for the backward pass."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    bias = None if layer.bias is None else layer.bias.to(dtype)
    result: torch.Tensor = _Product.apply(x.to(dtype), layer, bias)  # type: ignore[no-untyped-call]
    return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.dense(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        bias_gradient = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return gradient @ ctx.layer.dense(gradient.dtype), None, bias_gradient


def rounded(
    matrix: torch.Tensor, bias: torch.Tensor | None, options: QuantizationOptions, dtype: torch.dtype,
    device: torch.device,
) -> Any:  # fmt: skip
    """Return a quantised layer.

    Args:
        matrix: (outputs, inputs); it is rounded from float32, whatever precision it has.
        bias: (outputs,), or None.
        options: How.
        dtype: Precision of the bias, and of the matrix when a product needs it on a GPU.
        device: Where it goes.
    """
    (outputs, inputs), weight = matrix.shape, matrix.float().contiguous()
    nested = options.quantizes_scales
    layer: Any
    with torch.device("meta"):
        if options.is_4bit:
            layer = Linear4bit(inputs, outputs, bias is not None, dtype, nested, options.kind)
        else:
            layer = Linear8bitLt(inputs, outputs, bias is not None, has_fp16_weights=False)
    if options.is_4bit:
        packed = bitsandbytes.nn.Params4bit(
            weight, requires_grad=False, compress_statistics=nested, quant_type=options.kind, module=layer
        )
        layer.weight = packed.to(device)
        layer.weight.quant_state.dtype = dtype
    else:
        layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(device)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(device, dtype), requires_grad=False)
    return layer
