"""The one registry: methods, objectives, formats of rows, augmenters, exporters, metrics, callbacks.

A plug-in is a class. Packages announce theirs in the entry-point group ``tune_magic.plugins`` as ``KIND.NAME``, ours
included; a decorator registers one in the running process. Nothing is imported before it is named.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import CodeType
from typing import Any, TypeVar

from tune_magic.errors import TuneError

GROUP = "tune_magic.plugins"
KINDS = ("method", "objective", "format", "augmenter", "exporter", "metric", "callback")
_local: dict[tuple[str, str], type] = {}
Plugin = TypeVar("Plugin", bound=type)


@dataclass(frozen=True)
class Listing:
    """One row of `listing`: a plug-in, where it comes from, and what is wrong with it."""

    kind: str
    name: str
    origin: str
    problem: str | None = None


def register(kind: str, name: str) -> Callable[[Plugin], Plugin]:
    """Register the decorated class as plug-in `name` of `kind`; a cell that is run again replaces its own.

    Raises:
        TuneError: The kind is unknown, or the name is taken; both owners are named.
    """
    if kind not in KINDS:
        raise TuneError(f"There is no plug-in kind `{kind}`.", hint=f"Kinds: {', '.join(KINDS)}.")

    def decorate(plugin: Plugin) -> Plugin:
        taken = _installed().get((kind, name))
        if taken is not None:
            raise TuneError(f"The {kind} `{name}` exists twice: {taken.value} and {plugin.__qualname__}.")
        mine = _local.get((kind, name))
        if mine is not None and mine.__module__ != plugin.__module__:
            owners = " and ".join(f"{owner.__module__}:{owner.__qualname__}" for owner in (mine, plugin))
            raise TuneError(f"The {kind} `{name}` exists twice: {owners}.")
        _local[kind, name] = plugin
        return plugin

    return decorate


def local(kind: str, name: str) -> type | None:
    """Return the class that was registered in this process, in a cell say; None where there is none."""
    return _local.get((kind, name))


@contextlib.contextmanager
def borrowed(kind: str, name: str, plugin: type) -> Iterator[None]:
    """While inside, `name` is this class, whatever is installed: for workers and tests."""
    before = _local.get((kind, name))
    _local[kind, name] = plugin
    try:
        yield
    finally:
        del _local[kind, name]
        if before is not None:
            _local[kind, name] = before


def get(kind: str, name: str) -> Any:
    """Import and return the plug-in class.

    Raises:
        TuneError: No such name (with the nearest one), or its import fails (naming its package).
    """
    if (kind, name) in _local:
        return _local[kind, name]
    if (kind, name) in _clashes():
        raise TuneError(_clashes()[kind, name])
    point = _installed().get((kind, name))
    if point is None:
        near = difflib.get_close_matches(name, names(kind), n=1)
        did_you_mean = f"Did you mean `{near[0]}`? " if near else ""
        raise TuneError(f"There is no {kind} `{name}`.", hint=f"{did_you_mean}There are: {', '.join(names(kind))}.")
    try:
        return point.load()
    except Exception as error:
        raise TuneError(f"The {kind} `{name}` of {_origin(point)} cannot be imported.") from error


def names(kind: str) -> list[str]:
    """Names of `kind`, sorted, without importing any."""
    return sorted(name for a_kind, name in {*_installed(), *_local} if a_kind == kind)


def working(kind: str) -> Iterator[tuple[str, Any]]:
    """Yield the name and class of every plug-in of a kind that imports, where all of them are asked in turn."""
    for name in names(kind):
        with contextlib.suppress(TuneError):
            yield name, get(kind, name)


def listing() -> list[Listing]:
    """Every plug-in with its origin; one that does not import is listed as broken and breaks nothing else."""
    rows = [Listing(kind, name, plugin.__module__) for (kind, name), plugin in _local.items()]
    for (kind, name), point in _installed().items():
        problem = _clashes().get((kind, name))
        try:
            point.load()
        except Exception as error:  # noqa: BLE001 - a stranger's import may raise anything
            problem = problem or f"{type(error).__name__}: {error}"
        rows.append(Listing(kind, name, _origin(point), problem))
    return sorted(rows, key=lambda row: (row.kind, row.name))


def blame(error: BaseException) -> str | None:
    """Return which plug-in of somebody else, or of a cell, an error came through, in words; None when none did."""
    modules, codes = set(), set()
    trace = error.__traceback__
    while trace is not None:
        modules.add(trace.tb_frame.f_globals.get("__name__"))
        codes.add(trace.tb_frame.f_code)
        trace = trace.tb_next
    for (kind, name), plugin in _local.items():
        if codes & set(_codes(plugin)):
            return (
                f"the {kind} `{name}` of {'a notebook cell' if plugin.__module__ == '__main__' else plugin.__module__}"
            )
    for (kind, name), point in _installed().items():
        if point.module in modules and not point.module.startswith("tune_magic."):
            return f"the {kind} `{name}` of {_origin(point)}"
    return None


def _codes(plugin: type) -> Iterator[CodeType]:
    """Yield the code of what a class defines itself, or inherits from others than us."""
    for kind in plugin.__mro__:
        if kind is not object and not kind.__module__.startswith("tune_magic."):
            for value in vars(kind).values():
                function = getattr(value, "fget", None) or getattr(value, "__func__", value)
                if isinstance(code := getattr(function, "__code__", None), CodeType):
                    yield code


@functools.cache
def _points() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=GROUP))


@functools.cache
def _installed() -> dict[tuple[str, str], EntryPoint]:
    found: dict[tuple[str, str], EntryPoint] = {}
    for point in _points():
        kind, _, name = point.name.partition(".")
        found.setdefault((kind, name), point)
    return found


@functools.cache
def _clashes() -> dict[tuple[str, str], str]:
    """Return what is wrong with each name that two packages claim; no other name is touched by it."""
    found = {}
    for point in _points():
        kind, _, name = point.name.partition(".")
        other = _installed()[kind, name]
        if other.value != point.value:
            found[kind, name] = f"The {kind} `{name}` exists twice: in {_origin(other)} and in {_origin(point)}."
    return found


def _origin(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.value
