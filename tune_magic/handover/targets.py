"""For which programs a recipe can be written, and what writes it."""

from __future__ import annotations

import importlib

from tune_magic.commands import nearest
from tune_magic.errors import TuneError
from tune_magic.handover.source import Source
from tune_magic.storage.folder import RunFolder

TARGETS = {  # each module has `write(source) -> str`, and `beside(text)` where its file needs others beside it
    "yaml": "tune_magic.handover.recipe_file",
    "script": "tune_magic.handover.script",
    "trl": "tune_magic.handover.trl",
    "axolotl": "tune_magic.handover.axolotl",
    "llama-factory": "tune_magic.handover.llama_factory",
    "olive": "tune_magic.handover.olive",
}


def write(run: RunFolder, target: str) -> str:
    """Return the recipe of a run for another program.

    Raises:
        TuneError: There is no such program, the run was made by no recipe, or that program cannot do what it says.
    """
    if target not in TARGETS:
        advice = nearest(target, TARGETS).strip()
        raise TuneError(
            f"Recipes are not written for {target!r}.",
            hint=f"{advice} There are: python, {', '.join(TARGETS)}.".strip(),
        )
    if run.kind != "finetune":
        raise TuneError(f"{run.name or run.id} was not trained by a recipe: it is a {run.kind}.",
                        hint="`%tune export-code` without --for gives the call that makes it again.")  # fmt: skip
    text: str = importlib.import_module(TARGETS[target]).write(Source(run))
    return text


def beside(text: str, target: str) -> dict[str, str]:
    """Return the files that must lie beside what `write` returned, by name; none for most programs."""
    from tune_magic.handover import llama_factory

    return llama_factory.beside(text) if target == "llama-factory" else {}
