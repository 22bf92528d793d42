"""A moving average of the trained parameters, which is the model to everyone but the optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class Average:
    """Exponential moving average of the parameters that are trained (Polyak and Juditsky 1992), in their precision.

    After step t: average = d * average + (1 - d) * parameters, with d = min(decay, (1 + t) / (10 + t)), so that a short
    run does not remember where it began.

    Args:
        model: Made trainable; the average begins as its parameters.
        decay: d in the long run.

    Attributes:
        tensors: The average of each trained parameter, by name.
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self._decay = decay
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.tensors = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the parameters after a step, counted from 1."""
        share = 1 - min(self._decay, (1 + step) / (10 + step))
        for name, parameter in self._parameters.items():
            self.tensors[name].lerp_(parameter, share)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """While inside, the model has the average for its parameters, and `tensors` holds theirs: nothing is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.data, self.tensors[name] = self.tensors[name], parameter.data
