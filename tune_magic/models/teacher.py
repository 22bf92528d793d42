"""Find who is learned from: a model, a run, or an address. No torch in here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tune_magic.errors import ModelError, TuneError
from tune_magic.models.find import find_model
from tune_magic.recipe.schema import Recipe
from tune_magic.storage import fingerprint, places
from tune_magic.storage.folder import RunFolder

_RUN = "run:"


@dataclass(frozen=True)
class Teacher:
    """Who is learned from.

    Attributes:
        name: As the recipe has it.
        kind: What it is.
        path: The model's folder or file, or the run's folder; None for an address, and for a model still on the hub.
    """

    name: str
    kind: Literal["model", "run", "address"]
    path: Path | None = None

    @property
    def run(self) -> RunFolder:
        """The run that it is."""
        assert self.path is not None
        return RunFolder(self.path)

    def fingerprint(self, path: Path | None = None) -> str | None:
        """Return the SHA-256 of what it answers by; None for an address, whose answers are kept instead.

        Args:
            path: Where the model is by now.

        Raises:
            TuneError: The run has no checkpoint.
        """
        where = path or self.path
        if self.kind == "address" or where is None:
            return None
        if self.kind == "model":
            return fingerprint.of_model(where)
        run = self.run
        manifest = json.loads((run.best_checkpoint / "manifest.json").read_text(encoding="utf-8"))
        facts = [run.info["recipe"], run.summary().plan["fingerprints"], manifest["files"]["trainable.safetensors"]]
        return fingerprint.of_text(json.dumps(facts, sort_keys=True))


def is_address(name: str) -> bool:
    """Return whether a teacher is asked over the network."""
    return name.startswith(("http://", "https://"))


def find_teacher(recipe: Recipe, root: Path | None = None) -> Teacher | None:
    """Return the teacher of a recipe's objective, without loading it; None where it has none.

    Args:
        recipe: Names it.
        root: A folder of runs to look in first.

    Raises:
        TuneError: There is no such run or model.
    """
    name = getattr(recipe.objective, "teacher", None)
    if not isinstance(name, str):
        return None
    if is_address(name):
        return Teacher(name, "address")
    if name.startswith(_RUN):
        return Teacher(name, "run", _run(name.removeprefix(_RUN), root))
    if (Path(name).expanduser() / "run.json").is_file():
        return Teacher(name, "run", Path(name).expanduser().resolve())
    try:
        return Teacher(name, "model", find_model(name).path)
    except ModelError as unknown:
        try:
            return Teacher(name, "run", _run(name, root))
        except TuneError:
            raise unknown from None


def teacher_prints(teacher: Teacher | None, path: Path | None = None) -> dict[str, str]:
    """Return the teacher's fingerprint by its role, as `data.locate.fingerprints` has those of files."""
    print_ = None if teacher is None else teacher.fingerprint(path)
    return {} if print_ is None else {"teacher": print_}


def _run(reference: str, root: Path | None) -> Path:
    return places.find(reference, [*([root] if root is not None and root.is_dir() else []), *places.roots()])
