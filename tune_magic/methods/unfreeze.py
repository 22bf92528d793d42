"""Gradual unfreezing: from the top layer down (Howard and Ruder 2018, arXiv:1801.06146, section 3.3)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tune_magic.methods.full import ByLayerOptions, Full
from tune_magic.recipe.schema import MethodOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class UnfreezeOptions(ByLayerOptions):
    """Keys of `method: unfreeze`."""

    name: Literal["unfreeze"] = Field("unfreeze", description="Train the top first, then one layer more after another.")
    steps_per_layer: int | None = Field(
        None,
        ge=1,
        description="Steps before one layer more is trained; default: evenly over the first half of the run.",
    )


class Unfreeze(Full):
    """Every parameter in the end: the head first, then one layer more at a time from the top down, embeddings last.

    Where a language model's output matrix is its embedding, the top layer is trained from the first step. Rates may fall
    from layer to layer (`layer_lr_decay`, discriminative fine-tuning in the paper).
    """

    Options: ClassVar[type[MethodOptions]] = UnfreezeOptions
    summary = "Every parameter: the head first, then one layer more after another from the top down, embeddings last."
    formula = "in step s the layers of depth ≤ first + ⌊(s − 1) / steps_per_layer⌋ are trained, the head being depth 0"
    source = "Howard and Ruder 2018, arXiv:1801.06146, section 3.3."
    when = (
        "For classifiers on few rows: a new head makes large gradients at first, which would spoil the layers below it. "
        "It takes the memory of `full`."
    )

    def apply(self, model: PreTrainedModel, task: str) -> PreTrainedModel:
        """Make every parameter trainable; `at_step` narrows that."""
        super().apply(model, task)
        heads = [name for name, p in model.named_parameters() if self._depths[name] == 0 and p.ndim > 1]
        self._first = 0 if heads else 1  # a norm alone is no layer
        return model

    def depth_at(self, step: int, total_steps: int) -> int:
        """Return how many layers down parameters are trained in a step, counted from 1; 0 is the head alone."""
        lowest = max(self._depths.values())
        each = self.options.steps_per_layer or max(1, total_steps // 2 // max(1, lowest - self._first))
        return min(lowest, self._first + (step - 1) // each)

    @contextlib.contextmanager
    def at_step(self, model: Any, step: int, total_steps: int) -> Iterator[None]:
        """Freeze while inside what lies deeper than the step trains."""
        depth = self.depth_at(step, total_steps)
        frozen = [p for name, p in model.named_parameters() if self._depths[name] > depth]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
