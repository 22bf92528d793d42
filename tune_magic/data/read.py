"""Read rows from files, each with the place it came from.

We read JSON ourselves: `datasets` and pandas report a bad line without file and line, and turn mixed types and missing
fields silently into something else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune_magic.errors import DataError

SUFFIXES = (".jsonl", ".json", ".parquet")
_SHOWN_FAULTS = 5
_SHOWN_CHARACTERS = 100


@dataclass(frozen=True, slots=True)
class Row:
    """One row and where it stands: ``line 7`` of a JSONL file, ``row 7`` elsewhere, both counted from 1."""

    values: dict[str, Any]
    place: str


class RowFaults:
    """Collects bad rows, so that the user reads of all of them at once.

    Args:
        source: Name of the file or object, as the user knows it.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._shown: list[str] = []
        self._count = 0

    def add(self, place: str, problem: str, text: Any = None) -> None:
        """Note a bad row; the first few are kept with their text."""
        self._count += 1
        if len(self._shown) < _SHOWN_FAULTS:
            excerpt = "" if text is None else f": `{_excerpt(text)}`"
            self._shown.append(f"{place}: {problem}{excerpt}")

    def raise_if_any(self, hint: str | None = None) -> None:
        """Raise one error that names the first rows and counts the rest."""
        if not self._count:
            return
        noun = "row" if self._count == 1 else "rows"
        more = self._count - len(self._shown)
        tail = [f"and {more} more."] if more else []
        raise DataError("\n  ".join([f"{self.source}: {self._count} bad {noun}.", *self._shown, *tail]), hint=hint)


def read_rows(path: Path) -> list[Row]:
    """Read every row of a .jsonl, .json or .parquet file.

    Raises:
        DataError: Naming file, line, column and the offending text.
    """
    try:
        there = path.exists()
    except OSError as error:
        raise DataError(f"{str(path)[:_SHOWN_CHARACTERS]}… is no path: {error.strerror}.") from None
    if not there:
        raise DataError(f"There is no file {path}.", hint=f"The working directory is {Path.cwd()}.")
    if path.is_dir():
        raise DataError(f"{path} is a folder.", hint=f"Name a file in it: {', '.join(SUFFIXES)}.")
    if path.suffix not in SUFFIXES:
        raise DataError(
            f"{path.name} is not a kind of file that can be read.", hint=f"There are: {', '.join(SUFFIXES)}."
        )
    try:
        if path.suffix == ".parquet":
            return _read_parquet(path)
        return list(_read_lines(path) if path.suffix == ".jsonl" else _read_array(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def _read_lines(path: Path) -> Iterator[Row]:
    faults = RowFaults(path.name)
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            place = f"line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                faults.add(place, f"byte {error.start + 1} is not UTF-8", raw[error.start : error.start + 20])
                continue
            if not line.strip():
                continue
            try:
                values = _decode(line)
            except json.JSONDecodeError as error:
                column = error.colno
                faults.add(f"{place}, column {column}", f"not JSON ({error.msg})", line[max(0, column - 30) :])
                continue
            except ValueError as error:
                faults.add(place, str(error), line)
                continue
            if isinstance(values, dict):
                yield Row(values, place)
            else:
                faults.add(place, "must be an object with named columns", line)
    faults.raise_if_any("Each line must be one JSON object.")


def _read_array(path: Path) -> Iterator[Row]:
    try:
        content = _decode(path.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        near = _excerpt(error.doc[max(0, error.pos - 30) : error.pos + 30])
        raise DataError(
            f"{path.name}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}): `{near}`.",
            hint="One object per line? Then call the file .jsonl.",
        ) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        near = _excerpt(error.object[max(0, error.start - 20) : error.start + 20])
        raise DataError(f"{path.name}, line {line}: byte {error.start + 1} is not UTF-8: `{near}`.") from None
    except ValueError as error:
        raise DataError(f"{path.name}: {error}.") from None
    if isinstance(content, dict):  # {"data": [...]}: one list under one name
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else None
    if not isinstance(content, list):
        raise DataError(f"{path.name} must be a list of objects.", hint='For example [{"prompt": "...", ...}, ...].')
    faults = RowFaults(path.name)
    for number, values in enumerate(content, start=1):
        if isinstance(values, dict):
            yield Row(values, f"row {number}")
        else:
            faults.add(f"row {number}", "must be an object with named columns", values)
    faults.raise_if_any()


def _decode(text: str) -> Any:
    """Decode JSON strictly.

    Raises:
        ValueError: Not JSON, nested too deep, a key that is there twice, or half a character.
    """
    try:
        content = json.loads(text, object_pairs_hook=_without_doubles)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if "\\ud" in text.lower():  # an escaped surrogate: only pairs of them make a character
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("holds half a character (a lone surrogate)") from None
    return content


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key `{next(name for name in names if names.count(name) > 1)}` is there twice")
    return content


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        content = pq.read_table(path).to_pylist()
    except pa.ArrowException as error:
        raise DataError(f"{path.name} is not a Parquet file: {error}.") from error
    return [Row({key: _without_nulls(value) for key, value in values.items()}, f"row {number}")
            for number, values in enumerate(content, start=1)]  # fmt: skip


def _without_nulls(value: Any) -> Any:
    """Arrow gives each struct of a list every key of all of them; drop the ones that were not there."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _excerpt(text: Any) -> str:
    flat = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return flat if len(flat) <= _SHOWN_CHARACTERS else flat[: _SHOWN_CHARACTERS - 1] + "…"
