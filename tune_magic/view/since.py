"""What changed in a cell since the run before, and whether the outcome got better."""

from __future__ import annotations

from typing import Any

from tune_magic.errors import TuneError
from tune_magic.recipe.build import build_recipe
from tune_magic.recipe.differences import differences
from tune_magic.storage.events import number
from tune_magic.storage.folder import RunFolder
from tune_magic.view import words
from tune_magic.view.html import clean

_MOST = 4
_LONGEST = 30


def previous_run(run: RunFolder) -> RunFolder | None:
    """Return the run that the same cell, or the same name, was before; None when there was none or it is gone."""
    name = run.info.get("previous")
    if not name or "/" in str(name):
        return None
    path = run.path.parent / str(name)
    return RunFolder(path) if (path / "run.json").is_file() else None


def changes(before: RunFolder, now: RunFolder) -> list[str]:
    """Return each change of the recipe, as ``key old → new``; data whose content is another counts as one."""
    try:
        recipes = [build_recipe(run.info["recipe"]).normalised() for run in (before, now)]
    except (TuneError, KeyError):  # a recipe of another version
        return []
    found = [f"{key} {_short(old)} → {_short(new)}" for key, (old, new) in differences(recipes).items()]
    prints: list[dict[str, Any]] = [run.summary().plan.get("fingerprints", {}) for run in (before, now)]
    if all(prints) and not any(line.startswith("data.train ") for line in found):
        found += ["other rows in data.train"] * (prints[0].get("train") != prints[1].get("train"))
    more = len(found) - _MOST
    return [*found[:_MOST], f"and {more} more"] if more > 0 else found


def since(run: RunFolder) -> str | None:
    """Say what changed since the run before and what came of it; None when nothing changed."""
    before = previous_run(run)
    if before is None:
        return None
    try:
        changed = changes(before, run)
    except TuneError:  # its run.json is damaged
        return None
    if not changed:
        return None
    text = f"since {before.id}: {', '.join(changed)}"
    then, now = before.summary().best, run.summary().best
    if then is None or now is None or run.is_live:
        return text
    old, new = number(then["loss"]), number(now["loss"])
    verdict = "better" if new < old else "worse" if new > old else "the same"
    return f"{text} · held-out loss {words.value(old)} → {words.value(new)}, {verdict}"


def _short(value: Any) -> str:
    text = "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return clean(text.rsplit("/", 1)[-1], _LONGEST)
