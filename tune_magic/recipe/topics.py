"""What can be explained, found by name: plug-ins, names of their variants, values of keys, keys."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from tune_magic import plugins
from tune_magic.errors import TuneError
from tune_magic.recipe import yaml
from tune_magic.recipe.build import ALIASES, BATCH_KEYS, DTYPES, LOADS, METHOD_ALIASES, SCHEDULES, choices
from tune_magic.recipe.build import keys as recipe_keys
from tune_magic.recipe.combination import WAYS
from tune_magic.recipe.schema import Recipe
from tune_magic.recipe.values import VALUES
from tune_magic.recipe.variant import Variant

Maker = Callable[[], "Topic"]
NEEDED = "needed"  # in the place of a default
_TRAINED = ("method", "objective")  # kinds whose plug-ins explain themselves, with variants
_LINES = {
    "callback": "callbacks: [{}]",
    "augmenter": "data: {{train: rows.jsonl, augment: {{{}: 0.5}}}}",
    "exporter": "%export --to {}",
    "format": "data: {{train: rows.jsonl, format: {}}}",
    "metric": "%evaluate --metrics {}",
}
_MERGE = "%tune merge"
_OTHER_NAMES = {  # of metrics
    "mrr": "reciprocal_rank", "mae": "mean_absolute_error", "r2": "r_squared", "rouge": "rouge_l", "seqeval": "entity_f1",
}  # fmt: skip


@dataclass(frozen=True)
class Key:
    """A key that belongs to a topic: its name, its default as it is typed, what it means."""

    name: str
    default: str
    help: str


@dataclass(frozen=True)
class Topic:
    """Something with an explanation.

    Attributes:
        kind: Of plug-in; ``value`` or ``key`` of the recipe, or a ``way`` to merge.
        name: As it is asked for.
        summary: What it does, in one sentence.
        formula: The same as a formula, in plain text; empty where there is none.
        source: Where it was published.
        when: When to use it.
        of: The plug-in it is a variant of, or the key it is a value of.
        recipe: Keys of a recipe that choose it.
        line: What to paste.
        keys: What can be set.
        variants: Name and summary of other ways to use the plug-in.
        learning_rate: A usual one, of methods.
    """

    kind: str
    name: str
    summary: str
    formula: str = ""
    source: str = ""
    when: str = ""
    of: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    line: str = ""
    keys: tuple[Key, ...] = ()
    variants: tuple[tuple[str, str], ...] = ()
    learning_rate: float | None = None


def find(name: str) -> Topic:
    """Return what goes by a name: a plug-in first, then a variant, a value, a key of the recipe, another name of one.

    Raises:
        TuneError: Nothing does; the nearest name is told.
    """
    for kind in plugins.KINDS:
        if name in plugins.names(kind):
            return of_plugin(kind, name, plugins.get(kind, name))
    makers = (make for found in _sources() for known, make in found if known == name)
    make = next(makers, None)
    if make is not None:
        return make()
    near = difflib.get_close_matches(name, names(), n=1, cutoff=0.5)
    advice = f"Did you mean `{near[0]}`? " if near else ""
    raise TuneError(
        f"There is nothing called `{name}` to explain.",
        hint=f"{advice}Methods, objectives, formats, metrics, keys of a recipe and their values are; `%tune methods` lists "
        "the methods.",
    )


def names() -> list[str]:
    """Return every name that `find` knows."""
    found = [name for kind in plugins.KINDS for name in plugins.names(kind)]
    found += [name for source in _sources() for name, _ in source]
    return list(dict.fromkeys(found))


def _sources() -> tuple[Iterator[tuple[str, Maker]], ...]:
    return _variants(), _values(), _ways(), _keys(), _aliases()


def methods() -> list[Topic]:
    """Return every method that imports, each followed by its variants."""
    found = []
    for name, plugin in plugins.working("method"):
        found.append(of_plugin("method", name, plugin))
        found += [_variant("method", name, plugin, *item) for item in _there(plugin)]
    return found


def find_method(name: str) -> Topic:
    """Return a method or a variant of one.

    Raises:
        TuneError: There is none, with the nearest name.
    """
    known = {topic.name: topic for topic in methods()}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        advice = f"Did you mean `{near[0]}`? " if near else ""
        raise TuneError(f"There is no method `{name}`.", hint=f"{advice}There are: {', '.join(known)}.")
    return known[name]


def of_plugin(kind: str, name: str, plugin: Any) -> Topic:
    """Return a plug-in's topic; what it does not say of itself is taken from its docstring."""
    if kind not in _TRAINED:
        options = _options(plugin.Options, ("kind", "name")) if kind in ("augmenter", "callback") else ()
        to_paste = "" if kind == "format" and not _is_learned(plugin) else _LINES[kind].format(name)
        return Topic(kind, name, _first_sentence(plugin), when=_traits(kind, plugin), line=to_paste, keys=options)
    recipe = {kind: {"name": name}}
    return Topic(
        kind, name, plugin.summary or _first_sentence(plugin), plugin.formula, plugin.source, plugin.when, None, recipe,
        line(recipe), _options(plugin.Options), tuple((known, variant.summary) for known, variant in _there(plugin)),
        plugin.learning_rate if kind == "method" else None,
    )  # fmt: skip


def line(recipe: Mapping[str, Any]) -> str:
    r"""Return keys of a recipe as people write them.

    Example:
        >>> line({"method": {"name": "lora"}, "seed": 3})
        'method: lora\nseed: 3'
    """
    short = {
        key: value["name"] if isinstance(value, Mapping) and set(value) == {"name"} else value
        for key, value in recipe.items()
    }
    return yaml.write(short).strip()


def _variants() -> Iterator[tuple[str, Maker]]:
    for kind in _TRAINED:
        for name, plugin in plugins.working(kind):
            yield from ((item[0], partial(_variant, kind, name, plugin, *item)) for item in _there(plugin))


def _there(plugin: Any) -> list[tuple[str, Variant]]:
    """Return a plug-in's own variants whose keys a recipe has; what it inherits is explained by another name."""
    own: Mapping[str, Variant] = vars(plugin).get("variants", {})
    return [item for item in own.items() if set(item[1].recipe) <= set(Recipe.model_fields)]


def _variant(kind: str, owner: str, plugin: Any, name: str, variant: Variant) -> Topic:
    recipe = {kind: {"name": owner, **variant.options}, **variant.recipe}
    rate = (variant.learning_rate or plugin.learning_rate) if kind == "method" else None
    return Topic(
        kind, name, variant.summary, variant.formula, variant.source, variant.when, owner, recipe, line(recipe),
        _options(plugin.Options), learning_rate=rate,
    )  # fmt: skip


def _values() -> Iterator[tuple[str, Maker]]:
    """Yield the values of keys: first those that are explained, then all others, by the help of their key."""
    yield from ((name, partial(_of_explained, name, variant)) for name, variant in VALUES.items())
    for key, owner, name in recipe_keys():
        is_word = get_origin(owner.model_fields[name].annotation) is Literal
        for choice in choices(key, owner, name) if is_word else ():
            yield choice, partial(_of_value, key, owner, name, choice)


def _of_explained(name: str, variant: Variant) -> Topic:
    (key,) = variant.recipe
    return Topic(
        "value", name, variant.summary, variant.formula, variant.source, variant.when, key, variant.recipe,
        line(variant.recipe), _related(key),
    )  # fmt: skip


def _of_value(key: str, owner: type[BaseModel], name: str, choice: str) -> Topic:
    recipe = _nested(key, owner, choice)
    return Topic("value", choice, _help(owner, name), of=key, recipe=recipe, line=line(recipe), keys=_related(key))


def _ways() -> Iterator[tuple[str, Maker]]:
    """Yield the ways in which adapters are merged."""
    yield from ((name, partial(_of_way, name)) for name in WAYS)


def _of_way(name: str) -> Topic:
    text, _, source = WAYS[name].removesuffix(")").partition(" (")
    line_ = f"{_MERGE} both a=0.5 b=0.5 --how {name}"
    return Topic(
        "way", name, f"{text[0].upper()}{text[1:]}.", source=f"{source}." if source else "", of=_MERGE, line=line_
    )


def _keys() -> Iterator[tuple[str, Maker]]:
    """Yield every key of a recipe, by its dotted name and by its own; one that several plug-ins have is one."""
    owners: dict[str, list[type[BaseModel]]] = {}
    for key, owner, _ in recipe_keys():
        owners.setdefault(key, []).append(owner)
    for key, found in owners.items():
        make = partial(_of_key, key, found)
        yield key, make
        yield key.rpartition(".")[2], make


def _of_key(key: str, owners: Sequence[type[BaseModel]]) -> Topic:
    name = key.rpartition(".")[2]
    helps = [_help(owner, name) for owner in owners]
    told = [_values_of(key, owner, name) for owner in owners]
    defaults = ((owner, owner.model_fields[name].get_default()) for owner in owners)
    to_paste = next((line(_nested(key, owner, default)) for owner, default in defaults if _is_plain(default)), "")
    return Topic("key", key, _of_each(owners, helps), when=_of_each(owners, told), line=to_paste)


def _values_of(key: str, owner: type[BaseModel], name: str) -> str:
    """Return the default of a key and the words it may have, as sentences."""
    known, told = choices(key, owner, name), []
    if _is_plain(owner.model_fields[name].get_default()):
        told.append(f"Default: {_default(owner, name)}.")
    return " ".join([*told, *([f"One of {', '.join(known)}."] if known else [])])


def _is_plain(default: Any) -> bool:
    return isinstance(default, str | int | float) and default != ""


def _of_each(owners: Sequence[type[BaseModel]], texts: Sequence[str]) -> str:
    """Return what is said of a key of several plug-ins: once where all say the same, else of each."""
    groups: dict[str, list[str]] = {}
    for owner, text in zip(owners, texts, strict=True):
        named = owner.model_fields.get("name")
        groups.setdefault(text, []).append(f"`{named.default if named else owner.__name__}`")
    if len(groups) == 1:
        return texts[0]
    return " ".join(f"Of {', '.join(dict.fromkeys(names))}: {text}" for text, names in groups.items() if text)


def _aliases() -> Iterator[tuple[str, Maker]]:
    """Yield the other names that recipes and people have for keys, schedules and metrics."""
    of_methods = {f"{part}{name}": f"method.{key}" for name, key in METHOD_ALIASES.items() for part in ("", "method.")}
    others = {
        **ALIASES, **of_methods, **dict.fromkeys(BATCH_KEYS, "batch_size"), **dict.fromkeys(DTYPES, "dtype"),
        **dict.fromkeys(LOADS, "quantization.kind"), **SCHEDULES, **_OTHER_NAMES,
    }  # fmt: skip
    yield from ((name, partial(find, meant)) for name, meant in others.items())


def _nested(key: str, owner: type[BaseModel], value: Any) -> dict[str, Any]:
    """Return a dotted key as a recipe has it, with the name of the plug-in it belongs to."""
    part, dot, rest = key.partition(".")
    if not dot:
        return {part: value}
    named = owner.model_fields.get("name") if part in _TRAINED else None
    return {part: {**({"name": named.default} if named and rest != "name" else {}), rest: value}}


def _related(key: str) -> tuple[Key, ...]:
    """Return the key that a value belongs to, and those that say more of it."""
    parts = {"lr_scheduler_type": "lr_scheduler_kwargs.", "optim": "adam_"}.get(key, key)
    return tuple(
        Key(known, _default(owner, name), _help(owner, name))
        for known, owner, name in recipe_keys()
        if known == key or known.startswith(parts)
    )


def _options(options: type[BaseModel], hidden: tuple[str, ...] = ("name",)) -> tuple[Key, ...]:
    """Return the keys of a plug-in, with the values that those of words may have."""
    found = []
    for name in options.model_fields:
        known = choices(name, options, name)
        told = f" One of {', '.join(known)}." if len(known) > 1 and known != ["true", "false"] else ""
        found.append(Key(name, _default(options, name), _help(options, name) + told))
    return tuple(key for key in found if key.name not in hidden)


def _help(owner: type[BaseModel], name: str) -> str:
    return str(owner.model_fields[name].description or "")


def _default(owner: type[BaseModel], name: str) -> str:
    """Return a key's default as people type it, or that it is needed; nothing where there is none."""
    if owner.model_fields[name].is_required():
        return NEEDED
    value = owner.model_fields[name].get_default()
    if value in (None, "", PydanticUndefined) or isinstance(value, BaseModel):
        return ""
    return yaml.write({"value": value}).removeprefix("value:").strip()


def _first_sentence(plugin: Any) -> str:
    text = " ".join((inspect.getdoc(plugin) or "").split("\n\n")[0].split())
    return text if text.endswith((".", "?", "!")) or not text else f"{text}."


def _traits(kind: str, plugin: Any) -> str:
    """Return what a plug-in of the simpler kinds says of itself by its attributes."""
    match kind:
        case "format":
            more = f", and may have {', '.join(plugin.uses)}" if plugin.uses else ""
            return f"Rows that have {', '.join(plugin.needs)}{more}; {_learners(plugin)}"
        case "metric":
            return f"Cards call it {plugin.title}; {'higher' if plugin.higher_is_better else 'lower'} is better."
        case "exporter" if plugin.quantizations:
            return f"`--quantize` may be {', '.join(plugin.quantizations)}."
    return ""


def _is_learned(plugin: Any) -> bool:
    return plugin.objective in plugins.names("objective")


def _learners(plugin: Any) -> str:
    """Say what learns from rows of a format: by default, where it is named, or nothing."""
    if not _is_learned(plugin):
        advice = f" With `{plugin.advice}` under `data:`, `sft` learns from a part of them." if plugin.advice else ""
        return f"nothing that is installed learns from them.{advice}"
    columns = (*plugin.needs, *plugin.uses)
    before = [
        f"`{name}`"
        for name, other in plugins.working("format")
        if other.rank < plugin.rank and other.find(columns, {}) is not None
    ]
    if before:
        taken = f"such columns are also those of {' and '.join(before)}, which come first"
        return f"{plugin.objective} learns from them where it is named, `objective: {plugin.objective}`: {taken}."
    return f"{plugin.objective} learns from them by default."
