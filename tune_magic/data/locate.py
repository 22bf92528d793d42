"""Where a recipe's rows are, and the fingerprints of what it reads. No torch in here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tune_magic.data import hub
from tune_magic.errors import DataError
from tune_magic.recipe.schema import Recipe
from tune_magic.storage import fingerprint


def references(recipe: Recipe) -> dict[str, str]:
    """Return the files, ``$names`` and hub ids a run trains and chooses on, by role."""
    roles = {"train": recipe.data.train, "held_out": recipe.data.held_out}
    return {role: reference for role, reference in roles.items() if isinstance(reference, str)}


def data_path(reference: str, folder: Path) -> Path:
    """Return the file behind a path, a ``$name`` (under the job's inputs) or a hub id (in the cache, once fetched)."""
    if hub.is_hub(reference):
        return hub.cached_path(reference)
    if not reference.startswith("$"):
        return Path(reference).expanduser()
    found = sorted((folder / "inputs").glob(f"{reference[1:]}.*"))
    if not found:
        raise DataError(f"The run has no table `{reference}`.")
    return found[0]


def ensure(reference: str, folder: Path) -> Path:
    """Return the file behind a reference, fetched from the hub if need be: for workers, never for a kernel."""
    return hub.fetch(reference) if hub.is_hub(reference) else data_path(reference, folder)


def source_name(reference: str) -> str:
    """Return what messages call a source: a file by its name, all else as the user wrote it."""
    return reference if reference.startswith("$") or hub.is_hub(reference) else Path(reference).name


def identity(recipe: Recipe, prints: dict[str, str]) -> str:
    """Return the identity of a run: what is trained, on what.

    A table given as an object counts by its content alone, whatever the variable was called.
    """
    content = recipe.normalised()
    for role, reference in references(recipe).items():
        if reference.startswith("$"):
            content["data"][role] = f"${role}"
    return fingerprint.identity(content, prints)


def fingerprints(recipe: Recipe, model: Path, locate: Callable[[str], Path]) -> dict[str, str]:
    """Return the SHA-256 of each file the result depends on, by role.

    Args:
        recipe: Names the files.
        model: The model's folder or file.
        locate: From a reference to its file.
    """
    found = {role: fingerprint.of_file(locate(reference)) for role, reference in references(recipe).items()}
    return found | {"model": fingerprint.of_model(model)}
