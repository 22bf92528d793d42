"""A linear layer with LoRA beside it, computed as one function instead of eight operations.

y = x W' + b + s (x A') B' with A (r, inputs), B (outputs, r) and s = alpha / r. The low-rank part is added onto the big
product by the matrix product itself, so nothing of the layer's size is read or written again; only x and x A' are kept
for the backward pass, which writes the two small gradients directly. A matrix in 4 or 8 bits is unpacked in either pass.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch.autograd.function import once_differentiable


class _Fused(lora.LoraLayer):
    """A LoRA layer of PEFT's, with a forward pass of our own wherever it would compute the same."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map (..., inputs) to (..., outputs)."""
        if args or kwargs or not self._is_plain(x):
            result: torch.Tensor = super().forward(x, *args, **kwargs)
            return result
        (name,) = self.active_adapters
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        base = self.base_layer
        weight = base if getattr(base, "rounded", False) else base.weight
        fused: torch.Tensor = _LoraLinear.apply(x, weight, base.bias, down, up, self.scaling[name])  # type: ignore[no-untyped-call]
        return fused

    def _is_plain(self, x: torch.Tensor) -> bool:
        """Whether exactly one adapter without dropout is on, and nothing is computed in another precision."""
        names = self.active_adapters
        if self.disable_adapters or self.merged or len(names) != 1 or names[0] not in self.lora_A:
            return False
        name, base = names[0], self.base_layer
        dropout = self.lora_dropout[name]
        draws = self.training and not isinstance(dropout, torch.nn.Identity)
        weights = [self.lora_A[name].weight, self.lora_B[name].weight]
        if not getattr(base, "rounded", False):  # one that is unpacked has any precision
            weights.append(base.weight)
        return (
            not draws
            and name not in self.lora_variant
            and not torch.is_autocast_enabled(x.device.type)
            and all(weight.dtype == x.dtype for weight in weights)
            and not base.weight.requires_grad
        )


class FusedLoraLinear(_Fused, lora.Linear):
    """The same over a plain linear layer."""


class FusedLora4bit(_Fused, lora.Linear4bit):
    """The same over a linear layer in 4 bits."""


class FusedLora8bit(_Fused, lora.Linear8bitLt):
    """The same over a linear layer in 8 bits."""


_FUSED = {lora.Linear: FusedLoraLinear, lora.Linear4bit: FusedLora4bit, lora.Linear8bitLt: FusedLora8bit}


def fuse(model: torch.nn.Module) -> int:
    """Make every LoRA layer over a plain linear one, or over one of our rounded ones, a fused one; returns how many."""
    found = [m for m in model.modules() if type(m) in _FUSED and _is_known(m.base_layer)]
    for module in found:
        module.__class__ = _FUSED[type(module)]  # the same state, so that PEFT saves and merges it as it does its own
    return len(found)


def _is_known(layer: Any) -> bool:
    return type(layer) is torch.nn.Linear or getattr(layer, "rounded", False)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, base: Any, bias: torch.Tensor | None, down: torch.Tensor, up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:  # fmt: skip
        is_rounded = not isinstance(base, torch.Tensor)
        weight = base.dense(x.dtype) if is_rounded else base
        rows = x.reshape(-1, x.shape[-1])
        result = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
        low = torch.mm(rows, down.t())
        result.addmm_(low, up.t(), alpha=scale)
        ctx.save_for_backward(rows, low, None if is_rounded else weight, down, up)
        ctx.scale, ctx.shape, ctx.rounded = scale, x.shape, base if is_rounded else None
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        rows, low, weight, down, up = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        low_gradient = torch.mm(gradient, up).mul_(ctx.scale)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            weight = weight if ctx.rounded is None else ctx.rounded.dense(gradient.dtype)
            x_gradient = torch.mm(gradient, weight).addmm_(low_gradient, down).view(ctx.shape)
        up_gradient = torch.mm(gradient.t(), low).mul_(ctx.scale)
        return x_gradient, None, None, torch.mm(low_gradient.t(), rows), up_gradient, None
