"""A form for a recipe: every key of the schema, the data's first rows, the recipe as text, the plan, and the run."""

from __future__ import annotations

import queue
from typing import Any

import ipywidgets
from tune_magic.widgets.form import COLUMN, STYLE, WRAP, Form, try_out
from tune_magic.widgets.panel import Panel, button
from tune_magic.widgets.run_panel import RunPanel

from tune_magic import api
from tune_magic.display import shell
from tune_magic.errors import TuneError
from tune_magic.handles import Run
from tune_magic.magics.link import notebook_link
from tune_magic.recipe import yaml
from tune_magic.recipe.build import keys
from tune_magic.recipe.launch import LaunchOptions
from tune_magic.recipe.schema import Recipe
from tune_magic.view.form import form_bundle
from tune_magic.view.html import Bundle

_PERIOD_S = 0.5
_QUIET_S = 1.0  # so long nothing is typed before a plan is made
_FIRST = (
    "model", "data.train", "data.held_out", "data.test", "objective.name", "method.name", "learning_rate",
    "num_train_epochs", "batch_size", "max_length",
)  # fmt: skip


class FinetunePanel(Panel):
    """A form that trains.

    What is typed becomes a recipe, shown as the cell that would do the same, with every fault; the data's first rows
    are shown, and its columns can be mapped; a dry run shows the plan. After Start the panel is a `RunPanel`, and
    `run` is its run.

    Args:
        name: Name of the run.
        **prefilled: Keys of a recipe; ``data`` may be a DataFrame or a list of dicts.

    Example:
        >>> FinetunePanel(model="minilm-l6", data="intents.csv")  # doctest: +SKIP
    """

    def __init__(self, name: str = "run", **prefilled: Any) -> None:
        self.name = ipywidgets.Text(name, description="name", tooltip="Name of the run", layout=COLUMN, style=STYLE)
        every = [key for key, _, _ in keys()]
        parts = {key.rpartition(".")[0] for key in every}
        self._form = Form((key for key in every if key not in parts), prefilled, self.wake)
        self.fields = self._form.fields
        self.start = button("Start", "Train by this recipe", lambda: self._ask("start"), button_style="primary")
        self.measure = button("Measure time and memory", "Try the heaviest step once", lambda: self._ask("measure"))
        self.run: Run | None = None
        self._planned: Any = None  # the content of the recipe that `_plan` is about
        self._plan: Bundle | None = None
        self._plan_problem: str | None = None
        self._asked: queue.SimpleQueue[str] = queue.SimpleQueue()  # buttons that were pressed
        self._run_panel: RunPanel | None = None
        self._link: dict[str, Any] = {}
        self._method_box = ipywidgets.HBox(layout=WRAP)
        super().__init__(ipywidgets.VBox(self._layout()), _PERIOD_S)
        self.name.observe(self.wake, "value")
        self.fields["method.name"].observe(self._show_method, "value")
        self._show_method()
        self._read()

    @property
    def recipe(self) -> Recipe | None:
        """The recipe as it stands; None while it has faults."""
        self._read()
        return self._form.recipe

    def bundle(self) -> Bundle:
        """Return recipe, faults, first rows and plan; once started, the run."""
        if self._run_panel is not None:
            return self._run_panel.bundle()
        recipe = self._form.recipe
        given = recipe.short() if recipe else self._form.typed()
        problems = [*self._form.problems, *([self._plan_problem] if self._plan_problem else [])]
        return form_bundle(self.name.value, yaml.write(given), problems, self._plan, self._form.head)

    def act(self) -> None:
        """Start, plan or look again, as was asked."""
        if self._run_panel is not None:
            self._run_panel.act()
            return
        asked = {self._asked.get() for _ in range(self._asked.qsize())}
        if asked:
            self.settle()
        self._read()
        self._form.look()
        recipe = self._form.recipe
        self.start.disabled = self.measure.disabled = recipe is None
        if recipe is None:
            return
        if "start" in asked:
            self._begin(recipe)
        elif "measure" in asked or self._planned != recipe.normalised():
            self._draw()  # the first rows are there before the plan is
            self._make_plan(recipe, measure="measure" in asked)

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

    def _read(self) -> None:
        """Check what is typed; plan and its fault stay while the recipe is the same."""
        self._form.read()
        recipe = self._form.recipe
        if recipe is None or self._planned != recipe.normalised():
            self._plan = self._plan_problem = None

    def _make_plan(self, recipe: Recipe, *, measure: bool) -> None:
        """Do a dry run; it is broken off when something is typed."""
        if not measure and self._changed.wait(_QUIET_S):
            return
        self._plan = self._plan_problem = None
        found = try_out(
            "plan", recipe, self._form.objects, self._changed, measure=measure, name=self.name.value
        )  # fmt: skip
        if found is not None:
            self._planned = recipe.normalised()
            self._plan, self._plan_problem = found.card, found.problem
        self._draw()

    def _begin(self, recipe: Recipe) -> None:
        try:
            self.run, note = api.begin(
                recipe, LaunchOptions(), name=self.name.value or None, objects=self._form.objects, link=self._link,
                recipe_text=yaml.write(recipe.short()),
            )  # fmt: skip
        except TuneError as error:
            self._planned, self._plan_problem = recipe.normalised(), str(error)
            return
        self._run_panel = RunPanel(self.run, note)
        if self._view is not None:
            self._view.link(self.run)
        self.controls.children = [self._run_panel.controls]

    def _layout(self) -> list[ipywidgets.Widget]:
        rest = [field for key, field in self.fields.items() if key not in _FIRST and not key.startswith("method.")]
        more = ipywidgets.Accordion(
            [self._form.columns, ipywidgets.HBox(rest, layout=WRAP)],
            titles=["columns of the data", "all keys"], selected_index=None,
        )  # fmt: skip
        first = [self.name, *(self.fields[key] for key in _FIRST)]
        buttons = ipywidgets.HBox([self.start, self.measure])
        return [ipywidgets.HBox(first, layout=WRAP), self._method_box, more, buttons]

    def _show_method(self, *_: Any) -> None:
        self._method_box.children = self._form.method_fields()
