"""What an objective is: the contract every objective plug-in keeps."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tune_magic.data.example import Example
from tune_magic.data.formats import Content
from tune_magic.data.render import Renderer

if TYPE_CHECKING:
    import torch

    from tune_magic.training.engine import TargetStates


class Objective(abc.ABC):
    """Base class of objectives: rows become examples, a batch becomes a loss."""

    def examples(
        self, contents: list[Content], renderer: Renderer, source: str, places: Sequence[str]
    ) -> list[Example]:
        """Turn rows into examples; `places` says where each row stands, for errors.

        Raises:
            DataError: Rows this objective cannot learn from.
        """
        return renderer.examples(contents, source, places)

    @abc.abstractmethod
    def loss_sum(self, states: TargetStates) -> torch.Tensor:
        """Return the *sum* over the batch's weighted tokens, a scalar.

        The loop divides by the weight of the whole optimizer step, so the loss does not depend on how the step was
        cut into microbatches.
        """
