"""What an augmenter is: the contract every augmenter plug-in keeps."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from tune_magic.recipe.schema import AugmentOptions


class Augmenter(abc.ABC):
    """Base class of augmenters: texts become others that mean the same.

    What is asked is changed, or the text that has a class; answers and classes stay.

    Args:
        options: Of the recipe.

    Attributes:
        Options: The augmenter's keys, an `AugmentOptions`.
    """

    Options: ClassVar[type[AugmentOptions]] = AugmentOptions

    def __init__(self, options: AugmentOptions) -> None:
        self.options: Any = options

    @abc.abstractmethod
    def change(self, texts: Sequence[str], draw: np.random.Generator, tell: Callable[[int], None]) -> list[str | None]:
        """Return another wording of each text, None where there is none.

        Args:
            texts: As they are in the rows.
            draw: The only source of chance, so that the same recipe makes the same rows.
            tell: Called with the number of texts done; may raise to break off.
        """
