"""Whether runs are adapters that one base can carry together; read from their folders, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tune_magic import cell_code, plugins
from tune_magic.data.vocabulary import NewToken, NewTokens
from tune_magic.errors import TuneError
from tune_magic.methods.base import Method
from tune_magic.methods.by_peft import PeftMethod
from tune_magic.objectives.base import Objective
from tune_magic.recipe.build import build_recipe
from tune_magic.storage.folder import RunFolder

_SHOWN_NAMES = 3
_CAUSAL = "CAUSAL_LM"


def method_of(run: RunFolder) -> Method:
    """Return the method of a run, with its options."""
    options = build_recipe(run.info["recipe"]).method
    method: Method = plugins.get("method", options.name)(options)
    return method


def holds_base(run: RunFolder) -> bool:
    """Return whether a run's model without what was added is its base, whole."""
    return method_of(run).adds and not _is_compressed(run)


def base_of(run: RunFolder) -> str | None:
    """Return the fingerprint of a run's base model; None before it has a plan."""
    found: str | None = run.summary().plan.get("fingerprints", {}).get("model")
    return found


def objective_of(run: RunFolder) -> Objective:
    """Return the objective of a run, with what it learned of the training rows.

    Raises:
        TuneError: It needs a plug-in of a cell that is not here.
    """
    cell_code.require(run)
    facts = {"name": "sft", **run.summary().plan.get("objective", {})}
    objective: Objective = plugins.get("objective", facts.pop("name"))(
        build_recipe(run.info["recipe"]).objective, **facts
    )
    return objective


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
    found += [
        f"{name} was trained on a base that `compress` made smaller, which no other run has"
        for name, run in runs.items()
        if _is_compressed(run)
    ]
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
    methods = {name: method_of(run) for name, run in runs.items()}
    found = [f"{name} has {what}" for name, run in runs.items() for what in _beside_matrices(run, methods[name])]
    if found:
        raise TuneError(
            f"Only the two matrices of `lora` can be combined: {'; '.join(found)}.",
            hint="`tune_magic.stack(...)` switches between such adapters.",
        )
    return {name: method.options.r for name, method in methods.items()}


def _beside_matrices(run: RunFolder, method: Method) -> list[str]:
    """Return what a run has that no weighted sum of matrices covers."""
    objective = objective_of(run)
    facts = {
        f"the method `{method.options.name}`": method.options.name != "lora",
        "lengths of columns beside its matrices (`use_dora`)": getattr(method.options, "use_dora", False),
        "a start that made up for what rounding took from its base (`loftq`)": method.makes_up_for_rounding,
        "a head of classes": objective.gives == "classes",
        f"the objective `{_name_of(run)}`, which trains no causal language model": objective.gives != "classes"
        and objective.task != _CAUSAL,
        "embeddings of new tokens": bool(_new_tokens(run)),
    }
    return [what for what, is_so in facts.items() if is_so]


def _is_compressed(run: RunFolder) -> bool:
    return build_recipe(run.info["recipe"]).compress.is_on


def _is_adapter(method: Method) -> bool:
    return isinstance(method, PeftMethod) and method.adds


def _facts(run: RunFolder) -> dict[str, Any]:
    """Return what must be the same in all, by what it is called."""
    tokens, quantization = _new_tokens(run), build_recipe(run.info["recipe"]).quantization
    model, print_ = str(run.info["recipe"]["model"]).rstrip("/").rsplit("/", 1)[-1], base_of(run) or "unknown"
    scales = " with its scales in 8 bits" if quantization.quantizes_scales else ""
    return {
        "the base model": _Shown(print_, f"{model} ({print_[:8]})"),
        "the quantisation": f"{quantization.kind}{scales}",
        "the method": f"`{method_of(run).options.name}`",
        "the task": _task(run),
        "the vocabulary": _Shown(tokens, f"the base's own with {len(tokens)} more tokens"),
    }


def _task(run: RunFolder) -> _Shown:
    """Return what decides which head a model has and what that means; numbers that were learned are each run's own."""
    objective, name = objective_of(run), _name_of(run)
    if not objective.scores_rows:
        return _Shown(objective.task, f"answering texts{'' if objective.task == _CAUSAL else f' (`{name}`)'}")
    words = _words(objective.facts())
    shown = [word for part in words.values() for word in _flat(part)]
    some = f"{', '.join(shown[:_SHOWN_NAMES])}{' …' * (len(shown) > _SHOWN_NAMES)}"
    if objective.gives == "classes":
        return _Shown((objective.task, words), f"telling {len(shown)} classes apart into {some}")
    return _Shown((objective.task, name, words), f"`{name}`{f' of {len(shown)} names, {some}' if shown else ''}")


def _name_of(run: RunFolder) -> str:
    return str(run.summary().plan.get("objective", {}).get("name", "sft"))


def _words(value: Any) -> Any:
    """Return the words of JSON-ready facts where they stand, without numbers; None where there are none."""
    if isinstance(value, Mapping):
        return {name: found for name, part in value.items() if (found := _words(part)) is not None}
    if isinstance(value, list):
        return [found for part in value if (found := _words(part)) is not None] or None
    return value if isinstance(value, str) else None


def _flat(words: Any) -> Iterator[str]:
    """Yield the words that `_words` found one by one, the names of parts before theirs."""
    if isinstance(words, str):
        yield words
    elif isinstance(words, list):
        yield from (word for part in words for word in _flat(part))
    else:
        for name, part in words.items():
            yield from (name,) if isinstance(part, Mapping) else ()
            yield from _flat(part)


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
