"""What models said of rows, kept in the user's cache by model, rows and what was asked: a base is asked once.

The oldest go when there are too many. Deleting the folder costs time, nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tune_magic import cell_code, files
from tune_magic.data.table import Table
from tune_magic.storage import fingerprint, places
from tune_magic.training.prepare import device
from tune_magic.training.tuned import Tuned

_DAYS = 30
_MOST_BYTES = 1_000_000_000
_SUFFIX = ".said"
_PACKAGE = Path(__file__).parent.parent


@contextlib.contextmanager
def folder(job: Path) -> Iterator[Path]:
    """Yield the folder for what is said: in the cache, or that of the job where the cache cannot be written."""
    cache = places.cache_folder() / "said"
    try:
        files.make_folder(cache)
        _prune(cache)
    except OSError:
        cache = job
    try:
        yield cache if os.access(cache, os.W_OK) else job
    finally:
        for path in job.glob(f"*{_SUFFIX}"):
            files.discard(path)


def path_of(folder: Path, facts: list[Any] | None, rows: Table, job: Path) -> Path:
    """Return the file for what a model says of rows, one line a row.

    Args:
        folder: As `folder` yields it.
        facts: What the model is and what it is asked; None: it cannot be told from another, so nothing is kept.
        rows: The rows, by its tokens.
        job: The job folder.
    """
    if facts is None:
        return _own(job)
    everything = [facts, _of_rows(rows), fingerprint.versions(), _sources()]
    return folder / f"{fingerprint.of_text(json.dumps(everything, sort_keys=True))}{_SUFFIX}"


def is_there(path: Path) -> bool:
    """Return whether all was said before, and note that it was wanted again."""
    with contextlib.suppress(OSError):
        files.touch(path)
        return True
    return False


def held(path: Path, job: Path) -> Path:
    """Return a name of a file that lasts as long as the job, whoever makes room in the cache."""
    own = _own(job)
    return own if path.parent != job and files.link(path, own) else path


def _own(job: Path) -> Path:
    return job / f"{len(list(job.glob(f'*{_SUFFIX}')))}{_SUFFIX}"


def _sources() -> dict[str, int]:
    """Return when our own files were changed: somebody may be working on them."""
    return {str(path.relative_to(_PACKAGE)): path.stat().st_mtime_ns for path in sorted(_PACKAGE.rglob("*.py"))}


def facts_of_base(tuned: Tuned) -> list[Any] | None:
    """Return what the base of a tuned model is; None where a plug-in without a version is part of it."""
    if not (_is_known(tuned.objective) and _is_known(tuned.method)):
        return None
    recipe, plan = tuned.recipe, tuned.run.summary().plan
    own_start = [recipe.method.model_dump(mode="json"), recipe.seed]
    starts_its_own_way = tuned.objective.new_head or not tuned.method.adds or tuned.is_quantized
    return [
        plan["fingerprints"]["model"],
        recipe.quantization.model_dump(mode="json"),
        type(tuned.objective).__qualname__,
        tuned.objective.facts(),
        recipe.objective.model_dump(mode="json") if recipe.objective else None,
        cell_code.prints(recipe),
        own_start if starts_its_own_way else None,
        tuned.method.num_virtual_tokens,  # places that answers have not
        device().type,
    ]


def facts_of_tuned(tuned: Tuned) -> list[Any] | None:
    """Return what a tuned model is; None where a plug-in without a version is part of it."""
    base = facts_of_base(tuned)
    if base is None:
        return None
    return [
        *base,
        tuned.recipe.method.model_dump(mode="json"),
        tuned.compression.facts["print"] if tuned.compression else None,
        tuned.print,
    ]


def _is_known(plugin: Any) -> bool:
    """Return whether a plug-in has a version: it is ours, or a cell's, whose hash is known."""
    module = type(plugin).__module__
    return module.startswith("tune_magic.") or module == "__main__"


def _of_rows(rows: Table) -> str:
    """Return the SHA-256 of all that models and metrics see of rows."""
    found = hashlib.sha256()
    for row in rows:
        for segment in (row.trunk, *row.branches):
            found.update(segment.tokens.tobytes() + segment.weights.tobytes())
        found.update(json.dumps([row.answer_start, row.question, row.reference, row.label]).encode())
        for content in (row.targets, row.media):
            found.update(b"" if content is None else bytes(content))
    return found.hexdigest()


def _prune(cache: Path) -> None:
    """Let go of what was not wanted for long, and of the oldest where there is too much."""
    size = 0
    for path in sorted(cache.glob(f"*{_SUFFIX}"), key=lambda path: -path.stat().st_mtime):
        about = path.stat()
        size += about.st_size
        if size > _MOST_BYTES or time.time() - about.st_mtime > _DAYS * 86_400:
            files.discard(path)
