"""What the forms share: a field for each key of a recipe, the columns of the data, what is typed as a recipe."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, get_args, get_origin

import ipywidgets
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from tune_magic import plugins, tables
from tune_magic.data import preview
from tune_magic.errors import DataError, RecipeError, TuneError
from tune_magic.launching import scratch_job
from tune_magic.models.find import installed
from tune_magic.recipe import yaml
from tune_magic.recipe.build import build_recipe, choices, flat, keys
from tune_magic.recipe.launch import LaunchOptions
from tune_magic.recipe.schema import Recipe
from tune_magic.storage.state import TERMINAL
from tune_magic.view.html import Bundle

COLUMN = ipywidgets.Layout(width="385px")
STYLE = {"description_width": "190px"}
WRAP = ipywidgets.Layout(flex_flow="row wrap")
_MAPPED = ("messages", "prompt", "completion", "system", "text", "label")
_LOOK_S = 0.5
_AS_IT_IS = ("as it is", "")
_DATA = ("data.train", "data.held_out", "data.test", "data.replay", "vocabulary.corpus")
_TITLES = {"data.train": "data", "objective.name": "objective"}


class Form:
    """Fields, and the recipe they make.

    Args:
        names: Keys of the recipe that have a field; those of methods are added where `method.name` is among them.
        prefilled: Keys of a recipe; ``data`` may be a DataFrame or a list of dicts.
        changed: Called when something is typed.

    Attributes:
        fields: The widget of each key.
        objects: Values of the recipe's ``$names``.
        columns: Choices that map the data's columns, shown once the data has some.
        head: The first rows of the data as `look` found them, None where there is nothing to see.
        recipe: The recipe as it was typed at the last `read`; None while it has faults.
        problems: Those faults, and what is wrong with the data's first rows.
    """

    def __init__(self, names: Iterable[str], prefilled: dict[str, Any], changed: Callable[..., None]) -> None:
        plain, self.objects = tables.take_out(prefilled)
        wanted = set(names)
        with_methods = "method.name" in wanted
        self.fields = {
            key: _field(key, owner, name)
            for key, owner, name in keys()
            if key in wanted or (with_methods and key.startswith("method."))
        }
        self._fixed = {key: value for key, value in flat(plain).items() if key not in self.fields}
        for key, value in flat(plain).items():
            if key in self.fields:
                self.fields[key].value = value if isinstance(value, str) else _text(value)
        self.head: preview.Head | None = None
        self._looked_at: Any = None
        self.columns = ipywidgets.HBox(layout=WRAP)
        self.recipe: Recipe | None = None
        self.problems: list[str] = []
        for field in self.fields.values():
            field.observe(changed, "value")
        self.read()

    def typed(self) -> dict[str, Any]:
        """Return the keys that were filled in; those of another method than the chosen one are left out."""
        mine = {"method.name", *self.method_keys()}
        typed = dict(self._fixed)
        for key, field in self.fields.items():
            is_other_methods = key.startswith("method.") and key not in mine
            if str(field.value).strip() and not is_other_methods:
                typed[key] = _value(key, str(field.value).strip())
        return typed

    def read(self) -> None:
        """Check what is typed."""
        try:
            self.recipe, self.problems = build_recipe(self.typed()), []
        except RecipeError as error:
            self.recipe, self.problems = None, [str(fault) for fault in error.faults]

    def apply(self, line: str) -> None:
        """Write a line of a recipe, such as a finding of the data report offers, into its field; lists are added to."""
        for key, value in yaml.read(line)[0].items():
            field = self.fields.get(key) or self.fields[f"data.{key}"]
            before = _value(key, str(field.value).strip() or "[]")
            known = before if isinstance(before, list) else [before]
            added = [*known, *(item for item in value if item not in known)] if isinstance(value, list) else value
            field.value = _text(added)

    def look(self) -> None:
        """Look at the first rows of the data, when other data than before is named; not for callbacks."""
        named = str(self.fields["data.train"].value).strip()
        source = self.objects.get(named[1:]) if named.startswith("$") else named
        if named == self._looked_at:
            return
        self._looked_at, self.head = named, None
        if named:
            with contextlib.suppress(DataError, OSError):  # the plan will say what is wrong with it
                self.head = preview.head(source)
        self.columns.children = self._choices()

    def method_keys(self) -> list[str]:
        """Return the keys of the chosen method's options."""
        if "method.name" not in self.fields:
            return []
        options = plugins.get("method", self.fields["method.name"].value).Options.model_fields
        return [f"method.{name}" for name in options if name != "name"]

    def method_fields(self) -> list[ipywidgets.Widget]:
        """Return the fields of the chosen method's options; methods may share a key with another default or meaning."""
        owner = plugins.get("method", self.fields["method.name"].value).Options
        for key in self.method_keys():
            name, field = key.removeprefix("method."), self.fields[key]
            field.tooltip = owner.model_fields[name].description or ""
            if hasattr(field, "placeholder"):
                field.placeholder = _default(owner.model_fields[name].default, owner, name)
        return [self.fields[key] for key in self.method_keys()]

    def _choices(self) -> list[ipywidgets.Widget]:
        """Return a choice among the data's columns for each standard name that the data does not have."""
        if self.head is None:
            return []
        given = self._mapping()
        made = []
        for name in _MAPPED:
            if name in self.head.columns:
                continue
            chosen = given.get(name, "")
            choice = ipywidgets.Dropdown(
                options=[_AS_IT_IS, *((column, column) for column in self.head.columns)],
                value=chosen if chosen in self.head.columns else "",
                description=f"{name} is", tooltip=f"Column that is the {name}", layout=COLUMN, style=STYLE,
            )  # fmt: skip
            choice.observe(lambda change, name=name: self._map(name, change["new"]), "value")
            made.append(choice)
        return made

    def _mapping(self) -> dict[str, str]:
        found = _value("data.columns", str(self.fields["data.columns"].value).strip() or "{}")
        return dict(found) if isinstance(found, dict) else {}

    def _map(self, name: str, column: str) -> None:
        mapped = {key: value for key, value in self._mapping().items() if key != name}
        mapped |= {name: column} if column else {}
        words = ", ".join(f"{key}: {_text(value)}" for key, value in mapped.items())
        self.fields["data.columns"].value = f"{{{words}}}" if mapped else ""


class Trial(NamedTuple):
    """What a job that trains nothing found: its card and its result, or what went wrong."""

    card: Bundle | None = None
    problem: str | None = None
    result: Mapping[str, Any] = {}


def try_out(
    kind: str, recipe: Recipe, objects: Mapping[str, Any], changed: threading.Event, **about: Any
) -> Trial | None:
    """Do a job that trains nothing, see `launching.scratch_job`; not for callbacks.

    Returns:
        What it found; None when something was typed meanwhile, which breaks it off.
    """
    try:
        with scratch_job(kind, recipe, LaunchOptions(), objects, **about) as job:
            while job.status not in TERMINAL or job.is_coming_up:
                if changed.wait(_LOOK_S):
                    return None
            if job.status == "finished":
                return Trial(card=job.card(), result=job.summary().result)
            return Trial(problem=job.summary().outcome.get("error") or f"the job {job.status}")
    except TuneError as error:
        return Trial(problem=str(error))


def _field(key: str, owner: type[BaseModel], name: str) -> ipywidgets.Widget:
    """Return the widget of a key: a choice, a combination of choice and text, or a text; empty means the default."""
    field = owner.model_fields[name]
    shown = _TITLES.get(key) or key.removeprefix("data.").removeprefix("method.")
    options: dict[str, Any] = {
        "description": shown, "tooltip": field.description or "", "layout": COLUMN, "style": STYLE,
    }  # fmt: skip
    if key == "method.name":
        return ipywidgets.Dropdown(
            options=plugins.names("method"), value="lora", **{**options, "description": "method"}
        )
    known = choices(key, owner, name)
    default = _default(field.default, owner, name)
    if known and any(get_origin(kind) in (list, dict) for kind in (field.annotation, *get_args(field.annotation))):
        return ipywidgets.Combobox(
            options=known, placeholder=default or "none, one or [several]", ensure_option=False, **options
        )
    if known:
        labelled = [(f"default: {default}" if default else "default", ""), *((choice, choice) for choice in known)]
        return ipywidgets.Dropdown(options=labelled, value="", **options)
    if key == "model" or key in _DATA:
        known = installed() if key == "model" else preview.files_here()
        return ipywidgets.Combobox(options=known, placeholder=default, ensure_option=False, **options)
    return ipywidgets.Text(placeholder=default, **options)


def _default(value: Any, owner: type[BaseModel], name: str) -> str:
    return (
        "needed"
        if owner.model_fields[name].is_required()
        else ""
        if value in (None, "", PydanticUndefined)
        else _text(value)
    )


def _value(key: str, text: str) -> Any:
    """Read what was typed as YAML would; what it cannot read is a text."""
    if key in ("model", "data.train"):
        return text
    try:
        return yaml.read(f"value: {text}")[0]["value"]
    except RecipeError:
        return text


def _text(value: Any) -> str:
    """Write a value as people type it."""
    return yaml.write({"value": value}).removeprefix("value:").strip()
