"""(IA)3: learned factors of keys, values and feed-forward activations (Liu et al. 2022, arXiv:2205.05638)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tune_magic.methods.by_peft import PeftMethod, targets
from tune_magic.recipe.schema import MethodOptions

if TYPE_CHECKING:
    from peft import IA3Config
    from transformers import PreTrainedModel


class IA3Options(MethodOptions):
    """Keys of `method: ia3`, named as in PEFT."""

    name: Literal["ia3"] = Field("ia3", description="Train a factor for each key, value and feed-forward activation.")
    target_modules: list[str] | None = Field(None, description="Names of layers; PEFT knows them for most models.")
    feedforward_modules: list[str] | None = Field(None, description="Those of them whose input is scaled.")


class IA3(PeftMethod):
    """Frozen base whose activations are multiplied by vectors that start as ones: the fewest parameters of all."""

    Options = IA3Options
    summary = "Keys, values and feed-forward activations are each multiplied by a trained factor."
    formula = (
        "keys and values: y = l ⊙ (W x);  feed-forward: y = W (l ⊙ x);  one factor for each number of a vector, l = 1 at "
        "the start"
    )
    source = "Liu et al. 2022, arXiv:2205.05638."
    when = (
        "Few rows, or very many tuned models to keep: among the smallest files of all, and it merges into the weights."
    )
    learning_rate = 3e-3

    def config(self, model: PreTrainedModel, task: str) -> IA3Config:
        """PEFT's configuration."""
        from peft import IA3Config

        given = self.options.feedforward_modules
        feedforward = {} if given is None else {"feedforward_modules": given}
        return IA3Config(task_type=task, **targets(self.options.target_modules), **feedforward)
