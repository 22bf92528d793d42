"""The first rows of a file or table as they are, for forms and completion. Cheap enough for a kernel."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune_magic.data import locate, read
from tune_magic.errors import DataError

_MOST_FILES = 200
_LARGEST_ARRAY_BYTES = 50_000_000  # a .json file is read whole even for its first row


@dataclass(frozen=True)
class Head:
    """The first rows of something.

    Attributes:
        columns: Names of the columns, in order.
        rows: The first rows, each value as it is.
    """

    columns: list[str]
    rows: list[dict[str, Any]]


def files_here() -> list[str]:
    """Return the files of rows in the working folder and in the folders in it, as relative paths."""
    here = Path.cwd()
    found = [path for pattern in ("*", "*/*") for path in here.glob(pattern) if read.kind_of(path) is not None]
    return sorted(str(path.relative_to(here)) for path in found if "tune_runs" not in path.parts)[:_MOST_FILES]


def head(source: Any, count: int = 5) -> Head | None:
    """Return the first rows of a file, a hub id that was fetched, a DataFrame or a list of dicts.

    Returns:
        None where there is nothing to see yet: no such file, or one that would have to be read whole.

    Raises:
        DataError: The file's beginning cannot be read.
    """
    if isinstance(source, str | Path):
        path = locate.data_path(str(source), Path())
        if not path.is_file() or (read.kind_of(path) == ".json" and path.stat().st_size > _LARGEST_ARRAY_BYTES):
            return None
        return _head_of([row.values for row in itertools.islice(read.read_rows(path), count)])
    if hasattr(source, "to_dict") and hasattr(source, "head"):
        rows = source.head(count).to_dict("records")
        return Head([str(name) for name in source.columns], rows)
    return _head_of([row for row in source[:count] if isinstance(row, dict)]) if isinstance(source, list) else None


def columns(source: Any) -> list[str]:
    """Return the names of the columns of the same; none where that cannot be told."""
    try:
        found = head(source)
    except DataError:
        return []
    return found.columns if found is not None else []


def _head_of(rows: list[dict[str, Any]]) -> Head:
    return Head(list(dict.fromkeys(str(name) for row in rows for name in row)), rows)
