"""Domain-adversarial training: classes from features that do not tell domains apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from tune_magic.data.content import Content, Sited
from tune_magic.data.example import Example
from tune_magic.data.render import Part, Renderer, pair_of
from tune_magic.errors import DataError
from tune_magic.models.load import load_classifier
from tune_magic.objectives.classify import Classify
from tune_magic.recipe.schema import ObjectiveOptions

if TYPE_CHECKING:
    import torch

    from tune_magic.training.rows import RowStates

HEAD = "domain_head"
_UNKNOWN = -1  # class of a row that has none
_STEEPNESS = 10.0  # of the rise of the reversal's strength, as in the paper
_HEAD_FACTOR = 10.0  # of the other head's learning rate, as there: it must keep up with the features


class DomainAdversarialOptions(ObjectiveOptions):
    """Keys of `objective: domain_adversarial`."""

    name: Literal["domain_adversarial"] = Field(
        "domain_adversarial", description="Train a head that chooses a class, on features that hide the domain."
    )
    domain_weight: float = Field(1.0, ge=0, description="How strongly features are drawn away from telling domains.")


class DomainAdversarial(Classify):
    """The class's log-loss on rows that have one, and that of the domain on all, its gradient reversed below its head.

    The reversal grows with the share p of the steps done: w (2 / (1 + exp(-10 p)) - 1). A row whose domain is told no
    better than by chance has nothing more to hide, and its gradient is not reversed: without that bound, which is not in
    the paper, features that mislead the domain's head ever more lose the classes, too. In evaluations the loss is that of
    the classes alone: it is what better features are to lower.

    Args:
        options: Its keys in the recipe.
        classes: Names of the classes; learned from the training rows by `learn`.
        domains: Names of the domains; learned too.
    """

    Options: ClassVar[type[ObjectiveOptions]] = DomainAdversarialOptions
    formats: ClassVar[tuple[str, ...]] = ("text_domain",)
    gives = "outputs"
    reads_features = True
    metrics = ("class_accuracy",)
    summary = "A head learns classes, while the layers below unlearn what would tell the domains of texts apart."
    formula = "L = − (1 / n) Σ_i [log p(class of i | f_i) + log p(domain of i | R(f_i))];  R(f) = f forwards, its gradient times − w (2 / (1 + exp(−10 p)) − 1) where p(domain of i) is above chance, else times 0;  w = domain_weight, p = share of the steps done"
    smooths = True
    source = "Ganin et al. 2016, Domain-Adversarial Training of Neural Networks, arXiv:1505.07818."
    when = (
        "When classes are known in one domain and wanted in another: rows of the other need a `domain` and no `label`."
    )

    def __init__(
        self, options: ObjectiveOptions | None = None, *, classes: Sequence[str] = (), domains: Sequence[str] = ()
    ) -> None:
        super().__init__(options, classes=classes)
        self.domains = list(domains)

    def learn(self, contents: Iterable[Content], source: str) -> None:
        """Take classes and domains of the training rows, by the alphabet.

        Raises:
            DataError: There is one class or one domain only.
        """
        rows = [content for content in contents if isinstance(content, Sited)]
        self.classes = sorted({row.label for row in rows if row.label is not None})
        self.domains = sorted({row.domain for row in rows})
        for what, found in (("class", self.classes), ("domain", self.domains)):
            if len(found) < 2:
                raise DataError(f"{source} has {'one' if found else 'no'} {what}{' only' if found else ''}.",
                                hint="Two or more are needed; rows of a new domain need no `label`.")  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """The names of classes and domains."""
        return {"classes": self.classes, "domains": self.domains}

    def examples(self, part: Part, renderer: Renderer) -> list[Example]:
        """Encode the texts, with the numbers of class and domain."""
        known: list[tuple[int, Sited, list[int]]] = []
        for content, place, index in zip(part.contents, part.places, part.numbers, strict=True):
            assert isinstance(content, Sited)
            if content.label is not None and content.label not in self.classes:
                hint = f"Classes: {', '.join(self.classes)}."
                part.faults.add(place, "no training row has this class", content.label, hint=hint)
            elif content.domain not in self.domains:
                hint = f"Domains: {', '.join(self.domains)}."
                part.faults.add(place, "no training row has this domain", content.domain, hint=hint)
            else:
                number = _UNKNOWN if content.label is None else self.classes.index(content.label)
                known.append((index, content, [number, self.domains.index(content.domain)]))
        encoded = renderer.whole([pair_of(content) for _, content, _ in known], [index for index, _, _ in known])
        return [
            replace(example, targets=np.array(numbers, dtype=np.float32), reference=content.label)
            for example, (_, content, numbers) in zip(encoded, known, strict=True)
        ]

    def load(self, folder: Path, dtype: torch.dtype) -> Any:
        """Load the model with a new head for classes and another, which only training needs, for domains."""
        import torch

        model = load_classifier(folder, dtype, self.classes)
        width = model.config.get_text_config().hidden_size
        setattr(model, HEAD, torch.nn.Linear(width, len(self.domains), dtype=torch.float32))
        model.added_heads = (HEAD,)
        return model

    @property
    def strength(self) -> float:
        """What the reversed gradient is multiplied by now."""
        return float(self.options.domain_weight * (2 / (1 + math.exp(-_STEEPNESS * self.progress)) - 1))

    def loss_sum(self, states: RowStates) -> torch.Tensor:
        """Return the sum over rows of both parts."""
        from torch.nn import functional

        head = getattr(states.model, HEAD)
        domains = states.targets[:, 1].long()
        assert states.features is not None  # since `reads_features`
        guess = head(states.features.detach()).float().softmax(-1).gather(1, domains[:, None])
        strength = self.strength * (guess > 1 / len(self.domains)).to(states.features.dtype)
        told = head(_reversal().apply(states.features, strength))
        return self.score_sum(states) + functional.cross_entropy(told.float(), domains, reduction="sum")

    def learning_rate_factor(self, name: str) -> float:
        """The other head learns faster than what it is to be hidden from."""
        return _HEAD_FACTOR if HEAD in name.split(".") else 1.0

    def score_sum(self, states: RowStates) -> torch.Tensor:
        """Return the sum over rows that have a class."""
        from torch.nn import functional

        classes = states.targets[:, 0].long()
        loss: torch.Tensor = functional.cross_entropy(
            states.logits, classes, ignore_index=_UNKNOWN, reduction="sum", label_smoothing=states.label_smoothing
        )
        return loss

    def tally(self, states: RowStates) -> dict[str, float]:
        """Count the rows whose domain the other head still tells."""
        domains = states.targets[:, 1].long()
        told = getattr(states.model, HEAD)(states.features).argmax(-1)
        return {"domain accuracy": float((told == domains).sum())}

    def judged(self, outputs: Sequence[np.ndarray], examples: Sequence[Example]) -> tuple[list[Any], list[Any]]:
        """The classes found and given; None where a row has none."""
        return [self.classes[int(output.argmax())] for output in outputs], [example.reference for example in examples]

    def groups(self, examples: Sequence[Example]) -> list[str]:
        """The domain of each row."""
        return [self.domains[int(example.targets[1])] for example in examples]  # type: ignore[index]

    def asked(self, inputs: Sequence[Any]) -> list[Content]:
        """Texts, or pairs of texts; their domain is not looked at."""
        return [
            Sited(content.text, self.domains[0], None, content.second)  # type: ignore[union-attr]
            for content in super().asked(inputs)
        ]


def _reversal() -> Any:
    """Return the function that gives what it is given, and hands its gradient back times minus a strength (rows, 1)."""
    import torch

    class Reversal(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, features: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(strength)
            return features.view_as(features)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            (strength,) = ctx.saved_tensors
            return -strength * gradient, None

    return Reversal
