"""Whether runs are adapters that one base can carry together; read from their folders, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tune_magic import plugins
from tune_magic.data.vocabulary import NewToken, NewTokens
from tune_magic.errors import TuneError
from tune_magic.methods.base import Method
from tune_magic.methods.by_peft import PeftMethod
from tune_magic.recipe.build import build_recipe
from tune_magic.storage.folder import RunFolder

_SHOWN_CLASSES = 3


def method_of(run: RunFolder) -> Method:
    """Return the method of a run, with its options."""
    options = build_recipe(run.info["recipe"]).method
    method: Method = plugins.get("method", options.name)(options)
    return method


def base_of(run: RunFolder) -> str | None:
    """Return the fingerprint of a run's base model; None before it has a plan."""
    found: str | None = run.summary().plan.get("fingerprints", {}).get("model")
    return found


def classes_of(run: RunFolder) -> list[str] | None:
    """Return the names of a run's classes; None where it answers texts."""
    found: list[str] | None = run.summary().plan.get("objective", {}).get("classes")
    return found


def differences(runs: Mapping[str, RunFolder]) -> list[str]:
    """Return in words why runs cannot share one base; nothing where they can.

    Args:
        runs: By the name each is called here.
    """
    found = [
        f"{name} was trained by `{run.info['recipe'].get('method', {}).get('name', 'lora')}`, which leaves no adapter beside an unchanged base"
        for name, run in runs.items()
        if not _is_adapter(method_of(run))
    ]  # fmt: skip
    first, *others = runs
    for name in others:
        pairs = zip(_facts(runs[first]).items(), _facts(runs[name]).values(), strict=True)
        found += [
            f"{what} of {first} is {mine}, that of {name} {other}" for (what, mine), other in pairs if mine != other
        ]
    return found


def check(runs: Mapping[str, RunFolder]) -> None:
    """Refuse runs that cannot share one base.

    Raises:
        TuneError: Naming what differs, or a run without a checkpoint.
    """
    for run in runs.values():
        run.best_checkpoint  # noqa: B018 - without one, say so now
    found = differences(runs)
    if found:
        raise TuneError(
            f"These runs cannot share one base model: {'; '.join(found)}.",
            hint="Adapters of one method, on one base, with the same tokens and the same task can. `%tune chat` talks to others too.",
        )


def check_combinable(runs: Mapping[str, RunFolder]) -> dict[str, int]:
    """Return the rank of each run's adapter, by name.

    Raises:
        TuneError: The runs cannot share a base, or have parts that no weighted sum of matrices covers.
    """
    check(runs)
    methods: dict[str, Any] = {name: method_of(run).options for name, run in runs.items()}
    found = [
        f"{name} has {what}"
        for name, run in runs.items()
        for what, is_so in {
            f"the method `{methods[name].name}`": methods[name].name != "lora",
            "lengths of columns beside its matrices (`use_dora`)": getattr(methods[name], "use_dora", False),
            "a head of classes": classes_of(run) is not None,
            "embeddings of new tokens": bool(_new_tokens(run)),
        }.items()
        if is_so
    ]
    if found:
        raise TuneError(
            f"Only the two matrices of `lora` can be combined: {'; '.join(found)}.",
            hint="`tune_magic.stack(...)` switches between such adapters.",
        )
    return {name: options.r for name, options in methods.items()}


def _is_adapter(method: Method) -> bool:
    return isinstance(method, PeftMethod) and method.adds


def _facts(run: RunFolder) -> dict[str, Any]:
    """Return what must be the same in all, by what it is called."""
    tokens, classes = _new_tokens(run), classes_of(run)
    model, print_ = str(run.info["recipe"]["model"]).rstrip("/").rsplit("/", 1)[-1], base_of(run) or "unknown"
    more = (
        ""
        if classes is None
        else f" into {', '.join(classes[:_SHOWN_CLASSES])}{' …' * (len(classes) > _SHOWN_CLASSES)}"
    )
    return {
        "the base model": _Shown(print_, f"{model} ({print_[:8]})"),
        "the method": f"`{method_of(run).options.name}`",
        "the task": _Shown(
            classes, "answering texts" if classes is None else f"telling {len(classes)} classes apart{more}"
        ),
        "the vocabulary": _Shown(tokens, f"the base's own with {len(tokens)} more tokens"),
    }


def _new_tokens(run: RunFolder) -> tuple[NewToken, ...]:
    found = NewTokens.load(run.path)
    return found.tokens if found is not None else ()


class _Shown:
    """A value to compare, and how it is written."""

    def __init__(self, value: Any, text: str) -> None:
        self._value = value
        self._text = text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Shown) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._text)

    def __str__(self) -> str:
        return self._text
