"""Answers of a model, added to a file as they come, so that what was paid for once is not asked again."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tune_magic import files
from tune_magic.storage import fingerprint, places

_DAYS = 7  # a model behind an address may change without notice


def cached(*facts: Any) -> Path:
    """Return the file in the user's cache for answers that depend on `facts` beside the chat; what is old goes first.

    Args:
        *facts: Address, name of the model, and how it is asked.
    """
    folder = places.cache_folder() / "answers"
    with contextlib.suppress(OSError):  # without a cache everything is asked again
        files.make_folder(folder)
        for path in folder.iterdir():
            if time.time() - path.stat().st_mtime > _DAYS * 86_400:
                files.discard(path)
    return folder / f"{fingerprint.of_text(json.dumps(facts))}.jsonl"


class KeptAnswers:
    """The answers of one file, to be closed.

    Args:
        path: The file; None: nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self._known: dict[str, str] = {}
        self._descriptor: int | None = None
        if path is None:
            return
        with contextlib.suppress(OSError):
            for line in path.read_bytes().split(b"\n"):
                with contextlib.suppress(ValueError, KeyError, TypeError):  # one that was cut off by a kill
                    row = json.loads(line)
                    self._known[row["chat"]] = str(row["answer"])
        with contextlib.suppress(OSError):
            self._descriptor = files.open_append(path)

    def of(self, chat: Sequence[dict[str, Any]]) -> str | None:
        """Return the answer to a chat, None where none is kept."""
        return self._known.get(_print(chat))

    def add(self, chat: Sequence[dict[str, Any]], answer: str) -> None:
        """Keep an answer; where there is no room, it is asked again another time."""
        if self._descriptor is not None:
            line = f"\n{files.to_json({'chat': _print(chat), 'answer': answer})}\n"  # whatever was cut off before it
            with contextlib.suppress(OSError):
                files.append(self._descriptor, line.encode(), durable=False)

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            files.close(self._descriptor)
            self._descriptor = None


def _print(chat: Sequence[dict[str, Any]]) -> str:
    return fingerprint.of_text(json.dumps(list(chat), sort_keys=True))
