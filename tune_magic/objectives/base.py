"""What an objective is: the contract every objective plug-in keeps."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tune_magic import plugins
from tune_magic.data.content import Content
from tune_magic.data.example import Example
from tune_magic.data.render import Part, Renderer
from tune_magic.models.load import load_causal_lm
from tune_magic.recipe.schema import ObjectiveOptions
from tune_magic.recipe.variant import Variant

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
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
        engine: What computes it: `tokens`, hidden states at the trained tokens of a language model
            (`training.target_states.TargetStates`); `rows`, logits of whole rows by a head on one token of each
            (`training.rows.RowStates`); `outputs`, whatever the model gives for what `batch` makes of rows.
        gives: What the tuned model gives people: `texts` that it writes, one of some `classes`, or other `outputs`.
        smooths: The loss knows `label_smoothing_factor`, which the states carry in training alone. A class with a
            `loss_sum` of its own says so itself; it does not inherit it.
        compares_rows: The rows of a step are compared with each other: its loss is no sum over them.
        new_head: A head is trained that the base does not have, so that the base only guesses.
        reads_features: It looks at what the head is given of each row, too (`RowStates.features`).
        learns_from_mix: `learn` is shown the rows of the sources that are mixed in, too.
        progress: Share of the run's steps that are done, set before each step.
        metrics: What `%evaluate` scores by default, of objectives that give `outputs`.
        beside: Models that the loss compares with, by role: `base`, the model as it was before training, or `teacher`,
            which the options name. What they make of the same targets or rows is in the states' `beside`.
        learns_answers_of_teacher: Training rows get the answers of the options' `teacher` before training.
        summary: What is minimised, in one sentence, for `%tune explain`.
        formula: The same as a formula, in plain text.
        source: Where it was published.
        when: When to use it, in one or two sentences.
        variants: Names that people know it by with some of its keys set, each explained.
    """

    Options: ClassVar[type[ObjectiveOptions]] = ObjectiveOptions
    learns: ClassVar[bool] = False
    formats: ClassVar[tuple[str, ...]] = (
        "messages", "conversations", "oasst", "prompt_completion", "instruction", "question_answer", "source_target",
        "translation", "text",
    )  # fmt: skip
    task: ClassVar[str] = "CAUSAL_LM"
    engine: ClassVar[Literal["tokens", "rows", "outputs"]] = "tokens"
    gives: ClassVar[Literal["texts", "classes", "outputs"]] = "texts"
    smooths: ClassVar[bool] = False
    compares_rows: ClassVar[bool] = False
    new_head: ClassVar[bool] = False
    reads_features: ClassVar[bool] = False
    learns_from_mix: ClassVar[bool] = False
    progress: float = 0.0
    metrics: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    learns_answers_of_teacher: bool = False
    summary: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    source: ClassVar[str] = ""
    when: ClassVar[str] = ""
    variants: ClassVar[Mapping[str, Variant]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A loss of its own does not know what another's loss does."""
        super().__init_subclass__(**kwargs)
        if "loss_sum" in vars(cls) and "smooths" not in vars(cls):
            cls.smooths = False

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

    def score_sum(self, states: Any) -> torch.Tensor:
        """Return the sum that held-out rows are scored by, for which no model beside is needed.

        It is the loss, unless that is of another kind and runs could not be compared by it.
        """
        return self.loss_sum(states)

    def learning_rate_factor(self, name: str) -> float:
        """Return what the learning rate of a parameter, by its name in the model, is multiplied by, beside the method's."""
        return 1.0

    def tally(self, states: Any) -> dict[str, float]:
        """Return sums over the batch that evaluations during training show beside the loss, by name."""
        return {}

    @property
    def scores_rows(self) -> bool:
        """Whether rows are learned as wholes, and the model writes no texts."""
        return self.gives != "texts"

    @property
    def fewest_rows(self) -> int:
        """Rows that a step must have for the loss to have something to compare; of fewer nothing is learned."""
        return 2 if self.compares_rows else 1

    def prompt_tokens(self, renderer: Renderer, prompt: str | list[dict[str, str]]) -> list[int]:
        """Return what the model is given to answer a message, or a chat that ends with one."""
        return renderer.prompt_tokens(prompt)

    def batch(self, examples: Sequence[Example], pad_token_id: int) -> dict[str, np.ndarray]:
        """Return what the model is called with for examples, by its keywords; where `engine` is `outputs`."""
        raise TypeError(f"{type(self).__name__} is not computed from whole outputs")

    def computed_tokens(self, examples: Sequence[Example]) -> int:
        """Return the tokens that the model computes of what `batch` gives for examples, padding included."""
        return len(examples) * max(map(len, examples))

    def states(self, outputs: Any, examples: Sequence[Example]) -> Any:
        """Return what `loss_sum` sees of what the model gave for `batch`; where `engine` is `outputs`."""
        raise TypeError(f"{type(self).__name__} is not computed from whole outputs")

    def joined(self, parts: Sequence[Any]) -> Any:
        """Return the states of several microbatches as those of one; where `compares_rows`."""
        raise TypeError(f"{type(self).__name__} does not compare rows")

    def read(self, states: Any) -> list[np.ndarray]:
        """Return what the model says of each example of a batch, in their order; where texts are not what it gives."""
        return list(states.logits.float().cpu().numpy())

    def spoken(self, outputs: Sequence[np.ndarray], examples: Sequence[Example]) -> list[tuple[Example, str]]:
        """Say what the model found, for people: each row once, by its first example, in the order of the rows.

        Args:
            outputs: What `read` gave, one an example.
            examples: The examples.
        """
        raise TypeError(f"{type(self).__name__} gives texts")

    def judged(self, outputs: Sequence[np.ndarray], examples: Sequence[Example]) -> tuple[list[Any], list[Any]]:
        """Return what the model found in each row and what the row was given, as the `metrics` read them.

        Args:
            outputs: What `read` gave, one an example.
            examples: The examples.
        """
        raise TypeError(f"{type(self).__name__} gives no outputs that metrics read")

    def likely(self, outputs: Sequence[np.ndarray]) -> np.ndarray | None:
        """Return how likely each class is, each by itself, (rows, classes), where that is what the model finds."""
        return None

    def groups(self, examples: Sequence[Example]) -> list[str] | None:
        """Return the part of the rows that each row is of, where parts are scored apart, too: a task, a domain."""
        return None

    def asked(self, inputs: Sequence[Any]) -> list[Content]:
        """Return rows in normal form of what people want predictions for.

        Raises:
            TuneError: They are not of the kind that the model reads.
        """
        raise TypeError(f"{type(self).__name__} gives texts")

    def frame(self, outputs: Sequence[np.ndarray], examples: Sequence[Example]) -> pd.DataFrame:
        """Return predictions as a table, one line a row."""
        raise TypeError(f"{type(self).__name__} gives texts")
