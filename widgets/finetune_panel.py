"""A form for a recipe: every key of the schema, the recipe as text, the plan, and the run it becomes."""

from __future__ import annotations

import queue
from typing import Any, Literal, get_args, get_origin

import ipywidgets
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from tune_magic.widgets.panel import Panel, button
from tune_magic.widgets.run_panel import RunPanel

from tune_magic import api, plugins, tables
from tune_magic.data.preview import files_here
from tune_magic.display import shell
from tune_magic.errors import RecipeError, TuneError
from tune_magic.handles import Run
from tune_magic.launching import scratch_job
from tune_magic.magics.link import notebook_link
from tune_magic.models.find import installed
from tune_magic.recipe import yaml
from tune_magic.recipe.build import build_recipe, flat, keys
from tune_magic.recipe.launch import LaunchOptions
from tune_magic.recipe.schema import Recipe
from tune_magic.storage.state import TERMINAL
from tune_magic.view.form import form_bundle
from tune_magic.view.html import Bundle

_PERIOD_S = 0.5
_QUIET_S = 1.0  # so long nothing is typed before a plan is made
_FIRST = (
    "model", "data.train", "data.held_out", "data.test", "objective", "method.name", "learning_rate",
    "num_train_epochs", "batch_size", "max_length",
)  # fmt: skip
_COLUMN = ipywidgets.Layout(width="385px")
_STYLE = {"description_width": "190px"}


class FinetunePanel(Panel):
    """A form that trains.

    What is typed becomes a recipe, shown as the cell that would do the same, with every fault; a dry run of it shows
    the plan. After Start the panel is a `RunPanel`, and `run` is its run.

    Args:
        name: Name of the run.
        **prefilled: Keys of a recipe; ``data`` may be a DataFrame or a list of dicts.

    Example:
        >>> FinetunePanel(model="minilm-l6", data="intents.csv")  # doctest: +SKIP
    """

    def __init__(self, name: str = "run", **prefilled: Any) -> None:
        plain, self._objects = tables.take_out(prefilled)
        self.name = ipywidgets.Text(name, description="name", tooltip="Name of the run", layout=_COLUMN, style=_STYLE)
        every = list(keys())
        parts = {key.rpartition(".")[0] for key, _, _ in every}
        self.fields = {key: _field(key, owner, field) for key, owner, field in every if key not in parts}
        for key, value in flat(plain).items():
            if key in self.fields:
                self.fields[key].value = value if isinstance(value, str) else _text(value)
        self.start = button("Start", "Train by this recipe", lambda: self._ask("start"), button_style="primary")
        self.measure = button("Measure time and memory", "Try the heaviest step once", lambda: self._ask("measure"))
        self.run: Run | None = None
        self._recipe: Recipe | None = None
        self._problems: list[str] = []
        self._planned: Any = None  # the content of the recipe that `_plan` is about
        self._plan: Bundle | None = None
        self._asked: queue.SimpleQueue[str] = queue.SimpleQueue()  # buttons that were pressed
        self._run_panel: RunPanel | None = None
        self._link: dict[str, Any] = {}
        self._method_box = ipywidgets.HBox(layout=ipywidgets.Layout(flex_flow="row wrap"))
        super().__init__(ipywidgets.VBox(self._layout()), _PERIOD_S)
        for field in (self.name, *self.fields.values()):
            field.observe(self.wake, "value")
        self.fields["method.name"].observe(self._show_method, "value")
        self._show_method()
        self._read()

    @property
    def recipe(self) -> Recipe | None:
        """The recipe as it stands; None while it has faults."""
        self._read()
        return self._recipe

    def bundle(self) -> Bundle:
        """Return recipe, faults and plan; once started, the run."""
        if self._run_panel is not None:
            return self._run_panel.bundle()
        given = self._recipe.short() if self._recipe else self._typed()
        return form_bundle(self.name.value, yaml.write(given), self._problems, self._plan)

    def act(self) -> None:
        """Start, plan or look again, as was asked."""
        if self._run_panel is not None:
            self._run_panel.act()
            return
        self._read()
        self.start.disabled = self.measure.disabled = self._recipe is None
        asked = {self._asked.get() for _ in range(self._asked.qsize())}
        if self._recipe is None:
            return
        if "start" in asked:
            self._begin(self._recipe)
        elif "measure" in asked or self._planned != self._identity():
            self._make_plan(self._recipe, measure="measure" in asked)

    @property
    def is_over(self) -> bool:
        """Whether its run has finished."""
        return self._run_panel is not None and self._run_panel.is_over

    def _ipython_display_(self) -> None:
        current = shell()
        self._link = notebook_link(current, None) if current is not None else {}
        super()._ipython_display_()

    def _ask(self, wish: str) -> None:
        self._asked.put(wish)
        self.wake()

    def _typed(self) -> dict[str, Any]:
        """Return the keys that were filled in."""
        mine = {"method.name", *self._method_keys()}
        typed = {}
        for key, field in self.fields.items():
            is_other_methods = key.startswith("method.") and key not in mine
            if str(field.value).strip() and not is_other_methods:
                typed[key] = _value(key, str(field.value).strip())
        return typed

    def _read(self) -> None:
        """Check what is typed; faults of a plan stay while the recipe is the same."""
        try:
            self._recipe = build_recipe(self._typed())
        except RecipeError as error:
            self._recipe, self._problems = None, [str(fault) for fault in error.faults]
        if self._planned is None or self._planned != self._identity():
            self._plan = None
            self._problems = self._problems if self._recipe is None else []

    def _identity(self) -> Any:
        return self._recipe.normalised() if self._recipe else None

    def _make_plan(self, recipe: Recipe, *, measure: bool) -> None:
        """Do a dry run; it is broken off when something is typed."""
        if not measure and self._changed.wait(_QUIET_S):
            return
        self._planned = self._identity()
        try:
            with scratch_job(
                "plan", recipe, LaunchOptions(), self._objects, measure=measure, name=self.name.value
            ) as job:
                while job.status not in TERMINAL or job.is_coming_up:
                    if self._changed.wait(_PERIOD_S):
                        self._planned = None
                        return
                if job.status == "finished":
                    self._plan = job.card()
                else:
                    self._plan, self._problems = None, [job.summary().outcome.get("error") or f"the plan {job.status}"]
        except TuneError as error:
            self._plan, self._problems = None, [str(error)]
        self._draw()

    def _begin(self, recipe: Recipe) -> None:
        try:
            self.run, note = api.begin(
                recipe, LaunchOptions(), name=self.name.value or None, objects=self._objects, link=self._link,
                recipe_text=yaml.write(recipe.short()),
            )  # fmt: skip
        except TuneError as error:
            self._problems = [str(error)]
            return
        self._run_panel = RunPanel(self.run, note)
        if self._view is not None:
            self._view.link(self.run)
        self.controls.children = [self._run_panel.controls]

    def _layout(self) -> list[ipywidgets.Widget]:
        wrap = ipywidgets.Layout(flex_flow="row wrap")
        rest = [field for key, field in self.fields.items() if key not in _FIRST and not key.startswith("method.")]
        more = ipywidgets.Accordion([ipywidgets.HBox(rest, layout=wrap)], titles=["all keys"], selected_index=None)
        first = [self.name, *(self.fields[key] for key in _FIRST)]
        buttons = ipywidgets.HBox([self.start, self.measure])
        return [ipywidgets.HBox(first, layout=wrap), self._method_box, more, buttons]

    def _show_method(self, *_: Any) -> None:
        self._method_box.children = [self.fields[key] for key in self._method_keys()]

    def _method_keys(self) -> list[str]:
        """Return the keys of the chosen method's options."""
        options = plugins.get("method", self.fields["method.name"].value).Options.model_fields
        return [f"method.{name}" for name in options if name != "name"]


def _field(key: str, owner: type[BaseModel], name: str) -> ipywidgets.Widget:
    """Return the widget of a key: a choice, a combination of choice and text, or a text; empty means the default."""
    field = owner.model_fields[name]
    shown = "data" if key == "data.train" else key.removeprefix("data.").removeprefix("method.")
    options: dict[str, Any] = {
        "description": shown, "tooltip": field.description or "", "layout": _COLUMN, "style": _STYLE,
    }  # fmt: skip
    if key == "method.name":
        return ipywidgets.Dropdown(
            options=plugins.names("method"), value="lora", **{**options, "description": "method"}
        )
    choices = plugins.names("objective") if key == "objective" else _choices(field.annotation)
    default = _default(field.default, owner, name)
    if choices:
        labelled = [(f"default: {default}" if default else "default", ""), *((choice, choice) for choice in choices)]
        return ipywidgets.Dropdown(options=labelled, value="", **options)
    if key in ("model", "data.train", "data.held_out", "data.test"):
        known = installed() if key == "model" else files_here()
        return ipywidgets.Combobox(options=known, placeholder=default, ensure_option=False, **options)
    return ipywidgets.Text(placeholder=default, **options)


def _default(value: Any, owner: type[BaseModel], name: str) -> str:
    return (
        "needed"
        if owner.model_fields[name].is_required()
        else ""
        if value in (None, PydanticUndefined)
        else _text(value)
    )


def _choices(annotation: Any) -> list[str]:
    if annotation is bool:
        return ["true", "false"]
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in _choices(part)]


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
