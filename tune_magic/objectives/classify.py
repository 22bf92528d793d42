"""Classification: each text belongs to one class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from tune_magic.data.content import Content, Labelled
from tune_magic.data.example import Example
from tune_magic.data.render import Part, Renderer
from tune_magic.errors import DataError, TuneError
from tune_magic.models.load import load_classifier
from tune_magic.objectives.base import Objective
from tune_magic.recipe.schema import ObjectiveOptions
from tune_magic.recipe.variant import Variant

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from tune_magic.training.rows import RowStates

_MOST_CLASSES_SHARE = 0.5
_LEAST_WRONG = 1e-12  # the slope of a power below 1 has no limit at 0


class ClassifyOptions(ObjectiveOptions):
    """Keys of `objective: classify`."""

    name: Literal["classify"] = Field("classify", description="Train a head that chooses one of the classes.")
    class_weights: Literal["balanced"] | dict[str, float] | None = Field(
        None,
        description="What a row of a class counts: `balanced`, each class as much as any other, or a mapping; classes that "
        "are not in it count 1.",
    )
    focal_gamma: float = Field(
        0.0, ge=0, le=10, description="Above 0, rows that are already right count less (focal loss); 2 is usual."
    )

    @field_validator("class_weights")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        if isinstance(value, dict) and any(not weight > 0 for weight in value.values()):
            raise ValueError("weights must be greater than 0.")
        return value


class Classify(Objective):
    """Minus the log-likelihood of each row's class, by a head on an encoder or a decoder.

    Weighted by class as in scikit-learn, rows / (classes * rows of the class), and by (1 - p)^gamma as in focal loss
    (Lin et al. 2017, arXiv:1708.02002).

    Args:
        options: Its keys in the recipe.
        classes: Names of the classes in the order of the head's outputs; learned from the training rows by `learn`.
        weights: What a row of each class counts; learned too, where the options ask for it.
    """

    Options: ClassVar[type[ObjectiveOptions]] = ClassifyOptions
    summary = (
        "A head on the model learns to choose a text's class: minus the log-likelihood of the class that is right."
    )
    formula = (
        "L = − (1 / n) Σ_i w_(y_i) (1 − p_i)^γ log p_i;  p_i = softmax(head(text_i)) at its class y_i;  w = 1 and γ = 0 "
        "unless `class_weights` and `focal_gamma` say otherwise"
    )
    source = "Cross-entropy on a new head, as in Devlin et al. 2019, BERT, arXiv:1810.04805."
    when = "Rows with a label: intents, topics, sentiment, pairs of texts. Encoders do it well at little cost; decoders can."
    variants: ClassVar[Mapping[str, Variant]] = {
        "focal": Variant(
            options={"focal_gamma": 2.0},
            summary="Classification in which rows that are already right count less.",
            formula="L = − (1 / n) Σ_i (1 − p_i)^γ log p_i;  γ = focal_gamma",
            source="Lin et al. 2017, arXiv:1708.02002.",
            when="Many easy rows and few hard or rare ones.",
        ),
        "balanced": Variant(
            options={"class_weights": "balanced"},
            summary="Classification in which each class counts as much as any other.",
            formula="L = − (1 / n) Σ_i w_(y_i) log p_i;  w_c = n / (classes · rows of c)",
            source="As `class_weight='balanced'` of scikit-learn.",
            when="Classes of very different sizes, all of which matter.",
        ),
    }
    learns = True
    formats: ClassVar[tuple[str, ...]] = ("text_label", "pair_label")
    task: ClassVar[str] = "SEQ_CLS"
    engine: ClassVar[Literal["tokens", "rows", "outputs"]] = "rows"
    gives: ClassVar[Literal["texts", "classes", "outputs"]] = "classes"
    smooths = True
    new_head = True

    def __init__(
        self, options: ObjectiveOptions | None = None, *, classes: Sequence[str] = (), weights: Sequence[float] = ()
    ) -> None:
        super().__init__(options)
        self.classes = list(classes)
        self.weights = list(weights)

    def learn(self, contents: Iterable[Content], source: str) -> None:
        """Take the classes of the training rows, in order: numbers by value, names by the alphabet.

        Raises:
            DataError: There is one class only, or nearly every row has one of its own.
        """
        rows = Counter(content.label for content in contents if isinstance(content, Labelled))
        found, num_rows = list(rows), rows.total()
        if not found:
            raise DataError(f"No row of {source} is left.", hint="`on_bad_rows: error` names what is wrong with them.")
        if len(found) < 2:
            raise DataError(f"{source} has one class only, {found[0]!r}.", hint="A classifier needs two or more.")
        if are_too_many(len(found), num_rows):
            raise DataError(
                f"{source} has {len(found)} classes in {num_rows} rows.",
                hint="Is `label` the right column? `columns: {label: YOURS}` names another.",
            )
        is_numbered = all(name.removeprefix("-").isdecimal() for name in found)
        self.classes = sorted(found, key=int) if is_numbered else sorted(found)
        given = self.options.class_weights
        if given == "balanced":
            self.weights = [round(num_rows / (len(found) * rows[name]), 6) for name in self.classes]
        elif given:
            unknown = sorted(given.keys() - set(self.classes))
            if unknown:
                raise DataError(f"`class_weights` names {unknown[0]!r}, a class that no row of {source} has.",
                                hint=f"Classes: {', '.join(self.classes)}.")  # fmt: skip
            self.weights = [given.get(name, 1.0) for name in self.classes]

    def facts(self) -> dict[str, Any]:
        """The class names, and what a row of each counts where that differs."""
        return {"classes": self.classes, **({"weights": self.weights} if self.weights else {})}

    def examples(self, part: Part, renderer: Renderer) -> list[Example]:
        """Encode the texts, with the number of each class."""
        numbers = {name: number for number, name in enumerate(self.classes)}
        known: list[tuple[int, Labelled]] = []
        for content, place, index in zip(part.contents, part.places, part.numbers, strict=True):
            if not isinstance(content, Labelled):
                raise TypeError(f"{type(content).__name__} has no class")
            if content.label in numbers:
                known.append((index, content))
            else:
                hint = f"Classes: {', '.join(self.classes)}."
                part.faults.add(place, "no training row has this class", content.label, hint=hint)
        labelled = [content for _, content in known]
        return renderer.classified(labelled, [numbers[c.label] for c in labelled], [index for index, _ in known])

    def load(self, folder: Path, dtype: torch.dtype) -> Any:
        """Load the model with a new head of as many outputs as there are classes."""
        return load_classifier(folder, dtype, self.classes)

    def loss_sum(self, states: RowStates) -> torch.Tensor:
        """Return the sum of -w (1 - p)^gamma log p, with p = p(class | text); in training -log p is smoothed."""
        from torch.nn import functional

        losses = plain = functional.cross_entropy(states.logits, states.targets, reduction="none")
        if states.label_smoothing:
            losses = functional.cross_entropy(
                states.logits, states.targets, reduction="none", label_smoothing=states.label_smoothing
            )
        if self.options.focal_gamma:
            wrong = -(-plain).expm1()  # 1 - p
            losses = losses * wrong.clamp_min(_LEAST_WRONG).pow(self.options.focal_gamma)
        if self.weights:
            losses = losses * losses.new_tensor(self.weights)[states.targets]
        return losses.sum()

    def tally(self, states: RowStates) -> dict[str, float]:
        """Count the rows whose likeliest class is right."""
        return {"accuracy": float((states.logits.argmax(-1) == states.targets).sum())}

    def spoken(self, outputs: Sequence[np.ndarray], examples: Sequence[Example]) -> list[tuple[Example, str]]:
        """The likeliest class of each row, and how likely it is."""
        shares = _softmax(np.stack(outputs))
        chosen = shares.argmax(-1).tolist()
        return [
            (example, f"{self.classes[number]} ({share[number]:.2f})")
            for example, number, share in zip(examples, chosen, shares, strict=True)
        ]

    def asked(self, inputs: Sequence[Any]) -> list[Content]:
        """Texts, or pairs of texts."""
        return [Labelled(*pair_of(given, self.classes[0])) for given in inputs]

    def frame(self, outputs: Sequence[np.ndarray], examples: Sequence[Example]) -> pd.DataFrame:
        """The probability of each class."""
        import pandas as pd

        return pd.DataFrame(_softmax(np.stack(outputs)), columns=self.classes)


def are_too_many(num_classes: int, num_rows: int) -> bool:
    """Return whether next to every row has a class of its own, so that there is nothing to learn of a class."""
    return num_classes > 2 and num_classes > _MOST_CLASSES_SHARE * num_rows


def pair_of(given: Any, label: str) -> tuple[str, str, str | None]:
    """Return text, label and second text of what somebody wants a class for.

    Raises:
        TuneError: It is neither a text nor a pair of texts.
    """
    parts = [given] if isinstance(given, str) else list(given)
    if len(parts) not in (1, 2) or not all(isinstance(part, str) for part in parts):
        raise TuneError(f"A text or a pair of texts is needed, got {given!r}.")
    return parts[0], label, parts[1] if len(parts) == 2 else None


def _softmax(logits: np.ndarray) -> np.ndarray:
    raised: np.ndarray = np.exp(logits - logits.max(-1, keepdims=True))
    shares: np.ndarray = raised / raised.sum(-1, keepdims=True)
    return shares
