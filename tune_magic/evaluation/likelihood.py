"""How likely texts are to a language model: rows as they are, and answers to choose among."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from tune_magic.data.example import Example
from tune_magic.training.target_states import TargetStates
from tune_magic.training.tuned import Tuned


def log_likelihoods(side: Tuned, examples: Sequence[Example], done: Callable[[int], None]) -> np.ndarray:
    """Return the log-likelihood of each row's trained tokens, by their weights, (rows,)."""
    found = np.zeros(len(examples))
    for place, gains in _of_tokens(side, examples, TargetStates.log_probs):
        found[place] = gains.sum(dtype=np.float64)
        done(1)
    return found


def right_tokens(side: Tuned, examples: Sequence[Example], done: Callable[[int], None]) -> np.ndarray:
    """Return the weight of each row's trained tokens that are the likeliest in their place, (rows,)."""
    found = np.zeros(len(examples))
    for place, hits in _of_tokens(side, examples, lambda states: states.each(_is_likeliest)):
        found[place] = hits.sum(dtype=np.float64)
        done(1)
    return found


def _is_likeliest(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (logits.argmax(-1) == targets).float()


def of_choices(side: Tuned, examples: Sequence[Example], done: Callable[[int], None]) -> list[list[float]]:
    """Return the log-likelihood of each branch of each row: its choices. What comes before them is computed once."""
    found: list[list[float]] = [[] for _ in examples]
    for place, gains in _of_tokens(side, examples, TargetStates.log_probs):
        starts = np.cumsum([0, *(len(branch) for branch in examples[place].branches[:-1])])
        found[place] = np.add.reduceat(gains.astype(np.float64), starts).tolist()
        done(1)
    return found


def _of_tokens(
    side: Tuned, examples: Sequence[Example], number: Callable[[TargetStates], torch.Tensor]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the place of each row and a number of each trained token by its weight, (tokens,): trunk, then branches."""
    engine = side.engine()
    engine.self_check(examples[:8], side.objective.score_sum)
    places = {id(example): place for place, example in enumerate(examples)}
    with torch.no_grad():
        for microbatch in engine.microbatches(examples):
            states = engine.states(microbatch)
            gains, owners = (number(states) * states.weights).cpu().numpy(), states.owners.cpu().numpy()
            order = np.argsort(owners, kind="stable")
            parts = np.split(gains[order], np.searchsorted(owners[order], np.arange(1, len(microbatch))))
            for example, part in zip(microbatch, parts, strict=True):  # they come in the engine's order
                yield places[id(example)], part
