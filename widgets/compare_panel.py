"""Runs to choose from, and those that are chosen side by side."""

from __future__ import annotations

import contextlib
import itertools

import ipywidgets
from tune_magic.widgets.panel import Panel

from tune_magic.comparing import ComparedRuns
from tune_magic.errors import TuneError
from tune_magic.handles import Run
from tune_magic.storage import places
from tune_magic.storage.events import number
from tune_magic.view import words
from tune_magic.view.html import Bundle, clean, note_bundle

_PERIOD_S = 2.0
_NEWEST_RUNS = 50
_ROWS = 8


class ComparePanel(Panel):
    """A list of runs; of two or more that are chosen, recipes, scores and curves beside each other.

    Live runs are drawn again as they train.

    Args:
        *runs: Chosen at the start: runs, or their names or ids.

    Attributes:
        choice: The list; its value is the ids of what is chosen.

    Raises:
        TuneError: There is no such run.

    Example:
        >>> ComparePanel("first", "second")  # doctest: +SKIP
    """

    def __init__(self, *runs: Run | str) -> None:
        chosen = [run if isinstance(run, Run) else Run(places.find(run)) for run in runs]
        self._runs = {run.id: Run(run.path) for run in chosen}  # own readers: two threads must not share one
        self.choice = ipywidgets.SelectMultiple(
            description="Runs", rows=_ROWS, tooltip="Choose two or more, with Ctrl or Shift",
            layout=ipywidgets.Layout(width="100%", max_width="980px"),
        )  # fmt: skip
        self._titles: list[tuple[str, str]] = []
        self.refresh(tuple(self._runs))
        self.choice.observe(self.wake, "value")
        super().__init__(ipywidgets.VBox([self.choice]), _PERIOD_S)

    def bundle(self) -> Bundle:
        """Return the comparison of what is chosen, or what to do."""
        chosen = [self._runs[run_id] for run_id in self.choice.value if run_id in self._runs]
        if len(chosen) < 2:
            return note_bundle("Choose two runs or more." if self._titles else "There are no runs yet.")
        return ComparedRuns(chosen).card()

    def act(self) -> None:
        """Look for runs that came, went, or ended."""
        self.refresh(self.choice.value)

    def refresh(self, chosen: tuple[str, ...]) -> None:
        """List the newest runs, with what is chosen kept chosen."""
        for path in itertools.islice(places.folders(), _NEWEST_RUNS):
            self._runs.setdefault(path.name, Run(path))
        self._runs = {run_id: run for run_id, run in self._runs.items() if (run.path / "run.json").is_file()}
        titles = []
        for run_id, run in sorted(self._runs.items(), reverse=True):
            with contextlib.suppress(TuneError):  # damaged, or from a newer version
                titles.append((_title(run), run_id))
        if titles != self._titles:
            self._titles = titles
            known = {run_id for _, run_id in titles}
            self.choice.options = titles
            self.choice.value = tuple(run_id for run_id in chosen if run_id in known)


def _title(run: Run) -> str:
    best = run.summary().best
    loss = f" · held-out loss {words.value(number(best['loss']))}" if best else ""
    return f"{clean(run.name or 'unnamed', 60)} · {run.status}{loss} · {run.id}"
