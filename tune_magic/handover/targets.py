"""For which programs a recipe can be written, and what writes it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field

from tune_magic.commands import nearest
from tune_magic.errors import TuneError
from tune_magic.handover.source import Source
from tune_magic.storage.folder import RunFolder


@dataclass(frozen=True)
class Written:
    """A recipe in another program's words.

    Attributes:
        text: Content of its file.
        suffix: What its name ends with.
        beside: Files that must lie beside it, by name.
    """

    text: str
    suffix: str
    beside: dict[str, str] = field(default_factory=dict)


TARGETS = {  # each module has `write(source) -> str` and `SUFFIX`
    "yaml": "tune_magic.handover.recipe_file",
    "script": "tune_magic.handover.script",
    "trl": "tune_magic.handover.trl",
}


def write(run: RunFolder, target: str) -> Written:
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
    converter = importlib.import_module(TARGETS[target])
    return Written(converter.write(Source(run)), converter.SUFFIX)
