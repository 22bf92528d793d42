"""What looks on while a model is trained: the contract of callbacks, and how the loop calls them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tune_magic import plugins
from tune_magic.errors import TuneError
from tune_magic.recipe.schema import CallbackOptions

if TYPE_CHECKING:
    from tune_magic.training.checkpoint import Progress
    from tune_magic.training.prepare import Session

Numbers = Mapping[str, Any]
Answer = bool | Numbers | None  # numbers to log, True to end the run


@dataclass(frozen=True)
class Training:
    """What a callback may look at.

    Attributes:
        model: What is trained, with the method's parameters in it.
        tokenizer: Its tokenizer.
        plan: Every resolved value: `total_steps`, `trainable_parameters` ...
    """

    model: Any
    tokenizer: Any
    plan: Numbers


class Callback:
    """Base class of callbacks; a subclass overrides the hooks it wants.

    A hook returns numbers to log (a mapping) or None; `on_step` and `on_evaluation` may return True, which ends the run
    here: it is evaluated, saved and `finished`. What a hook raises fails the run, under the callback's name. Numbers that hooks draw from the global
    random generators are not missed by training: the generators are put back.

    Args:
        options: Its keys in the recipe. None: their defaults.

    Attributes:
        Options: The callback's keys, a `CallbackOptions`.
        summary: What it does, in one sentence.
        training: What is trained; set before `on_start`.
    """

    Options: ClassVar[type[CallbackOptions]] = CallbackOptions
    summary: ClassVar[str] = ""
    training: Training

    def __init__(self, options: CallbackOptions | None = None) -> None:
        self.options: Any = options

    def on_start(self) -> Numbers | None:
        """Training begins, or goes on after `load_state`."""
        return None

    def on_step(self, step: int, numbers: Numbers) -> Answer:
        """An optimizer step is done; `numbers`: loss, learning_rate, grad_norm, tokens, epoch, seconds."""
        return None

    def on_evaluation(self, step: int, scores: Numbers) -> Answer:
        """The held-out rows were scored; `scores`: loss and what the objective tallies, such as accuracy."""
        return None

    def on_end(self, state: str) -> Numbers | None:
        """Training ends: finished or stopped; not called when it fails or its process is killed."""
        return None

    def state(self) -> dict[str, Any]:
        """Return what must be known to go on from here, JSON-ready and small: each checkpoint keeps it."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned at the checkpoint that the run goes on from."""


class Callbacks:
    """The callbacks of a run, as the loop calls them.

    Args:
        session: Of the run.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._all: dict[str, Callback] = {
            options.name: plugins.get("callback", options.name)(options) for options in session.recipe.callbacks
        }

    def start(self, progress: Progress) -> None:
        """Give each its state back, and let it know that training begins."""
        seen = Training(self._session.model, self._session.vocabulary.tokenizer, self._session.plan)
        for name, callback in self._all.items():
            callback.training = seen
            if name in progress.callbacks:
                callback.load_state(progress.callbacks[name])
        self._call(progress, lambda callback: callback.on_start())

    def step(self, progress: Progress, numbers: Numbers) -> None:
        """Tell of a step that is done."""
        self._call(progress, lambda callback: callback.on_step(progress.step, numbers), may_end=True)

    def evaluation(self, progress: Progress, scores: Numbers) -> None:
        """Tell of an evaluation of the model as it is now."""
        self._call(progress, lambda callback: callback.on_evaluation(progress.step, scores), may_end=True)

    def end(self, progress: Progress, state: str) -> None:
        """Tell that training ends."""
        self._call(progress, lambda callback: callback.on_end(state))

    def state(self) -> dict[str, Any]:
        """Return the state of each, for a checkpoint.

        Raises:
            TuneError: One is not JSON; it is named.
        """
        found = {}
        for name, callback in self._all.items():
            state = callback.state()
            try:
                found[name] = json.loads(json.dumps(state, allow_nan=False))
            except (TypeError, ValueError) as error:
                raise TuneError(f"The state of the callback `{name}` is not JSON: {error}.") from error
            if found[name] != state:
                raise TuneError(f"The state of the callback `{name}` is not the same as JSON.", hint="Keys are texts.")
        return found

    def _call(self, progress: Progress, hook: Callable[[Callback], Answer], *, may_end: bool = False) -> None:
        for name, callback in self._all.items():
            with _random_numbers_kept():
                answer = hook(callback)
            if answer is True and may_end:
                progress.ended_by = name
                self._session.log.append("note", step=progress.step, by=name, numbers={}, ended=True)
            elif isinstance(answer, Mapping) and answer:
                numbers = {str(key): float(value) for key, value in answer.items()}
                self._session.log.append("note", step=progress.step, by=name, numbers=numbers)
            elif answer is not None and answer is not False and not isinstance(answer, Mapping):
                raise TuneError(
                    f"A hook of the callback `{name}` returned {answer!r}.",
                    hint="Hooks return None or numbers to log, by name; after a step or an evaluation also True, an end.",
                )


@contextlib.contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Put the generators back afterwards, so that looking on changes nothing."""
    from tune_magic.training import checkpoint

    before = checkpoint.random_state()
    try:
        yield
    finally:
        checkpoint.set_random_state(before)
