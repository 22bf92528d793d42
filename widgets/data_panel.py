"""Rows before training: choose, map the columns, and see format, faults and the label lens."""

from __future__ import annotations

from typing import Any

import ipywidgets
from tune_magic.widgets.form import WRAP, Form
from tune_magic.widgets.panel import Panel

from tune_magic.errors import TuneError
from tune_magic.launching import scratch_job
from tune_magic.recipe.launch import LaunchOptions
from tune_magic.recipe.schema import Recipe
from tune_magic.storage.state import TERMINAL
from tune_magic.view.form import data_form_bundle
from tune_magic.view.html import Bundle

_PERIOD_S = 0.5
_QUIET_S = 1.0  # so long nothing is typed before the rows are read
_KEYS = (
    "data.train", "model", "data.held_out", "objective", "max_length", "data.format", "data.template", "data.columns",
    "data.chat_template",
)  # fmt: skip


class DataPanel(Panel):
    """Shows rows as they would be trained, read anew whenever something is typed.

    Args:
        data: A file, a hub id, a DataFrame or a list of dicts.
        **prefilled: More keys of a recipe, ``model`` and ``max_length`` at first.

    Example:
        >>> DataPanel("tickets.jsonl", model="smollm2-135m-instruct")  # doctest: +SKIP
    """

    def __init__(self, data: Any = "", **prefilled: Any) -> None:
        self._form = Form(_KEYS, {**({} if _is_nothing(data) else {"data": data}), **prefilled}, self.wake)
        self.fields = self._form.fields
        self._looked: Any = None  # the content of the recipe that `_report` is about
        self._report: Bundle | None = None
        self._problem: str | None = None
        columns = ipywidgets.Accordion([self._form.columns], titles=["columns of the data"], selected_index=None)
        fields = ipywidgets.HBox([self.fields[key] for key in _KEYS], layout=WRAP)
        super().__init__(ipywidgets.VBox([fields, columns]), _PERIOD_S)

    @property
    def recipe(self) -> Recipe | None:
        """The keys as a recipe; None while they have faults."""
        self._form.read()
        return self._form.recipe

    def bundle(self) -> Bundle:
        """Return first rows, faults and the report."""
        problems = [*self._form.problems, *([self._problem] if self._problem else [])]
        return data_form_bundle(self._form.typed(), problems, self._report, self._form.head)

    def act(self) -> None:
        """Read the rows, when something else was typed."""
        self._form.look()
        recipe = self.recipe
        if recipe is None:
            self._looked = self._report = self._problem = None
            return
        if self._looked == recipe.normalised():
            return
        self._report = self._problem = None
        self._draw()
        if self._changed.wait(_QUIET_S):
            return
        self._read_rows(recipe)

    def _read_rows(self, recipe: Recipe) -> None:
        self._looked = recipe.normalised()
        try:
            with scratch_job("data", recipe, LaunchOptions(), self._form.objects, name="data") as job:
                while job.status not in TERMINAL or job.is_coming_up:
                    if self._changed.wait(_PERIOD_S):
                        self._looked = None
                        return
                if job.status == "finished":
                    self._report = job.card()
                else:
                    self._problem = job.summary().outcome.get("error") or f"the job {job.status}"
        except TuneError as error:
            self._problem = str(error)


def _is_nothing(data: Any) -> bool:
    return isinstance(data, str) and not data
