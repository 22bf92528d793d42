"""Several runs side by side: what differs in their recipes, how they score, their curves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tune_magic import display
from tune_magic.errors import TuneError
from tune_magic.handles import Run
from tune_magic.recipe.build import build_recipe
from tune_magic.recipe.differences import differences
from tune_magic.storage.folder import RunFolder
from tune_magic.storage.summary import Summary

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_SHORT_ID = 4
_SHORT_PRINT = 8


class ComparedRuns:
    """Runs beside each other.

    Args:
        runs: Two or more.

    Attributes:
        names: What each is called here: its name, with the end of its id where two have the same.

    Example:
        >>> tune_magic.compare("first", "second").metrics  # doctest: +SKIP
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        if len(runs) < 2:
            raise TuneError("A comparison needs two runs or more.")
        self.runs = list(runs)
        self.names = names_of(runs)

    @property
    def differences(self) -> dict[str, list[Any]]:
        """Each key of the recipes that is not the same in all, with its value in each run; data by its content too."""
        found = differences([normalised(run) for run in self.runs])
        prints: list[dict[str, str]] = [run.summary().plan.get("fingerprints", {}) for run in self.runs]
        for role in dict.fromkeys(role for part in prints for role in part):
            values = [part.get(role, "")[:_SHORT_PRINT] or None for part in prints]
            if len(set(values)) > 1:
                found[f"content of {role}"] = values
        return found

    @property
    def recipes(self) -> pd.DataFrame:
        """`differences` as a table: a row a key, a column a run."""
        import pandas as pd

        return pd.DataFrame.from_dict(self.differences, orient="index", columns=self.names)

    @property
    def metrics(self) -> pd.DataFrame:
        """A row a metric, a column a run: held-out losses, what `evaluate` scored, seconds, peak memory, tokens."""
        import pandas as pd

        columns = [{**run.metrics, **_costs(run)} for run in self.runs]
        index = dict.fromkeys(key for column in columns for key in column)
        rows = [[column.get(key) for column in columns] for key in index]
        return pd.DataFrame(rows, index=list(index), columns=self.names, dtype=float)

    def plot(self) -> Figure:
        """Return the curves of all runs as one matplotlib figure."""
        from tune_magic.view.figure import overlaid_figure

        return overlaid_figure({name: run.summary() for name, run in zip(self.names, self.runs, strict=True)})

    def card(self) -> dict[str, str]:
        """Return the comparison as HTML and as text."""
        from tune_magic.view.compare import comparison_card

        return comparison_card(self.names, self.runs, self.differences, [run.metrics for run in self.runs])

    def show(self) -> None:
        """Show it: in a notebook as HTML, elsewhere as text."""
        display.show(self.card())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return self.card()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {', '.join(self.names)}>"


def names_of(runs: Sequence[RunFolder], taken: Sequence[str] = (), joint: str = " ") -> list[str]:
    """Return what each run is called beside the others: its name, with the end of its id where two have the same.

    Args:
        runs: The runs.
        taken: Names that mean something else.
        joint: What stands before the end of the id.
    """
    plain = [run.name or run.id for run in runs]
    often = Counter([*plain, *taken])
    return [
        f"{name}{joint}{run.id[-_SHORT_ID:]}" if often[name] > 1 and name != run.id else name
        for name, run in zip(plain, runs, strict=True)
    ]


def normalised(run: RunFolder) -> dict[str, Any]:
    """Return a run's recipe with every default filled in; one that this version cannot read stays as given."""
    given: dict[str, Any] = run.info.get("recipe", {})
    try:
        return build_recipe(given).normalised()
    except TuneError:
        return given


def _costs(run: Run) -> dict[str, float]:
    summary = run.summary()
    found = {"tokens": float(sum(event["tokens"] for event in summary.steps.values()))} if summary.steps else {}
    if summary.steps:
        found["seconds"] = float(sum(event["seconds"] for event in summary.steps.values()))
    peak = peak_bytes(summary)
    return found if math.isnan(peak) else found | {"peak_bytes": peak}


def peak_bytes(summary: Summary) -> float:
    """Return the most memory a run took, of its GPU where it has one; NaN before it told."""
    if not summary.memory:
        return math.nan
    return float(summary.memory.get("gpu_peak") or summary.memory["peak"])
