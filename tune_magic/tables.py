"""Rows given as Python objects: taken out of a recipe, and sent to the worker as files of its job folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tune_magic import files
from tune_magic.errors import DataError

Content = tuple[str, bytes]  # suffix and bytes of a file
_KEYS = ("train", "held_out", "test")


def take_out(keys: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Replace tables among a recipe's keys by ``$names`` and return both; paths become texts."""
    plain, objects = {key: str(value) if isinstance(value, Path) else value for key, value in keys.items()}, {}
    data = plain.get("data")
    if isinstance(data, Mapping):
        data = plain["data"] = dict(data)
        for key in _KEYS:
            if _is_table(data.get(key)):
                objects[key], data[key] = data[key], f"${key}"
            elif isinstance(data.get(key), Path):
                data[key] = str(data[key])
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


def _is_table(value: Any) -> bool:
    return isinstance(value, list) or hasattr(value, "to_parquet")


def _serialise(name: str, value: Any) -> Content:
    if hasattr(value, "to_parquet"):
        return ".parquet", value.to_parquet(index=False)
    if isinstance(value, list) and all(isinstance(row, dict) for row in value):
        try:
            # a missing value stays a bare NaN, which the reader names; as a word it would be learned
            return ".jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in value).encode()
        except TypeError as error:
            raise DataError(f"`${name}` holds something that is not text, number, list or dict: {error}.") from None
    raise DataError(f"`${name}` must be a DataFrame or a list of dicts, got {type(value).__name__}.")
