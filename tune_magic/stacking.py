"""Several runs on one base in this process: what users hold. No torch until a model is asked for."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_magic.errors import TuneError
from tune_magic.handles import Run
from tune_magic.recipe.combination import Combination
from tune_magic.training import alike

if TYPE_CHECKING:
    import pandas as pd

    from tune_magic.training.stack import Stack

    Prompt = str | list[dict[str, str]]


class AdapterStack:
    """Adapters of several runs on one base model, which is loaded into this process once, when it is first needed.

    Args:
        runs: By the name each is called here; all adapters of one method on the same base.

    Raises:
        TuneError: They cannot share a base, with what differs.

    Example:
        >>> stack = tune_magic.stack("polite", "brief")  # doctest: +SKIP
        >>> stack.generate(["Where is my parcel?"] * 3, adapters=["polite", "brief", "base"])  # doctest: +SKIP
        >>> stack.combine("both", {"polite": 0.7, "brief": 0.3}, how="ties")  # doctest: +SKIP
    """

    def __init__(self, runs: Mapping[str, Run]) -> None:
        alike.check(runs)
        self.runs = dict(runs)
        self._combined: dict[str, Combination] = {}
        self._stack: Stack | None = None

    @property
    def names(self) -> list[str]:
        """What the adapters are called, those that were combined last; ``base`` stands for none of them."""
        return [*self.runs, *self._combined]

    @property
    def active(self) -> str:
        """The adapter that is on."""
        return self._loaded().active

    def load(self) -> tuple[Any, Any]:
        """Load the base with all adapters, once, and return (model, tokenizer); `switch` says which adapter is on."""
        stack = self._loaded()
        return stack.model, stack.tuned(stack.active).tokenizer

    def unload(self) -> None:
        """Give the model's memory back; what was combined is combined again when it is needed."""
        self._stack = None
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def switch(self, name: str) -> AdapterStack:
        """Let the loaded model compute with one adapter, or as the ``base``, until the next call."""
        self._loaded().switch(name)
        return self

    def off(self) -> AdapterStack:
        """Let the loaded model be the base."""
        return self.switch("base")

    def generate(
        self, prompts: str | Sequence[Prompt], adapter: str | None = None, *, adapters: Sequence[str] | None = None,
        max_new_tokens: int = 128,
    ) -> list[str]:  # fmt: skip
        """Answer greedily, each prompt by the adapter that is named for it; the model is loaded into this process.

        Args:
            prompts: A user's message, or a list; an item may also be a chat, a list of role and content.
            adapter: Who answers all of them; default: the one that is on.
            adapters: Who answers each of them; ``base`` for no adapter. Prompts of several share batches.
            max_new_tokens: Longest answer in tokens.

        Returns:
            One answer each, in order.

        Raises:
            TuneError: There is no such adapter, or the runs write no texts.
        """
        asked: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
        if adapter is not None and adapters is not None:
            raise TuneError("`adapter` names one for all prompts, `adapters` one for each; give one of the two.")
        if adapters is not None and (isinstance(adapters, str) or len(adapters) != len(asked)):
            raise TuneError(f"`adapters` must be a list with one name for each of the {len(asked)} prompts.")
        if self._finds:
            raise TuneError(
                "These runs write no texts.", hint="`stack.predict(texts, adapter)` gives what they find in them."
            )
        stack = self._loaded()
        names = [adapter or stack.active] * len(asked) if adapters is None else list(adapters)
        return stack.generate(asked, names, max_new_tokens=max_new_tokens)

    def predict(self, texts: Any, adapter: str | None = None) -> pd.DataFrame:
        """Return what one adapter finds in texts, as `Run.predict` does.

        Raises:
            TuneError: The runs write texts, or there is no such adapter; the base has no trained head.
        """
        import pandas as pd

        if not self._finds:
            raise TuneError("These runs answer texts.", hint="`stack.generate(prompts)` gives their answers.")
        stack = self._loaded()
        name = adapter or stack.active
        if name == "base":
            raise TuneError("The base has no trained head.", hint=f"There are {', '.join(self.names)}.")
        rows = [texts] if isinstance(texts, str | bytes | Path) else list(texts)
        found = stack.switch(name).predict(rows)
        if len(found) == len(rows) and all(isinstance(row, str) for row in rows):
            found.index = pd.Index(rows, name="text")
        return found

    def combine(
        self, name: str, weights: Mapping[str, float], how: str = "linear", *, density: float | None = None,
        rank: int | None = None, seed: int = 0,
    ) -> dict[str, Any]:  # fmt: skip
        """Make a further adapter of those that are there; it lives as long as this stack, see `keep`.

        Args:
            name: Of the new one.
            weights: By the names of those it is made of.
            how: One of `tune_magic.recipe.combination.WAYS`: ``linear``, ``cat`` (exactly the weighted sum), ``svd``, ``ties`` ...
            density: Share of entries that ties, dare and magnitude_prune keep; default: 0.5.
            rank: Of the result, for ways that end in svd; default: the largest.
            seed: Of what dare leaves out.

        Returns:
            How far it is from each, see `training.combine.geometry`.

        Raises:
            TuneError: They cannot be combined so, with every reason.
        """
        chosen = Combination(dict(weights), how, density, rank, seed)
        found = self._loaded().combine(name, chosen)
        self._combined[name] = chosen
        return found

    def keep(self, name: str) -> Run:
        """Make a run of what `combine` made, which can be evaluated, exported and talked to: `tune_magic.merge_adapters`.

        Raises:
            TuneError: It was not made of runs alone.
        """
        from tune_magic import api

        chosen = self._combined.get(name)
        if chosen is None or not chosen.weights.keys() <= self.runs.keys():
            raise TuneError(f"{name} is not combined from runs alone.", hint=f"There are {', '.join(self.names)}.")
        weights: dict[Run | str, float] = {self.runs[one]: weight for one, weight in chosen.weights.items()}
        return api.merge_adapters(
            weights, chosen.how, name=name, density=chosen.density, rank=chosen.rank, seed=chosen.seed
        )

    def __repr__(self) -> str:
        state = "not loaded" if self._stack is None else f"{self._stack.active} is on"
        return f"<{type(self).__name__} {', '.join(self.names)}, {state}>"

    @property
    def _finds(self) -> bool:
        return any(alike.objective_of(run).scores_rows for run in self.runs.values())

    def _loaded(self) -> Stack:
        if self._stack is None:
            from tune_magic.training.stack import Stack

            stack = Stack(self.runs)
            for name, chosen in self._combined.items():
                stack.combine(name, chosen)
            self._stack = stack
        return self._stack
