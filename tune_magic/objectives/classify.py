"""Classification: each text belongs to one class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tune_magic.data.content import Content, Labelled
from tune_magic.data.example import Example
from tune_magic.data.render import Part, Renderer
from tune_magic.errors import DataError
from tune_magic.models.load import load_classifier
from tune_magic.objectives.base import Objective

if TYPE_CHECKING:
    import torch

    from tune_magic.training.rows import RowStates

_MOST_CLASSES_SHARE = 0.5


class Classify(Objective):
    """Minus the log-likelihood of each row's class, by a head on an encoder or a decoder.

    Args:
        classes: Names of the classes in the order of the head's outputs; learned from the training rows by `learn`.
    """

    learns = True
    formats = ("text_label", "pair_label")
    task: ClassVar[str] = "SEQ_CLS"
    scores_rows = True

    def __init__(self, classes: Sequence[str] = ()) -> None:
        self.classes = list(classes)

    def learn(self, contents: Iterable[Content], source: str) -> None:
        """Take the classes of the training rows, in order: numbers by value, names by the alphabet.

        Raises:
            DataError: There is one class only, or nearly every row has one of its own.
        """
        rows = Counter(content.label for content in contents if isinstance(content, Labelled))
        found, num_rows = list(rows), rows.total()
        if len(found) < 2:
            raise DataError(f"{source} has one class only, {found[0]!r}.", hint="A classifier needs two or more.")
        if len(found) > 2 and len(found) > _MOST_CLASSES_SHARE * num_rows:
            raise DataError(
                f"{source} has {len(found)} classes in {num_rows} rows.",
                hint="Is `label` the right column? `columns: {label: YOURS}` names another.",
            )
        is_numbered = all(name.lstrip("-").isdecimal() for name in found)
        self.classes = sorted(found, key=int) if is_numbered else sorted(found)

    def facts(self) -> dict[str, Any]:
        """The class names."""
        return {"classes": self.classes}

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
        """Return the sum of -log p(class | text)."""
        from torch.nn import functional

        return functional.cross_entropy(states.logits, states.targets, reduction="sum")

    def tally(self, states: RowStates) -> dict[str, float]:
        """Count the rows whose likeliest class is right."""
        return {"accuracy": float((states.logits.argmax(-1) == states.targets).sum())}
