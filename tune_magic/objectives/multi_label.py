"""Several classes at once: each class of a text is decided by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from tune_magic.data.content import Content, MultiLabelled
from tune_magic.data.example import Example
from tune_magic.data.render import Part, Renderer
from tune_magic.errors import DataError, TuneError
from tune_magic.models.load import load_head
from tune_magic.objectives.base import Objective
from tune_magic.recipe.schema import ObjectiveOptions

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from tune_magic.training.rows import RowStates

_MOST_WEIGHT = 100.0  # of a class that next to no row has


class MultiLabelOptions(ObjectiveOptions):
    """Keys of `objective: multi_label`."""

    name: Literal["multi_label"] = Field(
        "multi_label", description="Train a head that decides about each class by itself."
    )
    class_weights: Literal["balanced"] | None = Field(
        None,
        description="`balanced`: the rows that have a class count as much as those that have it not. A class that every row "
        "has counts as without.",
    )
    threshold: float = Field(0.5, gt=0, lt=1, description="A class is given from this probability on.")


class MultiLabel(Objective):
    """Mean over classes of the binary cross-entropy of having the class or not, by a head on an encoder or a decoder.

    Args:
        options: Its keys in the recipe.
        classes: Names of the classes in the order of the head's outputs; learned from the training rows by `learn`.
        weights: What a row that has a class counts; learned too, where the options ask for it.
    """

    Options = MultiLabelOptions
    learns = True
    formats = ("text_labels",)
    task = "SEQ_CLS"
    engine = "rows"
    gives = "outputs"
    new_head = True
    metrics = ("micro_f1", "exact_sets")
    summary = "A head with one output a class learns for each class by itself whether a text has it."
    formula = "L = − (1 / (n C)) Σ_i Σ_c [w_c y_ic log s(z_ic) + (1 − y_ic) log(1 − s(z_ic))], c over the C classes, s the logistic function"
    source = "Binary relevance: Boutell et al. 2004, Learning multi-label scene classification."
    when = "When a text may have several classes, or none; `classify` is for exactly one."

    def __init__(
        self, options: ObjectiveOptions | None = None, *, classes: Sequence[str] = (), weights: Sequence[float] = ()
    ) -> None:
        super().__init__(options)
        self.classes = list(classes)
        self.weights = list(weights)

    def learn(self, contents: Iterable[Content], source: str) -> None:
        """Take the classes of the training rows, by the alphabet.

        Raises:
            DataError: No row has a class.
        """
        rows, num_rows = Counter[str](), 0
        for content in contents:
            assert isinstance(content, MultiLabelled)
            rows.update(set(content.labels))
            num_rows += 1
        if not rows:
            raise DataError(f"No row of {source} has a class.")
        self.classes = sorted(rows)
        if self.options.class_weights:
            lacking = {name: (num_rows - rows[name]) / rows[name] for name in self.classes}
            self.weights = [round(min(_MOST_WEIGHT, share), 6) if share else 1.0 for share in lacking.values()]

    def facts(self) -> dict[str, Any]:
        """The class names, and what a row that has one counts where that differs."""
        return {"classes": self.classes, **({"weights": self.weights} if self.weights else {})}

    def examples(self, part: Part, renderer: Renderer) -> list[Example]:
        """Encode the texts, with 1 or 0 for each class."""
        numbers = {name: number for number, name in enumerate(self.classes)}
        known: list[tuple[int, MultiLabelled]] = []
        for content, place, index in zip(part.contents, part.places, part.numbers, strict=True):
            assert isinstance(content, MultiLabelled)
            unknown = [label for label in content.labels if label not in numbers]
            if unknown:
                hint = f"Classes: {', '.join(self.classes)}."
                part.faults.add(place, "no training row has this class", unknown[0], hint=hint)
            else:
                known.append((index, content))
        encoded = renderer.whole([content.text for _, content in known], [index for index, _ in known])
        found = []
        for example, (_, content) in zip(encoded, known, strict=True):
            targets = np.zeros(len(self.classes), dtype=np.float32)
            targets[[numbers[label] for label in content.labels]] = 1.0
            found.append(replace(example, targets=targets, reference=", ".join(content.labels) or "none"))
        return found

    def load(self, folder: Path, dtype: torch.dtype) -> Any:
        """Load the model with a new head of one output a class."""
        return load_head(folder, dtype, "SequenceClassification", self.classes, "multi_label_classification")

    def loss_sum(self, states: RowStates) -> torch.Tensor:
        """Return the sum over rows of the mean over classes."""
        from torch.nn import functional

        weights = states.logits.new_tensor(self.weights) if self.weights else None
        losses = functional.binary_cross_entropy_with_logits(
            states.logits, states.targets, pos_weight=weights, reduction="none"
        )
        return losses.mean(-1).sum()

    def tally(self, states: RowStates) -> dict[str, float]:
        """Count the decisions that are right, as a share of a row."""
        right = (states.logits.sigmoid() >= self.options.threshold) == (states.targets > 0)
        return {"accuracy": float(right.float().mean(-1).sum())}

    def judged(self, outputs: Sequence[np.ndarray], examples: Sequence[Example]) -> tuple[list[Any], list[Any]]:
        """The classes that each row is given, and those it has."""
        given = [
            [name for name, has in zip(self.classes, example.targets, strict=True) if has]  # type: ignore[arg-type]
            for example in examples
        ]
        return [self._chosen(output) for output in outputs], given

    def likely(self, outputs: Sequence[np.ndarray]) -> np.ndarray:
        """The probability of each class."""
        return _sigmoid(np.stack(outputs))

    def spoken(self, outputs: Sequence[np.ndarray], examples: Sequence[Example]) -> list[tuple[Example, str]]:
        """The classes that each row is given."""
        return [
            (example, ", ".join(self._chosen(output)) or "none")
            for example, output in zip(examples, outputs, strict=True)
        ]

    def asked(self, inputs: Sequence[Any]) -> list[Content]:
        """Texts."""
        if not all(isinstance(given, str) for given in inputs):
            raise TuneError("A text, or a list of texts, is needed.")
        return [MultiLabelled(text, []) for text in inputs]

    def frame(self, outputs: Sequence[np.ndarray], examples: Sequence[Example]) -> pd.DataFrame:
        """The probability of each class, each by itself."""
        import pandas as pd

        return pd.DataFrame(self.likely(outputs), columns=self.classes)

    def _chosen(self, output: np.ndarray) -> list[str]:
        return [self.classes[number] for number in np.flatnonzero(_sigmoid(output) >= self.options.threshold)]


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * logits)))
