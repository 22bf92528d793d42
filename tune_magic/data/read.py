"""Read rows from files, each with the place it came from.

We read JSON and CSV ourselves: `datasets` and pandas report a bad line without file and line, and turn mixed types,
missing fields and words such as "NA" silently into something else.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tune_magic.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".feather")
_COMPRESSED = ".gz"
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}  # spreadsheets in Europe write semicolons
_HEAD_CHARACTERS = 1 << 16  # in which the names of columns stand
_BATCH_ROWS = 4096
_SHOWN_FAULTS = 5
_LISTED_FAULTS = 200
_SHOWN_CHARACTERS = 100


@dataclass(frozen=True, slots=True)
class Row:
    """One row and where it stands: ``line 7`` of a JSONL or CSV file, ``row 7`` elsewhere, both counted from 1."""

    values: dict[str, Any]
    place: str


class RowFaults:
    """Collects bad rows of a source, so that the user reads of all of them at once.

    Args:
        source: Name of the file or object, as the user knows it.
        skips: Bad rows are left out and listed; otherwise they are an error.

    Attributes:
        listed: Place and problem of the first bad rows.
    """

    def __init__(self, source: str, *, skips: bool = False) -> None:
        self.source = source
        self.skips = skips
        self.listed: list[tuple[str, str]] = []
        self._shown: list[str] = []
        self._count = 0
        self._hint: str | None = None

    def __len__(self) -> int:
        return self._count

    @property
    def is_error(self) -> bool:
        """Whether there is a bad row, and bad rows are an error."""
        return bool(self._count) and not self.skips

    def add(self, place: str, problem: str, text: Any = None, *, hint: str | None = None) -> None:
        """Note a bad row; the first few are kept with their text, and the last hint."""
        self._count += 1
        self._hint = hint or self._hint
        if len(self.listed) < _LISTED_FAULTS:
            self.listed.append((place, problem))
        if len(self._shown) < _SHOWN_FAULTS:
            excerpt = "" if text is None else f": `{_excerpt(text)}`"
            self._shown.append(f"{place}: {problem}{excerpt}")

    def raise_if_any(self, *, whole: bool = False) -> None:
        """Raise one error that names the first rows and counts the rest, unless they are to be skipped.

        Args:
            whole: They are too many to be skipped.
        """
        if not self.is_error and not (whole and self._count):
            return
        noun = "row" if self._count == 1 else "rows"
        more = self._count - len(self._shown)
        tail = [f"and {more} more."] if more else []
        kind = f"{self._count} bad {noun}" + (", too many to skip" if whole and self.skips else "")
        raise DataError("\n  ".join([f"{self.source}: {kind}.", *self._shown, *tail]), hint=self._hint)


def kind_of(path: Path) -> str | None:
    """Return the suffix of `SUFFIXES` that says how a file is read, whether it is compressed or not; None: not at all.

    Example:
        >>> kind_of(Path("rows.JSONL.gz"))
        '.jsonl'
    """
    name = path.name.lower().removesuffix(_COMPRESSED)
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def read_rows(path: Path, faults: RowFaults | None = None) -> Iterator[Row]:
    """Yield every row of a file of one of the kinds in `SUFFIXES`; of a JSON array alone, all of them are held at once.

    Args:
        path: The file; text kinds may be compressed, as in ``rows.jsonl.gz``.
        faults: Takes bad rows. None: they are an error after the last row.

    Raises:
        DataError: Naming file, line, column and the offending text.
    """
    try:
        there = path.exists()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{str(path)[:_SHOWN_CHARACTERS]!r} is no path: {reason}.") from None
    if not there:
        raise DataError(f"There is no file {path}.", hint=f"The working directory is {Path.cwd()}.")
    if path.is_dir():
        raise DataError(f"{path} is a folder.", hint=_hint_of_folder(path))
    kind = kind_of(path)
    if kind is None or (path.name.lower().endswith(_COMPRESSED) and kind in _BINARY):
        raise DataError(
            f"{path.name} is not a kind of file that can be read.", hint=f"There are: {', '.join(SUFFIXES)}."
        )
    own = RowFaults(path.name) if faults is None else faults
    try:
        yield from _READERS[kind](path, own)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path.name} is damaged: it cannot be decompressed ({error}).") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    if faults is None:
        own.raise_if_any()


def _hint_of_folder(path: Path) -> str:
    found = sorted(child.name for child in path.iterdir() if kind_of(child) is not None)
    if not found:
        return f"Name a file in it: {', '.join(SUFFIXES)}."
    more = f" and {len(found) - _SHOWN_FAULTS} more" if len(found) > _SHOWN_FAULTS else ""
    return f"Name a file in it: {', '.join(found[:_SHOWN_FAULTS])}{more}."


def _open_bytes(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.name.lower().endswith(_COMPRESSED) else path.open("rb")  # type: ignore[return-value]


def _read_lines(path: Path, faults: RowFaults) -> Iterator[Row]:
    with _open_bytes(path) as stream:
        for number, raw in enumerate(stream, start=1):
            place = f"line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                problem = f"byte {error.start + 1} is not UTF-8"
                faults.add(place, problem, raw[error.start : error.start + 20], hint=_hint_of_encoding(raw))
                continue
            if not line.strip():
                continue
            try:
                values = _decode(line)
            except json.JSONDecodeError as error:
                column = error.colno
                problem = f"not JSON ({error.msg})"
                faults.add(f"{place}, column {column}", problem, line[max(0, column - 30) :], hint=_EACH_LINE)
                continue
            except ValueError as error:
                faults.add(place, str(error), line)
                continue
            if isinstance(values, dict):
                yield Row(values, place)
            else:
                faults.add(place, "must be an object with named columns", line, hint=_EACH_LINE)


def _read_array(path: Path, faults: RowFaults) -> Iterator[Row]:
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
    for number, values in enumerate(content, start=1):
        if isinstance(values, dict):
            yield Row(values, f"row {number}")
        else:
            faults.add(f"row {number}", "must be an object with named columns", values)


def _text(path: Path) -> str:
    """Return the whole of a file, which is UTF-8 with or without a byte order mark."""
    with _open_bytes(path) as stream:
        content = stream.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        near = _excerpt(error.object[max(0, error.start - 20) : error.start + 20])
        raise DataError(
            f"{path.name}, line {line}: byte {error.start + 1} is not UTF-8: `{near}`.", hint=_hint_of_encoding(content)
        ) from None


def _hint_of_encoding(content: bytes) -> str:
    """Say what a text that is not UTF-8 seems to be written in, and how to write it anew."""
    import charset_normalizer

    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        found = "utf-16"
    else:
        best = charset_normalizer.from_bytes(content[:_HEAD_CHARACTERS]).best()
        found = best.encoding if best is not None else "latin-1"
    return f"It looks like {found}. Write it anew: `p.write_text(p.read_text('{found}'), 'utf-8')`, p its pathlib.Path."


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


def _read_table(path: Path, faults: RowFaults) -> Iterator[Row]:
    """Yield a table's rows of texts: its first line names the columns, and an empty cell is a value that is missing."""
    before = len(faults)
    try:
        with _cells_of_any_size(), _open_text(path) as stream:
            is_tabs = kind_of(path) == ".tsv"
            delimiter = "\t" if is_tabs else _delimiter(stream.read(_HEAD_CHARACTERS))
            stream.seek(0)
            records = _records(stream, delimiter, faults)
            head = next(records, None)
            if head is None:
                faults.raise_if_any(whole=True)
                raise DataError(f"{path.name} is empty.", hint="Its first line must name the columns.")
            names = _column_names(path.name, *head)
            is_bare = True
            hint = f"Cells are separated by {_DELIMITERS[delimiter]}; a cell with one in it stands in quotes."
            for place, cells in records:
                is_bare = False
                if any("\x00" in cell for cell in cells):
                    faults.add(place, "holds a null byte", delimiter.join(cells), hint="Is it a text at all?")
                elif len(cells) == len(names):
                    yield Row({name: cell for name, cell in zip(names, cells, strict=True) if cell}, place)
                else:
                    count = f"{_counted(len(cells), 'cell')} for {_counted(len(names), 'column')}"
                    faults.add(place, count, delimiter.join(cells), hint=hint)
    except UnicodeDecodeError:
        _text(path)  # raises, with the line
        raise
    if is_bare and len(faults) == before:
        raise DataError(f"{path.name} has no rows, only the names of columns: `{_excerpt(', '.join(names))}`.")


def _open_text(path: Path) -> IO[str]:
    """Open a text, its line breaks as they are; a byte order mark is left out."""
    return io.TextIOWrapper(_open_bytes(path), encoding="utf-8-sig", newline="")


def _read_texts(path: Path, faults: RowFaults) -> Iterator[Row]:
    """Yield a row of `text` for each line, or for each paragraph where blank lines part them."""
    try:
        with _open_text(path) as stream:
            has_paragraphs = re.search(r"\S[ \t]*\r?\n[ \t]*\r?\n\s*\S", stream.read(_HEAD_CHARACTERS)) is not None
            stream.seek(0)
            start, lines = 1, list[str]()
            for number, raw in enumerate(stream, start=1):
                line = raw.rstrip("\r\n")
                if "\x00" in line:
                    faults.add(f"line {number}", "holds a null byte", line, hint="Is it a text at all?")
                    continue
                if line.strip():
                    start = start if lines else number
                    lines.append(line)
                if lines and (not has_paragraphs or not line.strip()):
                    yield Row({"text": "\n".join(lines)}, f"line {start}")
                    lines = []
            if lines:
                yield Row({"text": "\n".join(lines)}, f"line {start}")
    except UnicodeDecodeError:
        _text(path)  # raises, with the line
        raise


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
            hint = 'A quote in a quoted cell is written twice: "He said ""yes""".'
            faults.add(f"line {first + 1}", problem, own[0], hint=hint)
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


def _read_parquet(path: Path, faults: RowFaults) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as content:
            yield from _rows_of_batches(content.iter_batches(_BATCH_ROWS))
    except pa.ArrowException as error:
        raise DataError(f"{path.name} is not a Parquet file: {error}.") from error


def _read_arrow(path: Path, faults: RowFaults) -> Iterator[Row]:
    """Yield the rows of an Arrow file or stream, Feather included; `datasets` keeps streams."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            try:
                content = pa.ipc.open_file(source)
                batches = (content.get_batch(number) for number in range(content.num_record_batches))
            except pa.ArrowInvalid:
                source.seek(0)
                batches = iter(pa.ipc.open_stream(source))
            parts = (
                batch.slice(start, _BATCH_ROWS) for batch in batches for start in range(0, len(batch), _BATCH_ROWS)
            )
            yield from _rows_of_batches(parts)
    except pa.ArrowException as error:
        raise DataError(f"{path.name} is not an Arrow file: {error}.") from error


def _rows_of_batches(batches: Iterable[Any]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for number, values in enumerate(batch.to_pylist(), start=number + 1):  # noqa: B020 - goes on counting
            yield Row({key: _without_nulls(value) for key, value in values.items()}, f"row {number}")


def _without_nulls(value: Any) -> Any:
    """Arrow gives each struct of a list every key of all of them; drop the ones that were not there."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _excerpt(text: Any) -> str:
    flat = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return flat if len(flat) <= _SHOWN_CHARACTERS else flat[: _SHOWN_CHARACTERS - 1] + "…"


_EACH_LINE = "Each line must be one JSON object."
_BINARY = (".parquet", ".arrow", ".feather")
_READERS: dict[str, Callable[[Path, RowFaults], Iterator[Row]]] = {
    ".jsonl": _read_lines, ".json": _read_array, ".csv": _read_table, ".tsv": _read_table, ".txt": _read_texts,
    ".parquet": _read_parquet, ".arrow": _read_arrow, ".feather": _read_arrow,
}  # fmt: skip
