"""Plug-ins of one's own, from a notebook cell: `@tune_magic.objective("name")` and its kin.

Each takes a class that keeps the contract of its kind; objectives, metrics and callbacks also take a plain function.
A cell that is run again replaces what it defined before. docs/PLUGINS.md tells more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, get_origin

from pydantic import BaseModel, Field, create_model

from tune_magic import plugins
from tune_magic.errors import TuneError
from tune_magic.evaluation.metrics import ClassMetric, Metric, OutputMetric, ProbabilityMetric
from tune_magic.training.callbacks import Answer, Callback, Numbers

if TYPE_CHECKING:
    import torch

Plugged = TypeVar("Plugged", bound=Callable[..., Any])
Decorator = Callable[[Plugged], Plugged]


class _FunctionLoss:
    """An objective whose loss is a function of the user's; what is not loss is the other base's."""

    function: ClassVar[Callable[[Any], torch.Tensor]]
    smooths = False

    def loss_sum(self, states: Any) -> torch.Tensor:
        """Return what the function returns."""
        return type(self).function(states)


class _FunctionMetric(Metric):
    """A metric that is a function of the user's."""

    function: ClassVar[Callable[[str, str], float]]

    def score(self, answer: str, reference: str) -> float:
        """Return what the function returns."""
        return float(type(self).function(answer, reference))


class _FunctionCallback(Callback):
    """A callback that is a function of the user's, called after each step."""

    function: ClassVar[Callable[[int, Numbers], Answer]]

    def on_step(self, step: int, numbers: Numbers) -> Answer:
        """Return what the function returns."""
        return type(self).function(step, numbers)


def objective(name: str, *, like: str = "sft") -> Decorator[Any]:
    """Register an objective: an `Objective` class, or a function from a microbatch's states to the *sum* of its losses.

    Args:
        name: What a recipe calls it.
        like: For a function, the objective that everything else is taken from: ``sft`` gives it `TargetStates` (one
            loss a token), ``classify`` `RowStates` (one a row).

    Example:
        >>> @tune_magic.objective("my_loss")  # doctest: +SKIP
        ... def my_loss(states):
        ...     return -(states.log_probs() * states.weights).sum()
    """

    def decorate(given: Any) -> Any:
        if isinstance(given, type):
            from tune_magic.objectives.base import Objective

            return _register("objective", name, given, (Objective,))
        base = plugins.get("objective", like)
        _wrap("objective", name, given, (_FunctionLoss, base), takes=1)
        return given

    return decorate


def method(name: str) -> Decorator[Any]:
    """Register a `Method` class."""
    from tune_magic.methods.base import Method

    return lambda given: _register("method", name, given, (Method,))


def metric(name: str, *, higher_is_better: bool = True) -> Decorator[Any]:
    """Register a metric: a `Metric`, `ClassMetric`, `ProbabilityMetric` or `OutputMetric` class, or a function.

    The function is ``(answer, reference) -> float``.

    Args:
        name: What ``%evaluate --metrics`` calls it.
        higher_is_better: For a function, which way is good.
    """

    def decorate(given: Any) -> Any:
        if isinstance(given, type):
            return _register("metric", name, given, (Metric, ClassMetric, ProbabilityMetric, OutputMetric))
        about = {"title": name.replace("_", " "), "higher_is_better": higher_is_better}
        _wrap("metric", name, given, (_FunctionMetric,), takes=2, about=about)
        return given

    return decorate


def callback(name: str) -> Decorator[Any]:
    """Register a callback: a `Callback` class, or a function ``(step, numbers)`` that is called after each step.

    It returns numbers to log, True to end the run, or None.
    """

    def decorate(given: Any) -> Any:
        if isinstance(given, type):
            return _register("callback", name, given, (Callback,))
        _wrap("callback", name, given, (_FunctionCallback,), takes=2)
        return given

    return decorate


def data_format(name: str) -> Decorator[Any]:
    """Register a `Format` class; a recipe names it, ``format: name`` under ``data:``."""
    from tune_magic.data.formats.base import Format

    return lambda given: _register("format", name, given, (Format,))


def augmenter(name: str) -> Decorator[Any]:
    """Register an `Augmenter` class."""
    from tune_magic.augmenters.base import Augmenter

    return lambda given: _register("augmenter", name, given, (Augmenter,))


def exporter(name: str) -> Decorator[Any]:
    """Register an `Exporter` class, for ``%export --to name``."""

    def decorate(given: Any) -> Any:
        from tune_magic.exporters.base import Exporter  # imports torch

        return _register("exporter", name, given, (Exporter,))

    return decorate


def _wrap(
    kind: str, name: str, function: Any, bases: tuple[type, ...], *, takes: int, about: Mapping[str, Any] | None = None
) -> None:
    """Register a class around a function of so many arguments.

    Raises:
        TuneError: It is no such function.
    """
    try:
        inspect.signature(function).bind(*range(takes))
    except (TypeError, ValueError) as error:
        raise TuneError(f"The {kind} `{name}` must be a class or a function of {takes} arguments.") from error
    doc = inspect.getdoc(function) or ""
    members = {"function": staticmethod(function), "summary": doc.partition("\n")[0], **(about or {})}
    called = {"__module__": function.__module__, "__qualname__": function.__qualname__, "__doc__": doc}
    _register(kind, name, type(function.__name__, bases, {**members, **called}), bases[-1:])


def _register(kind: str, name: str, plugin: Any, bases: tuple[type, ...]) -> Any:
    """Register a class.

    Raises:
        TuneError: It has another base, a name that cannot be typed, or one that is taken.
    """
    if not (isinstance(plugin, type) and issubclass(plugin, bases)):
        wanted = " or ".join(f"`{base.__module__}.{base.__qualname__}`" for base in bases)
        raise TuneError(f"The {kind} `{name}` must be a class on the base of {wanted}.")
    if missing := sorted(getattr(plugin, "__abstractmethods__", ())):
        raise TuneError(f"The {kind} `{name}` lacks {', '.join(f'`{part}`' for part in missing)}.")
    if not name.isidentifier():
        raise TuneError(f"`{name}` cannot be the name of a plug-in.", hint="Letters, digits and `_`.")
    _let_options_be_called(plugin, name)
    return plugins.register(kind, name)(plugin)


def _let_options_be_called(plugin: Any, name: str) -> None:
    """Give a plug-in that inherits another's options options of its own: those know only the other's name."""
    options: type[BaseModel] | None = getattr(plugin, "Options", None)
    field = options.model_fields.get("name") if options else None
    if options is None or field is None:
        return
    allowed = getattr(field.annotation, "__args__", ()) if get_origin(field.annotation) is Literal else (name,)
    if name not in allowed:
        own: Any = (str, Field(name, description=field.description))
        plugin.Options = create_model(
            f"{plugin.__name__}Options", __base__=options, __module__=plugin.__module__, name=own
        )
