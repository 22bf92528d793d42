"""A linear layer with LoRA beside it, computed as one function instead of eight operations.

y = x W' + b + s (x A') B' with A (r, inputs), B (outputs, r) and s = alpha / r. The low-rank part is added onto the big
product by the matrix product itself, so nothing of the layer's size is read or written again; only x and x A' are kept
for the backward pass, which writes the two small gradients directly. A matrix in 4 or 8 bits is unpacked in either pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

_FUSED: dict[type[Any], type[Any]] = {}  # by PEFT's
_KINDS = ("Linear", "Linear4bit", "Linear8bitLt")


def fused(layer: type[Any]) -> type[Any]:
    """Return a kind of PEFT's LoRA layer with a forward pass of our own wherever it would compute the same."""
    if layer not in _FUSED:
        _FUSED[layer] = _fused(layer)
    return _FUSED[layer]


def _fused(layer: type[Any]) -> type[Any]:
    class Fused(layer):  # one base alone: a layer of PEFT's becomes one of these
        _is_plain = _computes_plainly

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            """Map (..., inputs) to (..., outputs)."""
            if args or kwargs or not self._is_plain(x):
                result: torch.Tensor = super().forward(x, *args, **kwargs)
                return result
            (name,) = self.active_adapters
            down, up = self.lora_A[name].weight, self.lora_B[name].weight
            base = self.base_layer
            matrix = base if _is_rounded(base) else base.weight
            fused: torch.Tensor = _LoraLinear.apply(x, matrix, base.bias, down, up, self.scaling[name])  # type: ignore[no-untyped-call]
            return fused

    Fused.__name__ = f"Fused{layer.__name__}"  # PEFT tells by the name that another adapter can go beside it
    return Fused


def _computes_plainly(layer: Any, x: torch.Tensor) -> bool:
    """Whether exactly one adapter without dropout is on, and nothing is computed in another precision."""
    names = layer.active_adapters
    if layer.disable_adapters or layer.merged or len(names) != 1 or names[0] not in layer.lora_A:
        return False
    name, base = names[0], layer.base_layer
    dropout = layer.lora_dropout[name]
    draws = layer.training and not isinstance(dropout, torch.nn.Identity)
    weights = [layer.lora_A[name].weight, layer.lora_B[name].weight]
    if not _is_rounded(base):  # one that is unpacked has any precision
        weights.append(base.weight)
    return (
        not draws
        and name not in layer.lora_variant
        and not torch.is_autocast_enabled(x.device.type)
        and all(weight.dtype == x.dtype for weight in weights)
        and not base.weight.requires_grad
    )


def _is_known(kind: type[Any]) -> bool:
    """Whether a layer is one of PEFT's that are computed so; those of bitsandbytes are known by name, not imported."""
    return kind.__module__.startswith("peft.tuners.lora.") and kind.__name__ in _KINDS


def _is_rounded(layer: Any) -> bool:
    return bool(getattr(layer, "rounded", False))


def fuse(model: torch.nn.Module) -> int:
    """Make every LoRA layer over a plain linear one, or over one of our rounded ones, a fused one; returns how many."""
    found = [module for module in model.modules() if _is_known(type(module))]
    found = [m for m in found if type(m.base_layer) is torch.nn.Linear or _is_rounded(m.base_layer)]
    for module in found:
        module.__class__ = fused(type(module))  # the same state, so that PEFT saves and merges it as it does its own
    return len(found)


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
