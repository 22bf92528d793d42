"""A second model that is computed beside the trained one, over the same examples, for whoever compares with it.

A teacher, or the base: the model as it was before training. Where a method adds to a frozen base, that base is the trained
model with what was added switched off, and needs no memory; else it is loaded once more, frozen.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tune_magic.data.example import Example
from tune_magic.data.table import Table
from tune_magic.errors import TuneError
from tune_magic.methods.base import Method
from tune_magic.models.find import find_model
from tune_magic.models.load import load_tokenizer, local_folder
from tune_magic.models.teacher import Teacher
from tune_magic.objectives.base import Objective
from tune_magic.recipe.schema import MethodOptions
from tune_magic.training.engine import Engine
from tune_magic.training.target_states import TargetStates
from tune_magic.training.vocabulary import Vocabulary

BASE, TEACHER = "base", "teacher"
_CHECKED_ROWS = 8


class Beside(abc.ABC):
    """Gives states of another model, without gradients and without drawing random numbers."""

    @abc.abstractmethod
    def states(self, examples: Sequence[Example]) -> Any:
        """Run the model over a microbatch, in an order of its own."""

    @abc.abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return what a plan says of it, JSON-ready."""


class AddedOff(Beside):
    """The trained model with what the method added switched off: its base, to the bit.

    Args:
        engine: Of the trained model.

    Attributes:
        is_shown: It is switched off already, by whoever scores the base.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.is_shown = False

    def states(self, examples: Sequence[Example]) -> Any:
        """Switch off, compute, switch on; in evaluation mode, as dropout is no part of the base."""
        engine, was_training = self.engine, self.engine.model.training
        engine.model.eval()
        try:
            with torch.no_grad(), self._off():
                states = engine.own_states(examples)
        finally:
            if was_training:
                engine.method.to_training(engine.model)
        if isinstance(states, TargetStates) and states.head is not None and states.head_is_trained:
            states.head = self._head_switched_off(states.head)
        return states

    def facts(self) -> dict[str, Any]:
        """That it takes no memory."""
        return {"parameters": 0}

    def _off(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.is_shown else self.engine.method.without(self.engine.model)

    def _head_switched_off(
        self, head: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return a head that was added to, as it is without that whenever it is called."""

        def plain(hidden: torch.Tensor) -> torch.Tensor:
            with self._off():
                return head(hidden)

        return plain


class Loaded(Beside):
    """A frozen model of its own.

    Args:
        engine: Of that model.
    """

    def __init__(self, engine: Engine) -> None:
        engine.model.requires_grad_(False)
        engine.model.eval()
        self.engine = engine

    def states(self, examples: Sequence[Example]) -> Any:
        """Compute the whole microbatch at once."""
        with torch.no_grad():
            return self.engine.own_states(examples)

    def facts(self) -> dict[str, Any]:
        """How large it is."""
        return {"parameters": sum(p.numel() for p in self.engine.model.parameters())}


class AsLoaded(Method):
    """No method: the model as it is."""

    def apply(self, model: Any, task: str) -> Any:
        """Train nothing."""
        return model


@contextlib.contextmanager
def base_shown(engine: Engine) -> Iterator[None]:
    """While inside, the engine's model is its base already."""
    switched = [one for one in engine.beside.values() if isinstance(one, AddedOff)]
    for one in switched:
        one.is_shown = True
    try:
        yield
    finally:
        for one in switched:
            one.is_shown = False


def check_teacher(teacher: Teacher | None, objective: Objective, vocabulary: Vocabulary) -> None:
    """Refuse a teacher whose probabilities cannot be compared with the student's, before any weights are read.

    Raises:
        TuneError: It has other tokens or classes, or is of another kind.
    """
    if teacher is None or TEACHER not in objective.beside:
        return
    hint = "`level: sequence` teaches by answers instead, whatever the tokens." if not objective.scores_rows else None
    if teacher.kind == "run":
        from tune_magic.training.alike import objective_of

        taught = objective_of(teacher.run)
        if taught.scores_rows != objective.scores_rows:
            does = "classifies texts" if taught.scores_rows else "answers texts"
            raise TuneError(f"The teacher {teacher.name} {does}; the student does not.")
        ours, theirs = objective.facts().get("classes", []), taught.facts().get("classes", [])
        if ours != theirs:
            raise TuneError(f"The teacher {teacher.name} knows other classes ({', '.join(theirs)}) than the rows "
                            f"have ({', '.join(ours)}).")  # fmt: skip
    elif objective.scores_rows:
        raise TuneError(
            f"The teacher of a classifier must be a run that classifies; {teacher.name} is a {teacher.kind}.",
            hint="Train one with `objective: classify`, then name it: `teacher: run:NAME`.",
        )
    if _tokenizer_of(teacher).get_vocab() != vocabulary.tokenizer.get_vocab():
        raise TuneError(
            f"The teacher {teacher.name} has other tokens than the student, so their probabilities cannot be compared.",
            hint=hint,
        )


def attach(
    engine: Engine, objective: Objective, vocabulary: Vocabulary, *, also: Sequence[str], teacher: Teacher | None,
    load_base: Callable[[], Any], base: Path, train: Table, holds_base: bool,
) -> None:  # fmt: skip
    """Give an engine the models that are computed beside its own.

    Args:
        engine: Of the trained model.
        objective: Says which it compares with.
        vocabulary: The run's.
        also: Roles that something else compares with.
        teacher: Who is learned from.
        load_base: Loads the model as it was before training.
        base: The model's folder.
        train: The training rows, of which the first are for the self-check.
        holds_base: The trained model is its base where what was added is switched off.

    Raises:
        TuneError: The base has no embeddings of new tokens, or reads fewer tokens than the rows have.
    """
    roles = list(dict.fromkeys([*objective.beside, *also]))
    made: dict[str, Beside] = {}
    for role in roles:
        is_base = role == BASE or _is_base(teacher, base)
        if is_base and vocabulary.is_extended:
            raise TuneError(
                "The base has no embeddings of the new tokens, so it cannot be compared with on these rows.",
                hint="Leave out `vocabulary:`, or what compares with the base.",
            )
        if is_base and BASE not in made:
            made[BASE] = AddedOff(engine) if holds_base else _loaded(engine, load_base(), None, objective, train)
        if not is_base:
            assert teacher is not None
            made[role] = _teacher(engine, teacher, objective, train)
        made.setdefault(role, made.get(BASE))  # type: ignore[arg-type]
    engine.beside = {role: made[role] for role in roles}


def facts(engine: Engine, teacher: Teacher | None) -> dict[str, Any]:
    """Return what a plan says of the teacher, JSON-ready; nothing where there is none."""
    if teacher is None:
        return {}
    found = engine.beside.get(TEACHER)
    return {"teacher": {"name": teacher.name, "kind": teacher.kind, **(found.facts() if found else {})}}


def _is_base(teacher: Teacher | None, base: Path) -> bool:
    return teacher is not None and teacher.kind == "model" and _folder(teacher) == base


def _folder(teacher: Teacher) -> Path:
    return local_folder(find_model(teacher.name))


def _teacher(engine: Engine, teacher: Teacher, objective: Objective, train: Table) -> Loaded:
    if teacher.kind == "run":
        from tune_magic.training.tuned import load_tuned

        tuned = load_tuned(teacher.run, dtype=engine.dtype)
        return _loaded(engine, tuned.model, tuned.method, objective, train)
    with torch.random.fork_rng():
        model = objective.load(_folder(teacher), engine.dtype)
    return _loaded(engine, model, None, objective, train)


def _loaded(engine: Engine, model: Any, method: Method | None, objective: Objective, train: Table) -> Loaded:
    """Give a model an engine of the same kind, which checks itself on the first rows.

    Raises:
        TuneError: The rows are longer than what the model can read.
    """
    method = method or AsLoaded(MethodOptions(name="none"))
    longest, positions = int(train.lengths.max()), _positions(method.inner(model), method)
    if positions is not None and longest > positions:
        raise TuneError(
            f"The teacher reads {positions} tokens at most, and the longest row has {longest}.",
            hint=f"Cut the rows: `max_length: {positions}`.",
        )
    beside = type(engine)(
        model.to(engine.device), method, dtype=engine.dtype, max_tokens=engine.max_tokens, share_prefixes=True
    )  # type: ignore[call-arg]
    found = Loaded(beside)
    beside.self_check(train[:_CHECKED_ROWS], objective.score_sum)
    return found


def _positions(inner: Any, method: Method) -> int | None:
    positions = getattr(inner.config, "max_position_embeddings", None)
    return None if positions is None else int(positions) - method.num_virtual_tokens


def _tokenizer_of(teacher: Teacher) -> Any:
    """Return what a model or a run encodes texts by."""
    if teacher.kind == "model":
        return load_tokenizer(_folder(teacher))
    from tune_magic.training.tuned import tokenizer_of

    return tokenizer_of(teacher.run)
