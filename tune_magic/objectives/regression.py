"""Regression: a number for each text, or for each pair of texts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from tune_magic.data.content import Content, Measured, Related
from tune_magic.data.example import Example
from tune_magic.data.render import Part, Renderer, pair_of
from tune_magic.errors import DataError, TuneError
from tune_magic.models.load import load_head
from tune_magic.objectives.base import Objective
from tune_magic.recipe.schema import ObjectiveOptions

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from tune_magic.training.rows import RowStates


class RegressionOptions(ObjectiveOptions):
    """Keys of `objective: regression`."""

    name: Literal["regression"] = Field("regression", description="Train a head that gives a number.")
    loss: Literal["mse", "mae", "huber"] = Field(
        "mse",
        description="Squared error; absolute error; or `huber`: squared up to one standard deviation, then absolute.",
    )


class Regression(Objective):
    """The error of a head's number in standard deviations of the training rows, so that 1 (mse) is always the mean.

    Args:
        options: Its keys in the recipe.
        mean: Of the training rows; learned by `learn`.
        deviation: Standard deviation of the training rows; learned too.
    """

    Options = RegressionOptions
    learns = True
    formats = ("text_score", "scored_pairs")
    task = "SEQ_CLS"
    engine = "rows"
    gives = "outputs"
    new_head = True
    metrics = ("mean_absolute_error", "r_squared", "spearman")
    summary = (
        "A head with one output learns the number of each text, measured in standard deviations of the training rows."
    )
    formula = "mse: L = (1 / n) Σ_i (z_i − (y_i − mean) / deviation)²;  mae, huber: that difference's absolute value, its Huber loss"
    source = "Least squares; Huber 1964, Robust Estimation of a Location Parameter."
    when = "When rows have a measure, a score or a rating whose order matters; `classify` if numbers are only names."

    def __init__(self, options: ObjectiveOptions | None = None, *, mean: float = 0.0, deviation: float = 1.0) -> None:
        super().__init__(options)
        self.mean = mean
        self.deviation = deviation

    def learn(self, contents: Iterable[Content], source: str) -> None:
        """Take mean and standard deviation of the training rows.

        Raises:
            DataError: All numbers are the same.
        """
        values = np.array([_value(content) for content in contents])
        if not len(values):
            raise DataError(f"No row of {source} is left.", hint="`on_bad_rows: error` names what is wrong with them.")
        if not values.std() > 0:
            raise DataError(f"All numbers of {source} are {values[0]:g}: there is nothing to learn.")
        self.mean, self.deviation = float(f"{values.mean():.8g}"), float(f"{values.std():.8g}")

    def facts(self) -> dict[str, Any]:
        """Mean and standard deviation."""
        return {"mean": self.mean, "deviation": self.deviation}

    def examples(self, part: Part, renderer: Renderer) -> list[Example]:
        """Encode the texts, with their numbers in standard deviations from the mean."""
        encoded = renderer.whole([_texts(content) for content in part.contents], part.numbers)
        return [
            replace(
                example, reference=f"{_value(content):g}",
                targets=np.array([(_value(content) - self.mean) / self.deviation], dtype=np.float32),
            )
            for example, content in zip(encoded, part.contents, strict=True)
        ]  # fmt: skip

    def load(self, folder: Path, dtype: torch.dtype) -> Any:
        """Load the model with a new head of one output."""
        return load_head(folder, dtype, "SequenceClassification", ["value"], "regression")

    def loss_sum(self, states: RowStates) -> torch.Tensor:
        """Return the sum of the errors."""
        from torch.nn import functional

        match self.options.loss:
            case "mae":
                return functional.l1_loss(states.logits, states.targets, reduction="sum")
            case "huber":
                return functional.huber_loss(states.logits, states.targets, reduction="sum")
            case _:
                return functional.mse_loss(states.logits, states.targets, reduction="sum")

    def tally(self, states: RowStates) -> dict[str, float]:
        """Sum the absolute errors, in the unit of the rows."""
        return {"mean absolute error": float((states.logits - states.targets).abs().sum()) * self.deviation}

    def judged(self, outputs: Sequence[np.ndarray], examples: Sequence[Example]) -> tuple[list[Any], list[Any]]:
        """The numbers found and given, in the unit of the rows."""
        given = [self._number(example.targets) for example in examples]  # type: ignore[arg-type]
        return [self._number(output) for output in outputs], given

    def spoken(self, outputs: Sequence[np.ndarray], examples: Sequence[Example]) -> list[tuple[Example, str]]:
        """The numbers, to four places."""
        return [(example, f"{self._number(output):.4g}") for example, output in zip(examples, outputs, strict=True)]

    def asked(self, inputs: Sequence[Any]) -> list[Content]:
        """Texts, or pairs of texts."""
        found: list[Content] = []
        for given in inputs:
            parts = [given] if isinstance(given, str) else list(given)
            if len(parts) not in (1, 2) or not all(isinstance(part, str) for part in parts):
                raise TuneError(f"A text or a pair of texts is needed, got {given!r}.")
            found.append(Measured(parts[0], self.mean, parts[1] if len(parts) == 2 else None))
        return found

    def frame(self, outputs: Sequence[np.ndarray], examples: Sequence[Example]) -> pd.DataFrame:
        """The number of each text under `value`."""
        import pandas as pd

        return pd.DataFrame({"value": [self._number(output) for output in outputs]})

    def _number(self, output: np.ndarray) -> float:
        return float(output[0]) * self.deviation + self.mean


def _value(content: Content) -> float:
    value = content.score if isinstance(content, Related) else content.value if isinstance(content, Measured) else None
    if value is None or not math.isfinite(value):
        raise TypeError(f"{type(content).__name__} has no number")
    return value


def _texts(content: Content) -> Any:
    return (content.anchor, content.positive) if isinstance(content, Related) else pair_of(content)  # type: ignore[arg-type]
