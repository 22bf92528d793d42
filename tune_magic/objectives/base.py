"""What an objective is: the contract every objective plug-in keeps."""

from __future__ import annotations

import abc
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tune_magic import plugins
from tune_magic.data.content import Content
from tune_magic.data.example import Example
from tune_magic.data.render import Part, Renderer
from tune_magic.models.load import load_causal_lm
from tune_magic.recipe.schema import ObjectiveOptions

if TYPE_CHECKING:
    import torch


class Objective(abc.ABC):
    """Base class of objectives: rows become examples, a batch becomes a loss.

    Args:
        options: Its keys in the recipe. None: their defaults.

    Attributes:
        Options: The objective's keys, an `ObjectiveOptions`.
        learns: `learn` has something to do; the training rows are read once more for it.
        formats: Names of the formats of rows it learns from.
        task: PEFT's name of the task.
        scores_rows: The loss is one a row, on the model's own outputs (`training.rows.RowStates`); otherwise one a
            token, on hidden states (`training.target_states.TargetStates`).
        summary: What is minimised, in one sentence, for `%tune explain`.
        formula: The same as a formula, in plain text.
        source: Where it was published.
        when: When to use it, in one or two sentences.
    """

    Options: ClassVar[type[ObjectiveOptions]] = ObjectiveOptions
    learns: ClassVar[bool] = False
    formats: ClassVar[tuple[str, ...]] = (
        "messages", "conversations", "oasst", "prompt_completion", "instruction", "question_answer", "source_target",
        "translation", "text",
    )  # fmt: skip
    task: ClassVar[str] = "CAUSAL_LM"
    scores_rows: ClassVar[bool] = False
    summary: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    source: ClassVar[str] = ""
    when: ClassVar[str] = ""

    def __init__(self, options: ObjectiveOptions | None = None) -> None:
        self.options: Any = options or self.Options.model_validate({})

    def known_formats(self) -> tuple[str, ...]:
        """Return the formats it learns from: its own, and those of others that name it, or what it is based on."""
        others = [
            (name, kind) for name, kind in plugins.working("format") if not kind.__module__.startswith("tune_magic.")
        ]
        mine = (
            name
            for name, kind in others
            if kind.objective in plugins.names("objective")
            and isinstance(self, plugins.get("objective", kind.objective))
        )
        return tuple(dict.fromkeys((*self.formats, *mine)))

    def learn(self, contents: Iterable[Content], source: str) -> None:  # noqa: B027 - most have nothing to learn
        """Look at the training rows once, before any example is made, at class names say.

        Raises:
            DataError: Nothing can be learned from such rows.
        """

    def facts(self) -> dict[str, Any]:
        """Return what was learned, JSON-ready: the plan keeps it.

        As keywords, beside the options, it makes the same objective again.
        """
        return {}

    def examples(self, part: Part, renderer: Renderer) -> list[Example]:
        """Turn rows into examples; those this objective cannot learn from become faults of the part."""
        return renderer.examples(part)

    def load(self, folder: Path, dtype: torch.dtype) -> Any:
        """Load the base model in the form that is trained.

        Raises:
            ModelError: It has no such form.
        """
        return load_causal_lm(folder, dtype)

    @abc.abstractmethod
    def loss_sum(self, states: Any) -> torch.Tensor:
        """Return the *sum* over the batch's weights, a scalar.

        The loop divides by the weight of the whole optimizer step, so the loss does not depend on how the step was
        cut into microbatches.
        """

    def tally(self, states: Any) -> dict[str, float]:
        """Return sums over the batch that evaluations during training show beside the loss, by name."""
        return {}
