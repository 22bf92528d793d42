"""Fingerprints: SHA-256 of what a run depends on, cached by path, size and time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tune_magic import files
from tune_magic.storage import places

PACKAGES = (
    "tune-magic", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "numpy", "tokenizers", "safetensors",
)  # fmt: skip
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.gguf")


def of_text(text: str) -> str:
    """Return the SHA-256 of a text, as 64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def of_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes; a file with the same path, size and time is not read again."""
    path = path.resolve()
    stat = path.stat()
    key = f"{path}|{stat.st_size}|{stat.st_mtime_ns}"
    cache = _read_cache()
    if key not in cache:
        with path.open("rb") as stream:
            cache[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        _write_cache(cache)
    return cache[key]


def of_model(path: Path) -> str:
    """Return one SHA-256 for a model: of its file, or of the names and hashes of the files in its folder."""
    if path.is_file():
        return of_file(path)
    members = sorted({member for pattern in _MODEL_FILES for member in path.glob(pattern)})
    return of_text("\n".join(f"{member.name} {of_file(member)}" for member in members))


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def identity(recipe: dict[str, Any], fingerprints: dict[str, str]) -> str:
    """Return a run's identity: its normalised recipe and the fingerprints of what it reads."""
    return of_text(json.dumps([recipe, fingerprints], sort_keys=True))


def _cache_file() -> Path:
    return places.cache_folder() / "hashes.json"


def _read_cache() -> dict[str, str]:
    try:
        return dict(json.loads(_cache_file().read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _write_cache(cache: dict[str, str]) -> None:
    newest = dict(list(cache.items())[-2000:])
    with contextlib.suppress(OSError):  # without a cache the next hash is slower, nothing else
        files.make_folder(places.cache_folder())
        files.write_json(_cache_file(), newest, durable=False)
