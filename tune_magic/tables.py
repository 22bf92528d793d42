"""Rows given as Python objects: taken out of a recipe, and sent to the worker as files of its job folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tune_magic import files
from tune_magic.data import hub
from tune_magic.errors import DataError

Content = tuple[str, bytes]  # suffix and bytes of a file
_KEYS = ("train", "held_out", "test", "replay")


def take_out(keys: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Replace tables among a recipe's keys by ``$names`` and return both; paths become texts."""
    plain: dict[str, Any] = {key: str(value) if isinstance(value, Path) else value for key, value in keys.items()}
    objects: dict[str, Any] = {}
    data = plain.get("data")
    if isinstance(data, Mapping):
        data = plain["data"] = _parts(data)
        for key in _KEYS:
            data |= _taken({key: data[key]}, key, key, objects) if key in data else {}
        if isinstance(data.get("mix"), list) and not _is_rows(data["mix"]):
            data["mix"] = [
                _taken(entry if isinstance(entry, Mapping) else {"data": entry}, "data", f"mix_{number}", objects)
                for number, entry in enumerate(data["mix"], start=1)
            ]
        elif _is_table(data.get("mix")):
            data["mix"] = [_taken({"data": data["mix"]}, "data", "mix_1", objects)]
    elif _is_table(data):
        objects["data"], plain["data"] = data, "$data"
    return plain, objects


def serialise(objects: Mapping[str, Any] | None) -> dict[str, Content]:
    """Return tables as data: Parquet for a DataFrame, JSON lines for a list of dicts.

    Raises:
        DataError: Something is neither, or holds what cannot be written down.
    """
    return {name: _serialise(name, value) for name, value in (objects or {}).items()}


def write(folder: Path, contents: Mapping[str, Content]) -> None:
    """Write tables into a job folder's inputs."""
    for name, (suffix, content) in contents.items():
        if not re.fullmatch(r"\w+", name):
            raise DataError(f"`${name}` is not a plain name.")
        files.make_folder(folder / "inputs")
        files.write_bytes(folder / "inputs" / f"{name}{suffix}", content)


def _parts(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a recipe's data; a DatasetDict's splits by the names a recipe has for them."""
    found = dict(data)
    if type(data).__name__ == "DatasetDict":
        for name in ("validation", "valid", "dev"):
            if name in found:
                found["held_out"] = found.pop(name)
                break
        found = {key: value for key, value in found.items() if key in _KEYS}
    return found


def _taken(entry: Mapping[str, Any], key: str, name: str, objects: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping with the table under a key replaced by its name, and a path by its text."""
    value = entry.get(key)
    if _is_table(value):
        objects[name] = value
        return {**entry, key: f"${name}"}
    return {**entry, key: str(value)} if isinstance(value, Path) else dict(entry)


def _is_rows(value: Any) -> bool:
    """Return whether a list holds rows; sources of a mixture are names, tables, or mappings with `data`."""
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) and "data" not in row for row in value)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) or hasattr(value, "to_parquet") or _is_dataset(value)


def _is_dataset(value: Any) -> bool:
    """Return whether a value is one of `datasets`' own, which is asked without importing it."""
    return any(kind.__module__.startswith("datasets.") for kind in type(value).__mro__) and hasattr(value, "features")


def _serialise(name: str, value: Any) -> Content:
    if _is_dataset(value):
        return ".parquet", hub.parquet_of(value)
    if hasattr(value, "to_parquet"):
        return ".parquet", value.to_parquet(index=False)
    if isinstance(value, list) and all(isinstance(row, dict) for row in value):
        try:
            # a missing value stays a bare NaN, which the reader names; as a word it would be learned
            return ".jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in value).encode()
        except TypeError as error:
            raise DataError(f"`${name}` holds something that is not text, number, list or dict: {error}.") from None
    raise DataError(
        f"`${name}` must be a DataFrame, a `datasets` object or a list of dicts, got {type(value).__name__}."
    )
