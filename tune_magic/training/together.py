"""Losses that compare the rows of a step with each other, whatever the microbatches.

Such a loss is no sum over rows, so each microbatch alone does not know it. All vectors are computed first, without what
the backward pass needs; the loss gives the gradient of each vector; then each microbatch is computed again from the same
random state and handed its own (GradCache: Gao et al. 2021, arXiv:2101.06983). A step of one microbatch is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tune_magic.data.example import Example
from tune_magic.objectives.base import Objective
from tune_magic.training import checkpoint
from tune_magic.training.engine import Engine


def add_gradients(
    engine: Engine, objective: Objective, microbatches: Sequence[list[Example]], weight: float,
    look: Callable[[int, int], None],
) -> float:  # fmt: skip
    """Add a step's gradients and return its loss.

    Args:
        engine: Of this objective.
        objective: One that `compares_rows`; its states have `vectors`, and `joined` puts some behind each other.
        microbatches: The step's rows.
        weight: The loss is divided by it.
        look: Called with what is done and of how much before each microbatch; may raise to break off.
    """
    if len(microbatches) == 1:
        look(0, 1)
        loss = objective.loss_sum(engine.states(microbatches[0])) / weight
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())
    total, before = 2 * len(microbatches), checkpoint.random_state()
    parts = []
    for number, microbatch in enumerate(microbatches):
        look(number, total)
        with torch.no_grad():
            parts.append(engine.states(microbatch))
    joined = objective.joined(parts)
    joined.vectors = joined.vectors.detach().requires_grad_()
    loss = objective.loss_sum(joined) / weight
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = joined.vectors.grad.split([len(microbatch) for microbatch in microbatches])
    checkpoint.set_random_state(before)
    for number, (microbatch, gradient) in enumerate(zip(microbatches, gradients, strict=True), start=len(microbatches)):
        look(number, total)
        engine.states(microbatch).vectors.backward(gradient)
    return float(loss.detach())


def states_of_group(engine: Engine, objective: Objective, examples: Sequence[Example]) -> Any:
    """Return the states of rows that are compared with each other, in the engine's order."""
    return objective.joined([engine.states(microbatch) for microbatch in engine.microbatches(examples)])
