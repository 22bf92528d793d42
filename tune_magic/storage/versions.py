"""The registry: names for models, whose versions are runs or exports of them, each at a stage.

models/NAME/3/version.json   which run, written once; its folder's number is the version's, and is never given again
models/NAME/changes/         what people said of a version later: one file each, folded in order of time

It lies in the folder of runs. A version's folder is made by exactly one process, and what is said is only added, so two
processes that register or promote at once lose nothing and need no lock.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tune_magic import files
from tune_magic.commands import STAGES, nearest
from tune_magic.errors import TuneError

FORMAT = 1
FOLDER = "models"
_NAME = re.compile(r"\w[\w.-]{0,79}")


@dataclass(frozen=True)
class Version:
    """A version of a named model.

    Attributes:
        name: Of the model.
        number: From 1.
        run: Id of its run.
        path: The run's folder, which may be gone.
        root: The folder of runs that the registry lies in.
        created: When it was registered, in seconds since the epoch.
        stage: candidate, staging, production or archived.
        note: What somebody wrote of it, if anything.
        export: Id of the export that is meant; None: the run itself.
        metrics: The run's scores when it was registered.
        lineage: What it was made of when it was registered, in words.
        history: Each stage it came to, with the time.
    """

    name: str
    number: int
    run: str
    path: Path
    root: Path
    created: float
    stage: str = "candidate"
    note: str | None = None
    export: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    lineage: tuple[str, ...] = ()
    history: tuple[tuple[str, float], ...] = ()

    @property
    def reference(self) -> str:
        """As it is typed: ``support-bot@3``."""
        return f"{self.name}@{self.number}"

    @property
    def is_there(self) -> bool:
        """Whether its run still is."""
        return (self.path / "run.json").is_file()


def check_name(name: str) -> None:
    """Refuse what no model can be called.

    Raises:
        TuneError: It is not a word of letters, digits, dots, dashes and underscores.
    """
    if not _NAME.fullmatch(name):
        raise TuneError(
            f"{name[:40]!r} cannot be a model's name.", hint="Letters, digits, `-`, `_` and dots: `support-bot`."
        )


def names(roots: Iterable[Path]) -> list[str]:
    """Return the names of all registered models, sorted."""
    found = {path.parent.parent.name for root in roots for path in (root / FOLDER).glob("*/*/version.json")}
    return sorted(found)


def home(name: str, roots: Iterable[Path]) -> Path | None:
    """Return the folder of runs that a model is registered in, the first of several."""
    return next((root for root in roots if _NAME.fullmatch(name) and _numbers(root / FOLDER / name)), None)


def add(root: Path, name: str, **content: Any) -> Version:
    """Register the next version of a model and return it; two processes at once get two numbers.

    Args:
        root: The folder of runs.
        name: Of the model.
        **content: run, path, export, metrics, lineage.

    Raises:
        TuneError: See `check_name`.
    """
    check_name(name)
    folder = root / FOLDER / name
    files.make_folder(folder / "changes")
    number = max(_numbers(folder), default=0) + 1
    while not files.claim(folder / str(number)):
        number += 1
    head = {"format": FORMAT, "name": name, "number": number, "created": round(time.time(), 3)}
    files.write_json(folder / str(number) / "version.json", head | content)
    return _read(root, name, number)


def change(version: Version, **content: str | None) -> Version:
    """Say something of a version, its stage or a note, and return it as it is then.

    Raises:
        TuneError: There is no such stage.
    """
    stage = content.get("stage")
    if stage is not None and stage not in STAGES:
        raise TuneError(f"There is no stage {stage!r}.{nearest(stage, STAGES)}", hint=f"Stages: {', '.join(STAGES)}.")
    said = {"version": version.number, "t": round(time.time(), 3), **content}
    target = version.root / FOLDER / version.name / "changes" / f"{time.time_ns()}-{secrets.token_hex(2)}.json"
    files.write_json(target, said)
    return next(one for one in of(version.name, [version.root]) if one.number == version.number)


def of(name: str, roots: Iterable[Path]) -> list[Version]:
    """Return the versions of a model, the newest first; none where there is no such model.

    Of several at production the last to come is there, and those before it are archived.
    """
    root = home(name, roots)
    if root is None:
        return []
    folder = root / FOLDER / name
    found = {
        number: _read(root, name, number)
        for number in _numbers(folder)
        if (folder / str(number) / "version.json").is_file()
    }
    for path in sorted((folder / "changes").glob("[0-9]*.json"), key=_order):
        said = json.loads(path.read_text(encoding="utf-8"))
        if said["version"] in found:
            _fold(found, said)
    return [found[number] for number in sorted(found, reverse=True)]


def pick(reference: str, roots: Sequence[Path]) -> Version:
    """Return the version that ``NAME@3``, ``NAME@production``, ``NAME@latest`` or a bare name means.

    A bare name is the version at production, else the newest.

    Raises:
        TuneError: There is none, with what there is.
    """
    name, _, which = reference.partition("@")
    found = of(name, roots)
    if not found:
        known = names(roots)
        raise TuneError(f"There is no model `{name}`.{nearest(name, known)}",
                        hint=f"Registered: {', '.join(known) or 'none yet; `%tune register RUN --as NAME` does it'}.")  # fmt: skip
    if which == "":
        return next((one for one in found if one.stage == "production"), found[0])
    chosen = [one for one in found if which in (str(one.number), one.stage, "latest")]
    if not chosen:
        there = ", ".join(f"{one.reference} ({one.stage})" for one in found[:5])
        raise TuneError(f"There is no `{reference}`.", hint=f"There are: {there}.")
    return chosen[0]


def run_of(version: Version) -> Path:
    """Return the folder of a version's run.

    Raises:
        TuneError: It is gone.
    """
    if not version.is_there:
        raise TuneError(f"{version.reference} is the run {version.run}, which is not there any more.",
                        hint="Was its folder moved or deleted?")  # fmt: skip
    return version.path


def registered_as(run: Path) -> list[Version]:
    """Return the versions that are a run, wherever it lies."""
    from tune_magic.storage import places

    roots = list(dict.fromkeys([*places.roots(), run.parent]))
    return [one for name in names(roots) for one in of(name, roots) if one.run == run.name]


def _numbers(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.glob("[1-9]*") if path.name.isdigit()] if folder.is_dir() else []


def _order(path: Path) -> tuple[int, str]:
    return int(path.name.partition("-")[0]), path.name


def _read(root: Path, name: str, number: int) -> Version:
    content = json.loads((root / FOLDER / name / str(number) / "version.json").read_text(encoding="utf-8"))
    if content["format"] > FORMAT:
        raise TuneError(f"{name}@{number} was registered by a newer tune_magic.", hint="pip install -U tune-magic")
    own = root / content["run"]
    path = own if own.is_dir() else Path(content.get("path") or own)
    return Version(
        name, number, content["run"], path, root, content["created"], export=content.get("export"),
        metrics=content.get("metrics") or {}, lineage=tuple(content.get("lineage") or ()), history=(("candidate", content["created"]),),
    )  # fmt: skip


def _fold(found: dict[int, Version], said: dict[str, Any]) -> None:
    """Take one more thing that was said."""
    version, stage, when = found[said["version"]], said.get("stage"), said["t"]
    if stage == "production":
        for number, other in found.items():
            if other.stage == "production" and number != version.number:
                found[number] = replace(other, stage="archived", history=(*other.history, ("archived", when)))
    if stage is not None:
        version = replace(version, stage=stage, history=(*version.history, (stage, when)))
    if "note" in said:
        version = replace(version, note=said["note"])
    found[version.number] = version
