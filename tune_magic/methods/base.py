"""What a method is: the contract every method plug-in keeps."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

from tune_magic.recipe.schema import MethodOptions, QuantizationOptions
from tune_magic.recipe.variant import Variant

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Method(abc.ABC):
    """Base class of methods.

    A subclass sets `Options` (its keys in a recipe) and `apply`. The training loop trains exactly the parameters whose
    ``requires_grad`` is set after `apply`, and a checkpoint holds exactly those.

    Attributes:
        Options: The method's keys, a `MethodOptions`.
        packs: Rows may be packed into one sequence with a block mask.
        merges: The trained parameters can be folded into the base model's own.
        recomputes: Activations may be computed again in the backward pass instead of being kept.
        in_place: What is trained are the model's own parameters, with nothing beside them.
        adds: The base model is still in there untouched, and `without` shows it.
        makes_up_for_rounding: What is trained starts as what quantisation lost, so it belongs on the rounded matrices;
            the layers of a quantised base keep theirs as `original` until `apply` has read them.
        trains_new_tokens: Embeddings of tokens that the model was given (`new_tokens`) are trained.
        new_tokens: Their numbers, set before `apply`.
        summary: What is trained, in one sentence, for `%tune explain`.
        formula: The same as a formula, in plain text.
        source: Where it was published.
        when: When to use it, in one or two sentences.
        variants: Names that people know it by with some of its keys set, each explained.
        learning_rate: A usual one, which `%tune methods --try` takes; a recipe's default is its own.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    packs: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    recomputes: ClassVar[bool] = True
    in_place: ClassVar[bool] = False
    adds: bool = False
    makes_up_for_rounding: bool = False
    trains_new_tokens: ClassVar[bool] = False
    new_tokens = range(0)
    summary: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    source: ClassVar[str] = ""
    when: ClassVar[str] = ""
    variants: ClassVar[Mapping[str, Variant]] = {}
    learning_rate: ClassVar[float] = 2e-4

    def __init__(self, options: MethodOptions) -> None:
        self.options: Any = options

    @property
    def num_virtual_tokens(self) -> int:
        """Positions of the model that the method takes before each row."""
        return 0

    def learning_rate_factor(self, name: str) -> float:
        """Return what the learning rate of a parameter is multiplied by."""
        return 1.0

    def why_not_on(self, base: QuantizationOptions) -> str | None:
        """Return why the method cannot be trained on a base that is kept so, as the end of a sentence; None where it can."""
        if base.is_on and not self.adds:
            return "it changes the base itself, and rounded weights cannot take small steps"
        return None

    @abc.abstractmethod
    def apply(self, model: PreTrainedModel, task: str) -> torch.nn.Module:
        """Return the model with the right parameters trainable; `model` may be changed in place.

        Args:
            model: As the objective loaded it.
            task: PEFT's name of the task: CAUSAL_LM, SEQ_CLS.

        Raises:
            TuneError: The method trains nothing of this model.
        """

    def inner(self, model: torch.nn.Module) -> PreTrainedModel:
        """Return the Transformers model inside, whose backbone and head the engine calls."""
        return model  # type: ignore[return-value, unused-ignore]

    def merge(self, model: torch.nn.Module) -> PreTrainedModel:
        """Return a plain Transformers model with the trained parameters folded in."""
        return self.inner(model)

    def without(self, model: Any) -> AbstractContextManager[Any]:
        """Return a context in which `model` is the base model; only where `adds` is set."""
        raise TypeError(f"{type(self).__name__} changes the base model itself")

    def to_training(self, model: Any) -> None:
        """Put the model into training mode."""
        model.train()

    def at_step(self, model: Any, step: int, total_steps: int) -> AbstractContextManager[Any]:
        """Return a context in which the gradients of a step, counted from 1, are computed.

        A method that trains fewer parameters at first narrows ``requires_grad`` while inside, as a function of the step
        alone: what gets no gradient is not updated and gets no optimizer state. Outside, it is as `apply` left it.
        """
        return contextlib.nullcontext()

    def has_active_dropout(self) -> bool:
        """Whether the method itself draws random numbers in training."""
        return False
