"""An example: a tree of token segments with a loss weight for each token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens in a row.

    Attributes:
        tokens: Token ids, shape (length,), int32.
        weights: Weight of each token as a target, shape (length,), float32; 0 where nothing is learned.
    """

    tokens: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Example:
    """A trunk, and branches that each continue it.

    Supervised rows are a trunk alone. Preference pairs and sampled groups are a prompt with several continuations,
    which the engine computes once.

    Attributes:
        trunk: What every branch starts with.
        branches: Continuations of the trunk.
        answer_start: Index in the trunk of the first token of its last trained span.
        question: What the last answer replies to, for people to read; None for plain text.
        reference: Text of the last answer, None for plain text.
        num_cut: Tokens beyond the longest allowed that were cut off.
        index: Number of the row in its source, from 0.
        number: Tells it from every other example of a job.
        label: Number of its class, where whole rows are classified; the row then weighs 1.
        targets: Other numbers that it is to be given, shape (k,), float32: a measure, one for each class, the tag of
            each weighted token. Without weighted tokens the row weighs 1.
        media: Bytes of an image or a recording, None for texts.
    """

    trunk: Segment
    branches: tuple[Segment, ...] = ()
    answer_start: int = 0
    question: str | None = None
    reference: str | None = None
    num_cut: int = 0
    index: int = 0
    label: int | None = None
    targets: np.ndarray | None = None
    media: bytes | None = None
    number: int = 0

    @property
    def prompt(self) -> np.ndarray:
        """What the model is given before its last answer, shape (length,)."""
        return self.trunk.tokens[: self.answer_start]

    @property
    def weight(self) -> float:
        """Sum of the weights of all its tokens; 1 for a row that is learned as a whole."""
        if self.label is not None:
            return 1.0
        weight = float(self.trunk.weights.sum() + sum(branch.weights.sum() for branch in self.branches))
        return weight or float(self.targets is not None)

    def __len__(self) -> int:
        return len(self.trunk) + sum(map(len, self.branches))
