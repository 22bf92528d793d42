"""Encoded rows, kept in the user's cache by all they depend on: the second start with the same data need not encode them.

Only sources that take a while are kept, and the oldest go when there are too many. Deleting the folder costs time, nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from tune_magic import files
from tune_magic.data import content, locate
from tune_magic.data.render import Renderer
from tune_magic.data.table import Table, TableWriter, table_of_files
from tune_magic.recipe.schema import DataOptions, SourceOptions
from tune_magic.storage import fingerprint, places

_LEAST_BYTES = 4_000_000  # of tokens; fewer are encoded in a moment
_LEAST_FILE_BYTES = 1_000_000  # a packed file holds some times as many; naming what is kept takes a tenth of a second
_MOST_BYTES = 20_000_000_000  # of all that is kept
_MOST_CHARACTERS = 20_000  # of a row that is kept as text, for people to look at
_PACKAGE = Path(__file__).parent.parent
_ABOUT = "about.json"
_GROUPS = "groups"


def folder() -> Path:
    """Return where encoded rows are kept."""
    return places.cache_folder() / "tokens"


def key(
    reference: str, options: SourceOptions, *, data: DataOptions, job: Path, renderer: Renderer, objective: Any
) -> str | None:
    """Return the name of what is kept for a source, by all it depends on; None for code that has no version.

    Args:
        reference: The source.
        options: The recipe's word on it.
        data: Its word on all sources.
        job: The job folder, which holds tables given as objects.
        renderer: What encodes it.
        objective: What is minimised, with what it learned of the rows.
    """
    path = locate.ensure(reference, job)
    is_small = path.is_file() and path.stat().st_size < _LEAST_FILE_BYTES
    if is_small or not path.is_file() or not type(objective).__module__.startswith("tune_magic."):
        return None
    facts = {
        "rows": [fingerprint.of_file(path), str(locate.parse(reference)[1])],
        "options": options.model_dump(mode="json", include=set(SourceOptions.model_fields)),
        "data": [data.on_bad_rows, sorted(data.clean), data.group_by if options is data else None],
        "objective": [type(objective).__qualname__, objective.facts()],
        "renderer": [_tokenizer_print(renderer), renderer.uses_template, renderer.max_length],
        "versions": fingerprint.versions(),
        "sources": {
            str(source.relative_to(_PACKAGE)): source.stat().st_mtime_ns
            for part in ("data", "objectives")
            for source in sorted((_PACKAGE / part).rglob("*.py"))
        },
    }
    return fingerprint.of_text(json.dumps(facts, sort_keys=True))


def _tokenizer_print(renderer: Renderer) -> str:
    tokenizer = renderer.tokenizer
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    return hashlib.sha256(f"{backend}{tokenizer.chat_template}{tokenizer.special_tokens_map}".encode()).hexdigest()


def load(name: str | None, offset: int) -> tuple[Table, dict[str, Any]] | None:
    """Return the table that was kept under a name and what was known of it; None where there is none.

    Args:
        name: As `key` gives it.
        offset: Added to the rows' numbers.
    """
    if name is None:
        return None
    path = folder() / name
    try:
        about = json.loads((path / _ABOUT).read_text(encoding="utf-8"))
        table = table_of_files(path, offset)
        groups = np.fromfile(path / _GROUPS, dtype="<i8") if about.pop("has_groups") else None
        if len(table) != about.pop("count"):
            return None
        about["head"] = [_read(row) for row in about["head"]]
        about["recognised"] = tuple(about["recognised"])
        about["skipped"] = ([tuple(fault) for fault in about["skipped"][0]], about["skipped"][1])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it is encoded again
    with contextlib.suppress(OSError):
        files.touch(path / _ABOUT)  # the oldest go first
    return table, {**about, "groups": groups}


def save(name: str | None, writer: TableWriter, about: dict[str, Any]) -> None:
    """Keep a source under a name, if it took a while to encode; a full disk keeps nothing."""
    if name is None or writer.num_bytes < _LEAST_BYTES or (folder() / name).exists():
        return
    groups = about["groups"]
    known = {
        **about, "groups": None, "has_groups": groups is not None, "count": writer.count,
        "head": [_written(row) for row in about["head"]],
    }  # fmt: skip
    with contextlib.suppress(OSError):
        files.make_folder(folder())
        files.ensure_room(folder(), 4 * writer.num_bytes)
        with files.new_folder(folder() / name) as target:
            writer.copy_to(target)
            if groups is not None:
                files.write_bytes(target / _GROUPS, groups.astype("<i8").tobytes(), durable=False)
            files.write_json(target / _ABOUT, known, durable=False)
        _drop_oldest()


def _drop_oldest() -> None:
    """Remove what was not used for longest, until the rest is few enough."""
    found = [(path, (path / _ABOUT).stat().st_mtime) for path in folder().iterdir() if (path / _ABOUT).is_file()]
    total = 0
    for path, _ in sorted(found, key=lambda pair: -pair[1]):
        total += sum(member.stat().st_size for member in path.iterdir())
        if total > _MOST_BYTES:
            files.discard(path)


def _written(row: content.Content | None) -> dict[str, Any] | None:
    """Return a row's normal form, JSON-ready; None for what is long."""
    if row is None or isinstance(row, content.Media) or sum(map(len, content.texts(row))) > _MOST_CHARACTERS:
        return None
    return content.to_plain(row)


def _read(row: dict[str, Any] | None) -> content.Content | None:
    return None if row is None else content.from_plain(row)
