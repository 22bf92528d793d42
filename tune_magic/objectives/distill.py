"""Distillation: a student learns what a teacher predicts, or what it answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tune_magic.models.teacher import is_address
from tune_magic.objectives.base import Objective
from tune_magic.objectives.classify import Classify, ClassifyOptions
from tune_magic.objectives.divergence import Divergence, divergence
from tune_magic.recipe.schema import ObjectiveOptions, Part

if TYPE_CHECKING:
    import torch

    from tune_magic.training.rows import RowStates
    from tune_magic.training.target_states import TargetStates

_TEACHER, _DIVERGENCE = "teacher", "divergence"


class _Taught(Part):
    """Keys of a student that sees its teacher's probabilities."""

    teacher: str = Field(
        description="Who is learned from: `run:NAME` or a run's folder; of `distill` also a model (a folder, an installed "
        "wheel, a hub id) or an address with OpenAI's protocol."
    )
    divergence: Divergence = Field(
        "forward_kl",
        description="How far student and teacher are apart: `forward_kl` covers all the teacher says, `reverse_kl` what is "
        "likeliest to it, `jensen_shannon` lies between, by `beta`.",
    )
    temperature: float = Field(
        1.0, gt=0, le=100, description="Logits are divided by it; above 1, unlikely answers count more."
    )
    alpha: float = Field(
        0.5, ge=0, le=1, description="Share of the teacher in the loss; the rest is the rows' own answers."
    )
    beta: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="Of `jensen_shannon`: towards 0 it is like `forward_kl`, towards 1 like `reverse_kl`.",
    )


class DistillOptions(_Taught, ObjectiveOptions):
    """Keys of `objective: distill`."""

    name: Literal["distill"] = Field("distill", description="Learn from a teacher.")
    level: Literal["token", "sequence"] = Field(
        "token",
        description="`token`: the teacher's probabilities of every trained token; it must have the student's tokens. "
        "`sequence`: it answers the training prompts once, and the student learns these answers.",
    )
    teacher_model: str | None = Field(None, description="Name of the model at an address.")
    api_key_env: str = Field("OPENAI_API_KEY", description="Variable of the environment that holds the address's key.")
    max_new_tokens: int = Field(256, ge=1, le=32_768, description="Longest answer of the teacher in tokens.")

    @model_validator(mode="after")
    def _address(self) -> DistillOptions:
        if not is_address(self.teacher):
            if self.teacher_model is not None:
                raise ValueError("`teacher_model` is the name of a model at an address; `teacher` is none.")
            return self
        if self.level == "token":
            raise ValueError("a teacher at an address gives answers, no probabilities: say `level: sequence`.")
        if not self.teacher_model:
            raise ValueError("a teacher at an address needs `teacher_model`, the name of the model there.")
        return self


class Distill(Objective):
    """A language model learns from another one: from its probabilities, token by token, or from its answers.

    The rows' own answers are the context of every token, so `reverse_kl` is that of MiniLLM without its sampling.
    By `level: sequence` (Kim and Rush 2016, arXiv:1606.07947) the loss is the likelihood of the teacher's answers.
    """

    Options = DistillOptions
    summary: ClassVar[str] = "The student moves towards the teacher's probabilities of every trained token."
    formula: ClassVar[str] = (
        "L = (1 / T) Σ_t [α τ² D(P_t, Q_t) − (1 − α) log p(x_t | before)];  P, Q: probabilities of teacher and student at temperature τ;  D: KL(P ‖ Q), KL(Q ‖ P) or Jensen-Shannon, by `divergence`"
    )
    source: ClassVar[str] = "Hinton et al. 2015, arXiv:1503.02531; Kim and Rush 2016, arXiv:1606.07947."
    when: ClassVar[str] = (
        "A small model should answer like a larger one, or like one that was tuned before. With other tokens than the "
        "teacher's, or a teacher behind an address, take `level: sequence`."
    )

    @property
    def beside(self) -> tuple[str, ...]:  # type: ignore[override]
        """The teacher, unless its answers are the rows."""
        return (_TEACHER,) if self.options.level == "token" else ()

    @property
    def learns_answers_of_teacher(self) -> bool:  # type: ignore[override]
        """By whole answers."""
        return bool(self.options.level == "sequence")

    def loss_sum(self, states: TargetStates) -> torch.Tensor:
        """Return the weighted sum of alpha T^2 D(teacher, student) - (1 - alpha) log p(token | before)."""
        if not self.beside:
            return self.score_sum(states)
        options = self.options

        def loss(logits: torch.Tensor, targets: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
            from torch.nn import functional

            apart = _apart(options, logits, theirs)
            own = functional.cross_entropy(logits.float(), targets, reduction="none")
            value: torch.Tensor = options.alpha * options.temperature**2 * apart + (1 - options.alpha) * own
            return value

        return (states.compared(_TEACHER, loss) * states.weights).sum()

    def score_sum(self, states: TargetStates) -> torch.Tensor:
        """Return the weighted sum of -log p(token | before), as other objectives are scored by."""
        return -(states.log_probs() * states.weights).sum()

    def tally(self, states: TargetStates) -> dict[str, float]:
        """Sum up how far teacher and student are apart."""
        if not self.beside:
            return {}
        apart = states.compared(_TEACHER, lambda logits, _, theirs: _apart(self.options, logits, theirs))
        return {_DIVERGENCE: float((apart * states.weights).sum())}


class DistillClassesOptions(_Taught, ClassifyOptions):
    """Keys of `objective: distill_classes`."""

    name: Literal["distill_classes"] = Field("distill_classes", description="Learn to classify from a teacher.")  # type: ignore[assignment]


class DistillClasses(Classify):
    """A classifier learns from another one's probabilities of the same classes.

    The rest of the loss, and what held-out rows are scored by, is that of `classify`.
    """

    Options = DistillClassesOptions
    beside = (_TEACHER,)
    summary: ClassVar[str] = "The student moves towards the teacher's probabilities of the classes of each row."
    formula: ClassVar[str] = (
        "L = (1 / n) Σ_i [α τ² D(P_i, Q_i) + (1 − α) · loss of `classify`];  P, Q: probabilities of teacher and student at temperature τ;  D: KL(P ‖ Q), KL(Q ‖ P) or Jensen-Shannon, by `divergence`"
    )
    smooths = True
    source: ClassVar[str] = "Hinton et al. 2015, arXiv:1503.02531."
    when: ClassVar[str] = (
        "A small encoder should classify like a larger one with the same tokens, that was tuned on the same classes."
    )

    def loss_sum(self, states: RowStates) -> torch.Tensor:
        """Return the sum of alpha T^2 D(teacher, student) + (1 - alpha) of the classifier's loss."""
        options = self.options
        apart = states.compared(_TEACHER, lambda logits, _, theirs: _apart(options, logits, theirs)).sum()
        value: torch.Tensor = options.alpha * options.temperature**2 * apart
        value += (1 - options.alpha) * self.score_sum(states)
        return value

    def score_sum(self, states: RowStates) -> torch.Tensor:
        """Return the classifier's loss."""
        return super().loss_sum(states)

    def tally(self, states: RowStates) -> dict[str, float]:
        """Count the rows that are right, and sum up how far teacher and student are apart."""
        apart = states.compared(_TEACHER, lambda logits, _, theirs: _apart(self.options, logits, theirs))
        return {**super().tally(states), _DIVERGENCE: float(apart.sum())}


def _apart(options: Any, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return divergence(student, teacher, options.divergence, temperature=options.temperature, beta=options.beta)
