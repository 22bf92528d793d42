"""What `tune_magic.explain` and `tune_magic.list_methods` return: explanations, with numbers for a model."""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tune_magic import display, launching
from tune_magic.comparing import normalised, peak_bytes
from tune_magic.errors import RecipeError, RunFailed, TuneError
from tune_magic.follow import follow_job
from tune_magic.handles import Run
from tune_magic.recipe import topics
from tune_magic.recipe.build import build_recipe
from tune_magic.recipe.schema import Recipe
from tune_magic.recipe.topics import Topic
from tune_magic.storage import places
from tune_magic.storage.summary import Summary
from tune_magic.view.explain import explanation_card
from tune_magic.view.methods import methods_card

if TYPE_CHECKING:
    import pandas as pd

_LOOKED_AT = 200  # newest runs among which one of the same model is looked for
_ROWS = "rows.jsonl"  # stands for data that is not looked at


class Explanation:
    """What a method, an objective, or anything else with a name in a recipe does.

    Args:
        topic: What is explained.
        model: The model that the numbers are of.
        numbers: As `training.sizes.size` returns them; empty where nothing was counted.
        measured: As `measured_run` returns it.

    Attributes:
        summary: What is trained, minimised or done.
        formula: The same as a formula; empty where there is none.
        source: Where it was published.
        when: When to use it.
        recipe: Keys of a recipe that choose it.

    Example:
        >>> tune_magic.explain("dora", model="smollm2-135m-instruct").numbers["trained"]  # doctest: +SKIP
    """

    def __init__(
        self, topic: Topic, model: str | None = None, numbers: Mapping[str, Any] | None = None,
        measured: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.topic, self.model = topic, model
        self.kind, self.name = topic.kind, topic.name
        self.summary, self.formula, self.source, self.when = topic.summary, topic.formula, topic.source, topic.when
        self.recipe = dict(topic.recipe)
        self.numbers = dict(numbers or {})
        self.measured = dict(measured or {})

    def card(self) -> dict[str, str]:
        """Return the explanation as HTML and as text."""
        return explanation_card(self.topic, self.model, self.numbers, self.measured)

    def show(self) -> None:
        """Show it: in a notebook as HTML, elsewhere as text."""
        display.show(self.card())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return self.card()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.kind} {self.name}>"


class MethodList:
    """Every method and its variants, with what they train of a model.

    Args:
        found: Each with its numbers, which are empty where there is no model.
        model: The model.
    """

    def __init__(self, found: Sequence[tuple[Topic, Mapping[str, Any]]], model: str | None) -> None:
        self.topics = [topic for topic, _ in found]
        self.numbers = [dict(numbers) for _, numbers in found]
        self.model = model

    def frame(self) -> pd.DataFrame:
        """Return a row a method: name, variant_of, trained, share, summary, keys, problem."""
        import pandas as pd

        rows = [
            {
                "name": topic.name, "variant_of": topic.of, "trained": numbers.get("trained"),
                "share": numbers["trained"] / numbers["parameters"] if "trained" in numbers else None,
                "summary": topic.summary, "keys": [key.name for key in topic.keys], "problem": numbers.get("problem"),
            }
            for topic, numbers in zip(self.topics, self.numbers, strict=True)
        ]  # fmt: skip
        return pd.DataFrame(rows).set_index("name").astype({"trained": "Int64", "share": float})

    def card(self) -> dict[str, str]:
        """Return the table as HTML and as text."""
        return methods_card(self.topics, self.numbers, self.model)

    def show(self) -> None:
        """Show it: in a notebook as HTML, elsewhere as text."""
        display.show(self.card())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return self.card()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {len(self.topics)} methods>"


def explain(name: str, model: str | None, keys: Mapping[str, Any]) -> Explanation:
    """Find what goes by a name, and count what it trains of a model.

    Args:
        name: Of a plug-in, a variant, a value or a key.
        model: Whose parameters; None: nothing is counted.
        keys: Keys of a recipe beside it; those of the plug-in may come without its kind.

    Raises:
        TuneError: There is nothing of this name, or no such model. RecipeError: Keys with faults.
    """
    topic = topics.find(name)
    if topic.kind not in ("method", "objective") or model is None:
        return Explanation(topic)
    own = {key.name for key in topic.keys}
    given_keys = {key.rpartition(".")[2] for key in keys}
    missing = [key.name for key in topic.keys if key.default == topics.NEEDED and key.name not in given_keys]
    if missing:
        advice = f"`{missing[0]}` is needed: `%tune explain {name} {missing[0]}=...` counts with it"
        return Explanation(topic, model, {"problem": advice})
    recipe = build_recipe(
        {"model": model, "data": _ROWS, **topic.recipe},
        {f"{topic.kind}.{key}" if key in own else key: value for key, value in keys.items()},
    )
    (numbers,) = count([recipe], name)
    given = {key: value for key, value in recipe.given().items() if key not in ("model", "data")}
    if topic.kind == "objective" and not any(key.startswith("method") for key in keys):
        del given["method"]
    topic = replace(topic, recipe=given, line=topics.line(given))
    return Explanation(topic, model, {**numbers, "method": recipe.method.name}, measured_run(recipe, topic))


def list_methods(model: str | None, keys: Mapping[str, Any]) -> MethodList:
    """List every method with what it trains of a model; arguments as of `explain`."""
    found = topics.methods()
    if model is None:
        return MethodList([(topic, {}) for topic in found], None)
    built = [_built(model, topic, keys) for topic in found]
    recipes = [entry for entry in built if isinstance(entry, Recipe)]
    if not recipes:
        raise next(entry for entry in built if isinstance(entry, RecipeError))
    counted = iter(count(recipes, "methods"))
    numbers = [next(counted) if isinstance(entry, Recipe) else {"problem": str(entry)} for entry in built]
    return MethodList(list(zip(found, numbers, strict=True)), model)


def _built(model: str, topic: Topic, keys: Mapping[str, Any]) -> Recipe | RecipeError:
    """Return the recipe of a method, or why it has none: a key it lacks, or one it must be given."""
    try:
        return build_recipe({"model": model, "data": _ROWS, **topic.recipe}, keys)
    except RecipeError as error:
        return error


def count(recipes: Sequence[Recipe], name: str) -> list[dict[str, Any]]:
    """Return what each recipe would train, by a job that shows its progress where it takes a while.

    Raises:
        Stopped: It was interrupted. RunFailed: The model cannot be read.
    """
    with launching.sizes_job(recipes, name) as job:
        live = display.Passing()
        try:
            follow_job(job, live)
        except RunFailed as error:
            error.log = None  # it goes with the job's folder
            raise
        live.clear()
        return [dict(entry) for entry in job.summary().result["sizes"]]


def measured_run(recipe: Recipe, topic: Topic) -> dict[str, Any]:
    """Return what the newest run of a recipe's model by its method took, empty where there is none.

    One with the very same keys of the method comes first; of a variant, one that is the variant.

    Returns:
        ``name``; ``method``, as it was written; ``step_seconds`` and ``step_tokens``, medians over its steps;
        ``peak_bytes``.
    """
    wanted, near = recipe.method.model_dump(mode="json"), None
    for path in itertools.islice(places.folders(), _LOOKED_AT):
        with contextlib.suppress(TuneError):  # damaged, or from a newer version
            run = Run(path)
            if run.info.get("recipe", {}).get("model") != recipe.model:
                continue
            method, summary = normalised(run)["method"], run.summary()
            is_kind = method["name"] == wanted["name"]
            is_variant = all(method.get(key) == value for key, value in topic.recipe.get("method", {}).items())
            if summary.steps and is_kind and method == wanted:
                return _took(run, summary)
            if summary.steps and is_kind and near is None and (topic.of is None or is_variant):
                near = _took(run, summary)
    return near or {}


def _took(run: Run, summary: Summary) -> dict[str, Any]:
    steps = summary.steps.values()
    return {
        "name": run.name or run.id,
        "method": topics.line({"method": run.recipe["method"]}),
        "step_seconds": statistics.median(event["seconds"] for event in steps),
        "step_tokens": statistics.median(event["tokens"] for event in steps),
        "peak_bytes": peak_bytes(summary),
    }
