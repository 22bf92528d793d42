"""Read rows from files, each with the place it came from.

We read JSON and CSV ourselves: `datasets` and pandas report a bad line without file and line, and turn mixed types,
missing fields and words such as "NA" silently into something else.
"""

from __future__ import annotations

import contextlib
import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune_magic.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}  # spreadsheets in Europe write semicolons
_HEAD_CHARACTERS = 1 << 16  # in which the names of columns stand
_BATCH_ROWS = 4096
_SHOWN_FAULTS = 5
_SHOWN_CHARACTERS = 100


@dataclass(frozen=True, slots=True)
class Row:
    """One row and where it stands: ``line 7`` of a JSONL or CSV file, ``row 7`` elsewhere, both counted from 1."""

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
        self._hint: str | None = None

    def __len__(self) -> int:
        return self._count

    def add(self, place: str, problem: str, text: Any = None, *, hint: str | None = None) -> None:
        """Note a bad row; the first few are kept with their text, and the last hint."""
        self._count += 1
        self._hint = hint or self._hint
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
        lines = [f"{self.source}: {self._count} bad {noun}.", *self._shown, *tail]
        raise DataError("\n  ".join(lines), hint=hint or self._hint)


def read_rows(path: Path) -> Iterator[Row]:
    """Yield every row of a file of one of the kinds in `SUFFIXES`; of a JSON array alone, all of them are held at once.

    Raises:
        DataError: Naming file, line, column and the offending text; where rows are bad, after the last one.
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
    readers = {".jsonl": _read_lines, ".json": _read_array, ".csv": _read_table, ".tsv": _read_table}
    try:
        yield from readers.get(path.suffix, _read_parquet)(path)
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
        content = _decode(_text(path))
    except json.JSONDecodeError as error:
        near = _excerpt(error.doc[max(0, error.pos - 30) : error.pos + 30])
        raise DataError(
            f"{path.name}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}): `{near}`.",
            hint="One object per line? Then call the file .jsonl.",
        ) from None
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


def _text(path: Path) -> str:
    """Return the whole of a file, which is UTF-8 with or without a byte order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        near = _excerpt(error.object[max(0, error.start - 20) : error.start + 20])
        raise DataError(f"{path.name}, line {line}: byte {error.start + 1} is not UTF-8: `{near}`.") from None


def _decode(text: str) -> Any:
    """Decode JSON strictly.

    Raises:
        ValueError: Not JSON, nested too deep, a key that is there twice, or half a character.
    """
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or text.count(":") > len(content):  # fewer colons than pairs: none is doubled
            content = _STRICT.decode(text)
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


_STRICT = json.JSONDecoder(object_pairs_hook=_without_doubles)


def _read_table(path: Path) -> Iterator[Row]:
    """Yield a table's rows of texts: its first line names the columns, and an empty cell is a value that is missing."""
    quotes, widths = RowFaults(path.name), RowFaults(path.name)
    try:
        with _cells_of_any_size(), path.open(encoding="utf-8-sig", newline="") as stream:
            # newline="": line breaks inside quotes stay as they are
            delimiter = "\t" if path.suffix == ".tsv" else _delimiter(stream.read(_HEAD_CHARACTERS))
            stream.seek(0)
            records = _records(stream, delimiter, quotes)
            head = next(records, None)
            quotes_hint = 'A quote in a quoted cell is written twice: "He said ""yes""".'
            if head is None:
                quotes.raise_if_any(quotes_hint)
                raise DataError(f"{path.name} is empty.", hint="Its first line must name the columns.")
            names = _column_names(path.name, *head)
            is_bare = True
            for place, cells in records:
                is_bare = False
                if len(cells) == len(names):
                    yield Row({name: cell for name, cell in zip(names, cells, strict=True) if cell}, place)
                else:
                    count = f"{_counted(len(cells), 'cell')} for {_counted(len(names), 'column')}"
                    widths.add(place, count, delimiter.join(cells))
    except UnicodeDecodeError:
        _text(path)  # raises, with the line
        raise
    quotes.raise_if_any(quotes_hint)
    if is_bare:
        raise DataError(f"{path.name} has no rows, only the names of columns: `{_excerpt(', '.join(names))}`.")
    widths.raise_if_any(f"Cells are separated by {_DELIMITERS[delimiter]}; a cell with one in it stands in quotes.")


def _delimiter(text: str) -> str:
    """Return what separates the columns: that which the first line has most of, outside quotes."""
    first = re.match(r'\s*(?:"[^"]*"?|[^"\r\n]+)*', text)
    assert first is not None
    return max(_DELIMITERS, key=re.sub(r'"[^"]*"?', "", first[0]).count)


def _records(lines: Iterable[str], delimiter: str, faults: RowFaults) -> Iterator[tuple[str, list[str]]]:
    """Yield each record with the line it begins on, which is not its last where a cell holds line breaks."""
    own: list[str] = []  # lines of the record at hand

    def noted() -> Iterator[str]:
        for line in lines:
            own.append(line)
            yield line

    reader = csv.reader(noted(), delimiter=delimiter, strict=True)
    while True:
        first = reader.line_num
        own.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = "a quote is not closed" if "end of data" in str(error) else "text after a closing quote"
            faults.add(f"line {first + 1}", problem, own[0])
            continue
        if len(cells) > 1 or any(cell.strip() for cell in cells):
            yield f"line {first + 1}", cells


def _column_names(source: str, place: str, cells: Sequence[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    for number, name in enumerate(names, start=1):
        if not name:
            raise DataError(
                f"{source}, {place}: column {number} has no name: `{_excerpt(', '.join(cells))}`.",
                hint="If pandas wrote it: `to_csv(..., index=False)`.",
            )
        if name in names[: number - 1]:
            raise DataError(f"{source}, {place}: the column `{_excerpt(name)}` is there twice.")
    return names


@contextlib.contextmanager
def _cells_of_any_size() -> Iterator[None]:
    """While inside, csv takes cells of more than its 128 KiB, a limit that the whole process shares."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as content:
            for batch in content.iter_batches(_BATCH_ROWS):
                for number, values in enumerate(batch.to_pylist(), start=number + 1):  # noqa: B020 - goes on counting
                    yield Row({key: _without_nulls(value) for key, value in values.items()}, f"row {number}")
    except pa.ArrowException as error:
        raise DataError(f"{path.name} is not a Parquet file: {error}.") from error


def _without_nulls(value: Any) -> Any:
    """Arrow gives each struct of a list every key of all of them; drop the ones that were not there."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _excerpt(text: Any) -> str:
    flat = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return flat if len(flat) <= _SHOWN_CHARACTERS else flat[: _SHOWN_CHARACTERS - 1] + "…"
