"""How much rows depend on each trained weight: the diagonal of the empirical Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tune_magic import files
from tune_magic.data.example import Example
from tune_magic.data.table import Table
from tune_magic.objectives.base import Objective
from tune_magic.training.engine import Engine

FILE = "fisher.safetensors"
_STREAM = 32_452_843  # keeps these random numbers apart from those of order and split


def draw(rows: Table, count: int, seed: int) -> Table:
    """Return at most so many rows, drawn by the seed, in their order."""
    places = np.random.default_rng([seed, _STREAM]).permutation(len(rows))[:count]
    return rows.take(np.sort(places))


def fisher(
    engine: Engine, objective: Objective, examples: Sequence[Example], look: Callable[[], None]
) -> dict[str, torch.Tensor]:
    """Return the mean over rows of the squared gradient of a row's log-likelihood, for each trained weight, by name.

    With the rows' own answers it is the *empirical* Fisher information. A row of a language model is as likely as all of
    its trained tokens together.

    Args:
        engine: Of the model as it is before training; in evaluation mode while this computes.
        objective: Says the likelihood.
        examples: At least one; each is computed alone.
        look: Called before each; may raise to break off.
    """
    trained = {name: p for name, p in engine.model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in trained.items()}
    was_training = engine.model.training
    engine.model.eval()
    for example in examples:
        look()
        loss = objective.score_sum(engine.own_states([example]))
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        for total, gradient in zip(sums.values(), gradients, strict=True):
            if gradient is not None:
                total.addcmul_(gradient.float(), gradient.float())
    engine.model.train(was_training)
    return {name: total / len(examples) for name, total in sums.items()}


def write(folder: Path, found: dict[str, torch.Tensor]) -> None:
    """Keep it in the run folder, for a run that is resumed."""
    plain = {name: tensor.cpu().contiguous() for name, tensor in found.items()}
    files.produce(folder / FILE, lambda temporary: save_file(plain, temporary))


def read(folder: Path, device: torch.device) -> dict[str, torch.Tensor] | None:
    """Return what an earlier attempt kept, None where it kept nothing that can be read."""
    try:
        return {name: tensor.to(device) for name, tensor in load_file(folder / FILE).items()}
    except (OSError, SafetensorError):
        return None
