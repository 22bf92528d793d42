"""Rows before training: choose, map the columns, and see format, faults and the label lens."""

from __future__ import annotations

from typing import Any

import ipywidgets
from tune_magic.widgets.form import WRAP, Form, try_out
from tune_magic.widgets.panel import Panel, button

from tune_magic.recipe.schema import Recipe
from tune_magic.view.form import data_form_bundle
from tune_magic.view.html import Bundle

_PERIOD_S = 0.5
_QUIET_S = 1.0  # so long nothing is typed before the rows are read
_KEYS = (
    "data.train", "model", "data.held_out", "objective.name", "max_length", "data.format", "data.template", "data.columns",
    "data.chat_template", "data.clean", "data.on_bad_rows", "data.group_by", "data.balance", "data.mix", "data.augment",
)  # fmt: skip


class DataPanel(Panel):
    """Shows rows as they would be trained, read anew whenever something is typed.

    Where a line of the recipe would mend what was found, a button writes it; `recipe` is then what to train by.

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
        self.changes = ipywidgets.HBox(layout=WRAP)
        super().__init__(ipywidgets.VBox([fields, columns, self.changes]), _PERIOD_S)

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
            self._offer([])
            return
        if self._looked == recipe.normalised():
            return
        self._report = self._problem = None
        self._draw()
        if self._changed.wait(_QUIET_S):
            return
        found = try_out("data", recipe, self._form.objects, self._changed, name="data")
        if found is not None:
            self._looked = recipe.normalised()
            self._report, self._problem = found.card, found.problem
            self._offer([finding["change"] for finding in found.result.get("findings", []) if finding["change"]])

    def _offer(self, changes: list[str]) -> None:
        """Show a button for each line that would mend something."""
        self.changes.children = [
            button(
                line, f"Add `{line}` to the recipe and read the rows again", lambda line=line: self._form.apply(line)
            )
            for line in dict.fromkeys(changes)
        ]


def _is_nothing(data: Any) -> bool:
    return isinstance(data, str) and not data
