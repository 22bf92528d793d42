"""Methods that PEFT has: the base model stays frozen, what is trained lies beside it."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from tune_magic.errors import TuneError
from tune_magic.methods.base import Method
from tune_magic.models.layers import heads_of
from tune_magic.models.load import quiet

_UNKNOWN_TO_PEFT = ("IMAGE_CLS", "AUDIO_CLS")
_KEEPS_ITS_HEAD = ("TOKEN_CLS", "QUESTION_ANS")  # PEFT trains a new head whole, and takes it for a linear layer as well

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


class PeftMethod(Method):
    """Base class of such methods; a subclass says PEFT's configuration."""

    adds = True

    @abc.abstractmethod
    def config(self, model: PreTrainedModel, task: str) -> PeftConfig:
        """Return PEFT's configuration for a model."""

    def apply(self, model: PreTrainedModel, task: str) -> Any:
        """Wrap the model by PEFT, which also trains a head that is new.

        Raises:
            TuneError: PEFT does not know where in this model the method goes.
        """
        from tune_magic.models.lean_peft import peft

        with self._told():
            return peft.get_peft_model(model, self._config(model, task))

    def add(self, model: Any, name: str, task: str) -> None:
        """Put one more adapter of this kind, under a name of its own, on a model that `apply` wrapped.

        Raises:
            TuneError: PEFT does not know where in this model the method goes, or has no room for two.
        """
        with self._told():
            inner = model.get_base_model()
            model.add_adapter(name, self._config(inner, task))

    def _config(self, model: PreTrainedModel, task: str) -> PeftConfig:
        """Return PEFT's configuration, with the heads that are trained whole."""
        if task in _UNKNOWN_TO_PEFT and not self.packs:
            raise ValueError("it puts learned tokens before texts, and the model reads none")
        known: Any = None if task in _UNKNOWN_TO_PEFT else task
        return _with_heads(self.config(model, known), model, task)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """While inside, PEFT is quiet, and what it refuses becomes an error of ours."""
        try:
            with quiet():
                yield
        except (ValueError, KeyError) as error:
            raise TuneError(
                f"`{self.options.name}` cannot be put on this model: {error}",
                hint="Name its layers under `method:`, `target_modules: [q_proj, v_proj]` say, or take `lora`.",
            ) from error

    def inner(self, model: Any) -> PreTrainedModel:
        """The Transformers model, with PEFT's layers in it."""
        return model.get_base_model()

    def merge(self, model: Any) -> PreTrainedModel:
        """Fold what was trained into the layers."""
        return model.merge_and_unload()

    def without(self, model: Any) -> AbstractContextManager[Any]:
        """The base model: what was added is passed by."""
        context: AbstractContextManager[Any] = model.disable_adapter()
        return context


def _with_heads(config: PeftConfig, model: PreTrainedModel, task: str) -> PeftConfig:
    """Let the heads that an objective gave the model be trained whole, and only so."""
    added = list(getattr(model, "added_heads", ()))
    if task in _UNKNOWN_TO_PEFT:
        heads = {id(head) for head in heads_of(model, task) if any(True for _ in head.parameters())}
        added += [name for name, module in model.named_modules() if id(module) in heads]
    if added:
        config.modules_to_save = [*(config.modules_to_save or ()), *added]
    if getattr(config, "target_modules", None) == "all-linear":
        kept = {id(head) for head in heads_of(model, task)} if task in _KEEPS_ITS_HEAD else set()
        names = [name for name, module in model.named_modules() if id(module) in kept]
        config.exclude_modules = [*names, *added] or None
    return config


def targets(value: str | list[str] | None) -> dict[str, Any]:
    """Return PEFT's keyword for the layers a method goes to; none where PEFT knows them by the model's kind."""
    return {} if value is None else {"target_modules": value}
