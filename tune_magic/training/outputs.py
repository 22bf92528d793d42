"""The engine for everything else: a whole model over padded rows, and what an objective makes of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from tune_magic.data.example import Example
from tune_magic.errors import TuneError
from tune_magic.methods.base import Method
from tune_magic.objectives.base import Objective
from tune_magic.training import packing
from tune_magic.training.engine import Engine
from tune_magic.training.packing import Batch

_CHECKED_ROWS = 2


class OutputEngine(Engine):
    """A model's own outputs over rows sorted by length, so that little is padding.

    Args:
        model: What `Method.apply` returned, on its device.
        method: The method.
        dtype: Compute precision.
        max_tokens: Most tokens of a microbatch, padding included.
        objective: Says what the model is called with, and what its outputs mean.
    """

    keeps_layers = False

    def __init__(
        self, model: Any, method: Method, *, dtype: torch.dtype, max_tokens: int, objective: Objective
    ) -> None:
        super().__init__(model, method, dtype=dtype, max_tokens=max_tokens)
        self._objective = objective

    def microbatches(self, examples: Sequence[Example]) -> Iterator[list[Example]]:
        """Cut the examples into microbatches, the largest first; rows of one size keep their order."""
        size = self._objective.computed_tokens
        return packing.padded_groups(sorted(examples, key=lambda e: size([e]), reverse=True), self.max_tokens, size)

    def lay_out(self, examples: Sequence[Example]) -> Batch:
        """Return a batch that tells how much is computed; what the model reads is the objective's to say."""
        nothing = np.empty(0, dtype=np.int64)
        tokens = np.zeros((1, self._objective.computed_tokens(examples)), dtype=np.int64)
        return Batch(tokens, tokens, nothing, nothing, np.empty(0, dtype=np.float32), nothing)

    def compute(self, batch: Batch, examples: Sequence[Example]) -> Any:
        """Run the model over the examples."""
        with self.autocast():
            states = states_of(self.model, self.method, self._objective, examples)
        if self.label_smoothing and self.model.training:
            states.label_smoothing = self.label_smoothing
        return states

    def regularise(self, *, label_smoothing: float, noise_alpha: float) -> None:
        """Smooth labels in training from now on.

        Raises:
            TuneError: Noise is asked for, which is for rows whose tokens the engine lays out itself.
        """
        if noise_alpha:
            raise TuneError(
                "`neftune_noise_alpha` is for language models and for classes of whole texts.", hint="Leave it out."
            )
        super().regularise(label_smoothing=label_smoothing, noise_alpha=noise_alpha)

    def _padded(self, examples: Sequence[Example]) -> Batch:
        return self.lay_out(examples)

    def _rows_to_check(self, examples: Sequence[Example]) -> list[Example]:
        """Rows are looked at whole: their targets belong to all of their tokens."""
        return sorted(examples, key=len)[:_CHECKED_ROWS]


def states_of(model: Any, method: Method, objective: Objective, examples: Sequence[Example]) -> Any:
    """Run a model over examples as an objective says, and return what the objective makes of it.

    Args:
        model: What the method made, or a plain Transformers model.
        method: The method.
        objective: One whose `engine` is `outputs`.
        examples: At least one.
    """
    inner = method.inner(model) if hasattr(model, "peft_config") else model
    called = inner if method.packs else model  # PEFT's wrapper hands on some of what it is given, and is passed by
    config = inner.config
    arrays = objective.batch(examples, getattr(config, "pad_token_id", None) or 0)
    if getattr(config, "type_vocab_size", 0) < 2:
        arrays.pop("token_type_ids", None)  # the model does not tell kinds of tokens apart
    device = next(model.parameters()).device
    outputs = called(**{name: torch.from_numpy(array).to(device) for name, array in arrays.items()})
    return objective.states(outputs, examples)


def outputs_of(
    engine: Engine, objective: Objective, examples: Sequence[Example], done: Callable[[int], None] | None = None
) -> list[np.ndarray]:
    """Return what the model says of each example, in their order, as the objective reads it.

    Args:
        engine: Of this objective.
        objective: Reads what the engine gives.
        examples: At least one.
        done: Called with the number of rows of each batch; may raise to break off.
    """
    held = list(examples)  # a table makes an example anew at each look
    places = {id(example): place for place, example in enumerate(held)}
    found: list[Any] = [None] * len(held)
    with torch.no_grad():
        for batch in engine.microbatches(held):
            for example, output in zip(batch, objective.read(engine.states(batch)), strict=True):
                found[places[id(example)]] = output
            if done is not None:
                done(len(batch))
    return found
