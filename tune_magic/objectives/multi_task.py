"""Several tasks at once: one model, a head for each task, classes or numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from tune_magic.data.content import Content, Tasked
from tune_magic.data.example import Example
from tune_magic.data.render import Part, Renderer, pair_of
from tune_magic.errors import DataError, TuneError
from tune_magic.models.load import load_head
from tune_magic.objectives.base import Objective
from tune_magic.objectives.classify import are_too_many
from tune_magic.recipe.schema import ObjectiveOptions

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from tune_magic.training.rows import RowStates


class MultiTaskOptions(ObjectiveOptions):
    """Keys of `objective: multi_task`."""

    name: Literal["multi_task"] = Field("multi_task", description="Train a head for each task, on one model.")
    task_weights: dict[str, float] = Field(
        default_factory=dict, description="What a row of a task counts in the loss; 1 where it is not named."
    )

    @field_validator("task_weights")
    @classmethod
    def _positive(cls, value: dict[str, float]) -> dict[str, float]:
        if any(not weight > 0 for weight in value.values()):
            raise ValueError("weights must be greater than 0.")
        return value


class MultiTask(Objective):
    """Each row's loss by the head of its own task: -log p(class), or the squared error in standard deviations.

    The heads lie side by side in one matrix; a row sees the columns of its task alone. Rows of different tasks meet in a
    step as often as `mix` says.

    Args:
        options: Its keys in the recipe.
        tasks: Of each task its `classes`, or `mean` and `deviation`; learned from the training rows by `learn`.
    """

    Options = MultiTaskOptions
    learns = True
    learns_from_mix = True
    formats = ("text_task",)
    task = "SEQ_CLS"
    engine = "rows"
    gives = "outputs"
    new_head = True
    metrics = ("class_accuracy", "mean_absolute_error")
    summary = "One model learns several tasks at once, each by a head of its own."
    formula = "L = (1 / n) Σ_i w_(task of i) loss_i;  loss_i = − log p(class of i), or (z_i − (y_i − mean) / deviation)² of tasks with numbers, by the task's own head"
    source = "Caruana 1997, Multitask Learning; Liu et al. 2019, MT-DNN, arXiv:1901.11504."
    when = "When tasks over the same kind of texts have few rows each, or one model must do them all."

    def __init__(
        self, options: ObjectiveOptions | None = None, *, tasks: dict[str, dict[str, Any]] | None = None
    ) -> None:
        super().__init__(options)
        self.tasks = tasks or {}

    def learn(self, contents: Iterable[Content], source: str) -> None:
        """Take the tasks of the training rows; a task whose answers are numbers, one with a fraction, gives numbers, else classes.

        Raises:
            DataError: A task has nothing to tell apart.
        """
        answers: dict[str, list[str | float]] = {}
        for content in contents:
            assert isinstance(content, Tasked)
            answers.setdefault(content.task, []).append(content.answer)
        self.tasks = {name: _learned(name, answers[name], source) for name in sorted(answers)}
        unknown = sorted(self.options.task_weights.keys() - self.tasks.keys())
        if unknown:
            raise DataError(f"`task_weights` names {unknown[0]!r}, a task that no row has.",
                            hint=f"Tasks: {', '.join(self.tasks)}.")  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """The tasks, each with its classes or with mean and deviation."""
        return {"tasks": self.tasks}

    def examples(self, part: Part, renderer: Renderer) -> list[Example]:
        """Encode the texts, with the number of the task and what it is to give."""
        known: list[tuple[int, Tasked, list[float]]] = []
        for content, place, index in zip(part.contents, part.places, part.numbers, strict=True):
            assert isinstance(content, Tasked)
            try:
                known.append((index, content, self._targets(content)))
            except ValueError as error:
                part.faults.add(place, str(error), str(content.answer))
        encoded = renderer.whole([pair_of(content) for _, content, _ in known], [index for index, _, _ in known])
        return [
            replace(example, targets=np.array(targets, dtype=np.float32), reference=_said(content.answer))
            for example, (_, content, targets) in zip(encoded, known, strict=True)
        ]

    def load(self, folder: Path, dtype: torch.dtype) -> Any:
        """Load the model with the heads of all tasks side by side."""
        outputs = [f"{task}: {name}" for task, about in self.tasks.items() for name in about.get("classes", ["value"])]
        return load_head(folder, dtype, "SequenceClassification", outputs)

    def loss_sum(self, states: RowStates) -> torch.Tensor:
        """Return the sum over rows, each by its task's head."""
        from torch.nn import functional

        loss = states.logits.sum() * 0
        for number, (name, about) in enumerate(self.tasks.items()):
            chosen = states.targets[:, 0] == number
            if not bool(chosen.any()):
                continue
            logits, given = states.logits[chosen][:, self._columns(number)], states.targets[chosen, 1]
            if "classes" in about:
                own = functional.cross_entropy(logits, given.long(), reduction="sum")
            else:
                own = functional.mse_loss(logits[:, 0], given, reduction="sum")
            loss = loss + self.options.task_weights.get(name, 1.0) * own
        return loss

    def judged(self, outputs: Sequence[np.ndarray], examples: Sequence[Example]) -> tuple[list[Any], list[Any]]:
        """The class or number of each row's task, found and given."""
        found = [self._answer(output, _task(example)) for output, example in zip(outputs, examples, strict=True)]
        given = [
            about["classes"][int(value)] if "classes" in about else value * about["deviation"] + about["mean"]
            for about, value in ((self._about(_task(e)), float(e.targets[1])) for e in examples)  # type: ignore[index]
        ]
        return found, given

    def spoken(self, outputs: Sequence[np.ndarray], examples: Sequence[Example]) -> list[tuple[Example, str]]:
        """What each row's task makes of it."""
        pairs = zip(outputs, examples, strict=True)
        return [(example, _said(self._answer(output, _task(example)))) for output, example in pairs]

    def groups(self, examples: Sequence[Example]) -> list[str]:
        """The task of each row."""
        return [list(self.tasks)[_task(example)] for example in examples]

    def asked(self, inputs: Sequence[Any]) -> list[Content]:
        """Texts; every task answers each."""
        if not all(isinstance(given, str) for given in inputs):
            raise TuneError("A text, or a list of texts, is needed.")
        first, about = next(iter(self.tasks.items()))
        return [Tasked(text, first, about["classes"][0] if "classes" in about else about["mean"]) for text in inputs]

    def frame(self, outputs: Sequence[np.ndarray], examples: Sequence[Example]) -> pd.DataFrame:
        """What each task (columns) makes of each text (rows)."""
        import pandas as pd

        return pd.DataFrame({
            name: [self._answer(output, number) for output in outputs] for number, name in enumerate(self.tasks)
        })  # fmt: skip

    def _targets(self, content: Tasked) -> list[float]:
        """Return the number of a row's task, and of its class, or its standardised number.

        Raises:
            ValueError: No training row is like it.
        """
        about = self.tasks.get(content.task)
        if about is None:
            raise ValueError(f"no training row has the task {content.task!r}")
        number = float(list(self.tasks).index(content.task))
        if "classes" not in about:
            return [number, (float(content.answer) - about["mean"]) / about["deviation"]]
        answer = _class_of(content.answer)
        if answer not in about["classes"]:
            raise ValueError("no training row of this task has this class")
        return [number, float(about["classes"].index(answer))]

    def _about(self, number: int) -> dict[str, Any]:
        return list(self.tasks.values())[number]

    def _columns(self, number: int) -> slice:
        """Return the outputs of a task's head."""
        sizes = [len(about.get("classes", ["value"])) for about in self.tasks.values()]
        return slice(sum(sizes[:number]), sum(sizes[: number + 1]))

    def _answer(self, output: np.ndarray, number: int) -> str | float:
        about, own = self._about(number), output[self._columns(number)]
        if "classes" in about:
            return str(about["classes"][int(own.argmax())])
        return float(own[0]) * float(about["deviation"]) + float(about["mean"])


def _learned(name: str, answers: Sequence[str | float], source: str) -> dict[str, Any]:
    if _are_measures(answers):
        values = np.array(answers, dtype=float)
        if not values.std() > 0:
            raise DataError(f"All numbers of the task {name!r} of {source} are the same.")
        return {"mean": float(f"{values.mean():.8g}"), "deviation": float(f"{values.std():.8g}")}
    classes = sorted({_class_of(answer) for answer in answers})
    if len(classes) < 2:
        raise DataError(f"The task {name!r} of {source} has one class only, {classes[0]!r}.")
    if are_too_many(len(classes), len(answers)):
        are_numbers = all(isinstance(answer, float) for answer in answers)
        raise DataError(
            f"The task {name!r} of {source} has {len(classes)} classes in {len(answers)} rows.",
            hint="For a task that gives numbers, one row at least must have a number with a fraction, such as 3.5."
            if are_numbers
            else "Is `label` the right column? `columns: {label: YOURS}` names another.",
        )
    return {"classes": classes}


def _are_measures(answers: Sequence[str | float]) -> bool:
    """Whether all are numbers, and one has a fraction."""
    are_numbers = all(isinstance(answer, float) for answer in answers)
    return are_numbers and any(not float(answer).is_integer() for answer in answers)


def _class_of(answer: str | float) -> str:
    """Return an answer as the name of a class; different numbers have different names."""
    if isinstance(answer, str):
        return answer
    return str(int(answer)) if answer.is_integer() else repr(answer)


def _said(answer: str | float) -> str:
    """Return an answer as people read it."""
    return answer if isinstance(answer, str) else f"{answer:.4g}"


def _task(example: Example) -> int:
    assert example.targets is not None
    return int(example.targets[0])
