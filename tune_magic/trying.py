"""Several methods on the same rows within the same budget, side by side."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_magic import display
from tune_magic.comparing import peak_bytes
from tune_magic.errors import RecipeError, Stopped, TuneError
from tune_magic.follow import Interrupts, watch
from tune_magic.handles import Run
from tune_magic.recipe import topics
from tune_magic.recipe.build import build_recipe
from tune_magic.recipe.launch import LaunchOptions
from tune_magic.recipe.schema import Recipe
from tune_magic.storage.events import number
from tune_magic.storage.folder import make_id
from tune_magic.storage.summary import Summary
from tune_magic.view import words
from tune_magic.view.html import Bundle, stacked
from tune_magic.view.methods import trial_card, trial_so_far

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_SCORES = ("loss", "accuracy")
Begin = Callable[..., tuple[Run, str | None]]


class TriedMethods:
    """Methods that were trained one after the other, each a run of its own.

    Args:
        title: The model and the data, in words.

    Attributes:
        rows: A mapping a method: method, state, problem, run (its name), learning_rate, steps, trained, parameters,
            step_seconds (median), seconds (in all, with loading and scoring), peak_bytes, base_held_out_loss,
            held_out_loss, and of classifiers base_accuracy and accuracy; None or NaN where there is no such number.
        runs: The runs there are.

    Example:
        >>> tried = tune_magic.try_methods(["lora", "ia3"], model=..., data=..., max_steps=50)  # doctest: +SKIP
        >>> tried.frame().sort_values("held_out_loss")  # doctest: +SKIP
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.rows: list[dict[str, Any]] = []
        self.runs: list[Run] = []
        self.note: str | None = None
        self.key = Path(make_id(datetime.now(UTC)))  # tells it from others that a cell may have shown

    def add(self, name: str, recipe: Recipe | None, run: Run | None, problem: str | None = None) -> None:
        """Take a method that was tried, or a reason why it was not."""
        rate = math.nan if recipe is None else recipe.learning_rate
        row = {"method": name, "state": "failed", "problem": problem, "run": None, "learning_rate": rate}
        if run is not None:
            self.runs.append(run)
            row |= {"state": _state(run), "run": run.name or run.id, "learning_rate": rate}
        self.rows.append(row | _numbers(Summary() if run is None else run.summary()))

    def frame(self) -> pd.DataFrame:
        """Return a row a method with its trained parameters, time, memory and scores."""
        import pandas as pd

        return pd.DataFrame(self.rows).set_index("method").astype({"trained": "Int64", "parameters": "Int64"})

    def plot(self) -> Figure:
        """Return score against trained parameters as a matplotlib figure."""
        from tune_magic.view.figure import tradeoff_figure

        name = "accuracy" if any(not math.isnan(row["accuracy"]) for row in self.rows) else "held_out_loss"
        points = {row["method"]: (row["trained"], row[name]) for row in self.rows if not math.isnan(row[name])}
        return tradeoff_figure(points, name.replace("_", "-").replace("-loss", " loss"))

    def card(self) -> dict[str, str]:
        """Return the table as HTML and as text."""
        return trial_card(self.title, self.rows, self.note)

    def show(self) -> None:
        """Show it: in a notebook as HTML, elsewhere as text."""
        display.show(self.card())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": repr(self)} if display.was_shown(self.key) else self.card()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {', '.join(row['method'] for row in self.rows)}>"


class _Below:
    """A place to draw below what is done already."""

    def __init__(self, live: display.Live, above: Bundle) -> None:
        self._live, self._above = live, above

    @property
    def is_text(self) -> bool:
        """Whether only text is shown, which is never taken back."""
        return self._live.is_text

    def update(self, bundle: Bundle) -> None:
        """Replace what is shown."""
        self._live.update(bundle if self.is_text else stacked(self._above, bundle))


def recipes_of(
    names: Sequence[str | Mapping[str, Any]], given: Mapping[str, Any], keys: Mapping[str, Any]
) -> dict[str, Recipe | TuneError]:
    """Return the recipe of each method, or why there is none, by what the method is called.

    Each is trained at the usual learning rate of its method, unless `keys` has one for all.

    Args:
        names: Methods and variants of them, or mappings with `name` and more keys of a method.
        given: Model and data.
        keys: Keys of a recipe, the same for all.

    Raises:
        TuneError: There is no such method, or none of the recipes is right.
    """
    found: dict[str, Recipe | TuneError] = {}
    for name in names:
        plain = {"name": name} if isinstance(name, str) else dict(name)
        topic = topics.find_method(str(plain.pop("name", None)))
        label = " ".join([topic.name, *(f"{key}={value}" for key, value in plain.items())])
        method = {**topic.recipe["method"], **plain}
        try:
            found[label] = build_recipe(
                {"learning_rate": topic.learning_rate, **given, **topic.recipe, "method": method}, keys
            )
        except RecipeError as error:
            found[label] = error
    faults = [entry for entry in found.values() if isinstance(entry, TuneError)]
    if faults and len(faults) == len(found):
        raise faults[0]
    return found


def try_methods(
    recipes: Mapping[str, Recipe | TuneError], options: LaunchOptions, begin: Begin, title: str, **about: Any
) -> TriedMethods:
    """Train each recipe as a run, one after the other, and show them as they go.

    An interrupt stops the run at hand, whose last step is kept, and what is there is tabulated; a second one kills it.

    Args:
        recipes: As `recipes_of` returns them.
        options: How to start each; a budget is each one's own.
        begin: `launching.begin`, or what does the same.
        title: The model and the data, in words.
        **about: As of `launching.begin`.
    """
    live, interrupts = display.Live(), Interrupts()
    tried = TriedMethods(title)
    names = list(recipes)
    with interrupts.counted():
        for place, (name, recipe) in enumerate(recipes.items()):
            if interrupts.count:
                tried.note = f"It was interrupted; not tried: {', '.join(names[place:])}."
                break
            if isinstance(recipe, TuneError):
                tried.add(name, None, None, str(recipe))
                continue
            above = trial_so_far(title, tried.rows, names[place:])
            run, problem, times = _train(recipe, options, begin, _Below(live, above), _about(name, tried, about))
            interrupts.count += times
            tried.add(name, recipe, run, problem)
    live.update(tried.card())
    display.mark_shown(tried.key)
    return tried


def _about(name: str, tried: TriedMethods, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run is told of itself: a name that can be typed, the same end for all that are tried together."""
    word = re.sub(r"[^\w.]+", "-", name)
    return {**about, "name": f"try-{word}-{tried.key.name.rpartition('-')[2]}"}


def _train(
    recipe: Recipe, options: LaunchOptions, begin: Begin, live: _Below, about: Mapping[str, Any]
) -> tuple[Run | None, str | None, int]:
    """Train a recipe to its end; returns the run, what went wrong, and how often it was interrupted."""
    run, times = None, 0
    try:
        run, _ = begin(recipe, options, **about)
        times = watch(run, live)
        run.raise_for_state()
    except Stopped:
        return run, None, times
    except TuneError as error:
        outcome = {} if run is None else run.summary().outcome  # says it without the run's name
        message = outcome.get("error") or error.message
        return run, " ".join(filter(None, [message, outcome.get("cause"), error.hint])), times
    return run, None, times


def _state(run: Run) -> str:
    out_of_time = run.status == "stopped" and run.summary().outcome.get("reason") == "budget"
    return "its time was up" if out_of_time else str(run.status)


def _numbers(summary: Summary) -> dict[str, Any]:
    """Return what a run trained, took and scored; None or NaN where there is no number."""
    steps, best, base = summary.steps.values(), summary.best or {}, summary.evaluations.get(0, {})
    ended = summary.ended or summary.last_t
    scores: dict[str, float] = {}
    for score in _SCORES:
        name = "held_out_loss" if score == "loss" else score
        scores |= {f"base_{name}": number(base.get(score)), name: number(best.get(score))}
    return {
        "steps": summary.step,
        "trained": summary.plan.get("trainable_parameters"),
        "parameters": summary.plan.get("parameters"),
        "step_seconds": statistics.median(event["seconds"] for event in steps) if steps else math.nan,
        "seconds": ended - summary.started if ended and summary.started and steps else math.nan,
        "peak_bytes": peak_bytes(summary),
        **scores,
    }


def title_of(model: str, data: Any) -> str:
    """Return what is trained on what, in words."""
    return f"{words.tail(model)} on {words.tail(data) if isinstance(data, str) else 'your rows'}"
