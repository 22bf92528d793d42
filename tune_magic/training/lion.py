"""Lion: steps of one size along the sign of a mean of gradients (Chen et al. 2023, arXiv:2302.06675)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Lion with decoupled weight decay; one state, as large as the parameters.

    With momentum m and gradient g: p (1 - lr decay) - lr sign(beta1 m + (1 - beta1) g), then m becomes
    beta2 m + (1 - beta2) g.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        betas: What the step's mean, and the momentum, keep of the momentum.
        weight_decay: Share of a parameter, times the learning rate, taken off at each step.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take a step with the gradients at hand."""
        if closure is not None:
            raise TypeError("Lion takes no closure")
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter)
            momenta = [self.state[parameter]["momentum"] for parameter in parameters]
            gradients = [parameter.grad for parameter in parameters]
            step_mean, momentum = group["betas"]
            directions = torch._foreach_lerp(gradients, momenta, step_mean)
            torch._foreach_sign_(directions)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, directions, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, gradients, 1 - momentum)
