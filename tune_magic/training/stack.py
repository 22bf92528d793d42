"""Several adapters on one base: switched, taken away, mixed within a batch, combined."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tune_magic.errors import TuneError
from tune_magic.models.generate import generate
from tune_magic.recipe.combination import Combination, merged_recipe
from tune_magic.storage.folder import RunFolder
from tune_magic.training import alike, checkpoint, combine
from tune_magic.training.prepare import build_model, device
from tune_magic.training.tuned import Chat, Tuned, without_weights

BASE = "base"
_FIRST = "default"  # what PEFT calls the adapter a model is wrapped with, and so what checkpoints call theirs
_NO_ADAPTER = "__base__"  # PEFT's word


class Stack:
    """One base model with the adapters of several runs, each at its best checkpoint, in evaluation mode.

    Args:
        runs: By the name each is called here.
        dtype: Of the base.

    Attributes:
        model: The one model, of PEFT; `switch` decides what it computes.
        active: Name of the adapter that is on; `BASE` for none.

    Raises:
        TuneError: They are no adapters of one base, with what differs; or a checkpoint is not whole.
    """

    def __init__(self, runs: Mapping[str, RunFolder], *, dtype: torch.dtype = torch.float32) -> None:
        alike.check(runs)
        self._tuned = {name: without_weights(run) for name, run in runs.items()}
        self._adapters = {name: f"adapter_{number}" if number else _FIRST for number, name in enumerate(runs)}
        self.first = next(iter(runs))
        first = self._tuned[self.first]
        self.model = build_model(
            first.recipe, first.base, first.objective, first.method, dtype, vocabulary=first.vocabulary
        )
        with torch.random.fork_rng():
            for name in list(runs)[1:]:
                method: Any = self._tuned[name].method  # a PeftMethod, as `alike.check` saw
                method.new_tokens = first.vocabulary.ids
                method.add(self.model, self._adapters[name], first.objective.task)
        for name, tuned in self._tuned.items():
            checkpoint.restore_parameters(tuned.checkpoint, self.parameters(name))
        self.model.to(device()).eval()
        self._off = contextlib.ExitStack()
        self.active = ""
        self.switch(self.first)

    @property
    def names(self) -> list[str]:
        """What the adapters are called, in order, those that were combined last."""
        return list(self._tuned)

    def parameters(self, name: str) -> dict[str, torch.nn.Parameter]:
        """Return an adapter's parameters by the names they have in a checkpoint."""
        own = self._adapters[name]
        found = {}
        for key, parameter in self.model.named_parameters():
            parts = key.split(".")
            if own in parts:
                found[".".join(_FIRST if part == own else part for part in parts)] = parameter
        return found

    def switch(self, name: str) -> Tuned:
        """Let the model compute with one adapter, or as the base for `BASE`, until the next call; return what it is then.

        Raises:
            TuneError: There is no such adapter.
        """
        self._check(name)
        self._off.close()
        if name != BASE:
            self.model.set_adapter(self._adapters[name])
            self.model.requires_grad_(False)
        else:
            tuned = self._tuned[self.first]
            self._off.enter_context(tuned.method.without(self.model))
            self._off.enter_context(tuned.vocabulary.hidden(tuned.method.inner(self.model)))
        self.active = name
        return self.tuned(name)

    def off(self) -> Tuned:
        """Take every adapter away until the next `switch`: the model is the base."""
        return self.switch(BASE)

    def tuned(self, name: str) -> Tuned:
        """Return recipe, tokens and model of an adapter, or of the base; the model is the one all share."""
        self._check(name)
        if name == BASE:
            first = self._tuned[self.first]
            return replace(first, model=self.model, vocabulary=first.vocabulary.unextended())
        return replace(self._tuned[name], model=self.model)

    @property
    def mixes(self) -> bool:
        """Whether rows of one batch may each have an adapter of their own; others are computed one adapter at a time."""
        return all(
            str(getattr(config.peft_type, "value", config.peft_type)) == "LORA"
            and not config.use_dora
            and not config.trainable_token_indices
            for config in self.model.peft_config.values()
        )

    def peft_names(self, names: Sequence[str]) -> list[str]:
        """Return what PEFT calls adapters, and the base: its ``adapter_names``."""
        return [_NO_ADAPTER if name == BASE else self._adapters[name] for name in names]

    def generate(self, prompts: Sequence[str | Chat], names: Sequence[str], *, max_new_tokens: int) -> list[str]:
        """Answer every prompt greedily by the adapter it names, in mixed batches where the method allows them.

        Args:
            prompts: User messages, or chats that end with one.
            names: For each the adapter that answers, or `BASE`.
            max_new_tokens: Longest answer in tokens.
        """
        for name in set(names):
            self._check(name)
        renderers = {name: self.tuned(name).rows().renderer for name in set(names)}
        pairs = zip(prompts, names, strict=True)
        encoded = [np.asarray(renderers[name].prompt_tokens(prompt), dtype=np.int32) for prompt, name in pairs]
        if self.mixes and len(set(names)) > 1:
            with self._mixed():
                return generate(
                    self.model, self.tuned(self.first).tokenizer, encoded, max_new_tokens=max_new_tokens,
                    adapters=self.peft_names(names),
                )  # fmt: skip
        answers = [""] * len(prompts)
        with self._restored():
            for name in dict.fromkeys(names):
                places = [place for place, own in enumerate(names) if own == name]
                tuned, chosen = self.switch(name), [encoded[place] for place in places]
                found = generate(tuned.model, tuned.tokenizer, chosen, max_new_tokens=max_new_tokens)
                for place, answer in zip(places, found, strict=True):
                    answers[place] = answer
        return answers

    def combine(self, name: str, combination: Combination) -> dict[str, Any]:
        """Make a new adapter of those that are there and return how far it is from each, see `combine.geometry`.

        Raises:
            TuneError: The name is taken; or they cannot be combined so, with every reason.
        """
        if name in (*self._tuned, BASE):
            raise TuneError(f"There is an adapter called {name} already.", hint="Take another name.")
        for one in combination.weights:
            self._check(one, but_base=True)
        alike.check_combinable({one: self._tuned[one].run for one in combination.weights})
        recipes = {one: self._tuned[one].recipe for one in combination.weights}
        combination.check({one: recipes[one].method.r for one in recipes})  # type: ignore[attr-defined, unused-ignore]
        recipe = merged_recipe(recipes, combination)
        before, own = self.active, f"adapter_{len(self._adapters)}"
        self._off.close()
        sources = [self._adapters[one] for one in combination.weights]
        combine.combine(self.model, own, sources, combination)
        self._adapters[name] = own
        method = type(self._tuned[self.first].method)(recipe.method)
        origin = self._tuned[next(iter(combination.weights))]
        self._tuned[name] = replace(origin, recipe=recipe, method=method)
        self.switch(before)
        return combine.geometry(self.model, own, dict(zip(combination.weights, sources, strict=True)), combination)

    def _check(self, name: str, *, but_base: bool = False) -> None:
        known = [*self._tuned, *([] if but_base else [BASE])]
        if name not in known:
            raise TuneError(f"There is no adapter called {name} here.", hint=f"There are {', '.join(known)}.")

    @contextlib.contextmanager
    def _restored(self) -> Iterator[None]:
        """Switch back to what was on before, at the end."""
        before = self.active
        try:
            yield
        finally:
            self.switch(before)

    @contextlib.contextmanager
    def _mixed(self) -> Iterator[None]:
        """While inside, every adapter is there to be named; what PEFT hooks in goes too where a batch is broken off."""
        with self._restored():
            self._off.close()
            there = {module: set(module._forward_pre_hooks) for module in self.model.modules()}
            try:
                yield
            finally:
                for module, hooks in there.items():
                    for hook in set(module._forward_pre_hooks) - hooks:
                        del module._forward_pre_hooks[hook]
                        module._forward_pre_hooks_with_kwargs.pop(hook, None)
