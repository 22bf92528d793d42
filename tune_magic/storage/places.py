"""Where runs are: the folder beside the notebook, and a per-user list of roots.

The list is a hint that can be deleted at any time; starting a run adds its root again.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import platformdirs

from tune_magic import files
from tune_magic.errors import TuneError
from tune_magic.storage import versions
from tune_magic.storage.folder import RunFolder

RUNS = "tune_runs"


def default_root(notebook: str | None = None) -> Path:
    """Folder for new runs: beside the notebook when its path is known, else in the working directory."""
    beside = Path(notebook).parent if notebook else None
    return (beside if beside is not None and beside.is_dir() else Path.cwd()) / RUNS


def remember_root(root: Path) -> None:
    """Add `root` to the per-user list, dropping roots that are gone."""
    root = root.resolve()
    known = _listed_roots()
    if root in known:
        return
    path = _roots_file()
    with contextlib.suppress(OSError):  # a read-only home costs the list, not the run
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, [str(p) for p in [*known, root] if p.is_dir()], durable=False)


def roots(*, near: Path | None = None) -> list[Path]:
    """Every root known here, the nearest first."""
    first = [near or default_root()]
    return [root for root in dict.fromkeys([p.resolve() for p in first] + _listed_roots()) if root.is_dir()]


def folders(where: Iterable[Path] | None = None) -> Iterator[Path]:
    """Yield the run folders under the given roots, newest first within each root."""
    for root in where if where is not None else roots():
        with contextlib.suppress(OSError):
            for path in sorted(root.iterdir(), reverse=True):
                if not path.name.startswith(".") and (path / "run.json").is_file():
                    yield path


def find(reference: str, where: Iterable[Path] | None = None) -> Path:
    """Return the folder of a run given by id, beginning of an id, name, or path; the newest when several fit.

    A registered model is named as ``support-bot@3`` or ``support-bot@production``, or, where no run is called so, by its name.

    Raises:
        TuneError: Nothing fits; names near `reference` are listed.
    """
    if "/" in reference or reference in (".", ".."):
        path = Path(reference).expanduser()
        if (path / "run.json").is_file():
            return path.resolve()
        raise TuneError(f"{reference} is not a run folder.")
    registries = list(where) if where is not None else roots()
    if "@" in reference and versions.home(reference.partition("@")[0], registries):
        return versions.run_of(versions.pick(reference, registries))
    known: list[str] = []
    for path in folders(None if where is None else registries):
        with contextlib.suppress(TuneError):
            name = RunFolder(path).name
            if reference in (path.name, name) or (len(reference) >= 8 and path.name.startswith(reference)):
                return path
            known.append(name or path.name)
    if versions.home(reference, registries):
        return versions.run_of(versions.pick(reference, registries))
    known += versions.names(registries)
    near = difflib.get_close_matches(reference, dict.fromkeys(known), n=3)
    hint = f"Did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else "`%tune runs` lists what there is."
    raise TuneError(f"There is no run `{reference}`.", hint=hint)


@functools.cache
def data_folder() -> Path:
    """Per-user folder for lists that can be rebuilt."""
    return Path(platformdirs.user_data_dir("tune_magic", appauthor=False))


@functools.cache
def cache_folder() -> Path:
    """Per-user folder for what can be computed again, such as converted models."""
    return Path(platformdirs.user_cache_dir("tune_magic", appauthor=False))


def _roots_file() -> Path:
    return data_folder() / "roots.json"


def _listed_roots() -> list[Path]:
    try:
        return [Path(p) for p in json.loads(_roots_file().read_text(encoding="utf-8"))]
    except (OSError, ValueError):
        return []
