"""Tokens and passwords never reach the disk: every text that is written passes through here."""

from __future__ import annotations

import functools
import os
import re
from typing import Any

HIDDEN = "[hidden]"
SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|xox[abprs]-[\w-]{10,}"
    r"|AKIA[0-9A-Z]{16}|glpat-[\w-]{16,}|AIza[\w-]{30,})|(?<=Bearer )[\w.~+/-]{16,}=*|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_HINTS = ("hf_", "sk-", "gh", "xox", "AKIA", "glpat-", "AIza", "Bearer ", "://")  # one of them is in every shape
_NAMES = re.compile(r"(?:^|_)(?:token|secret|password|passwd|api_?key|access_?key|credentials?)$", re.IGNORECASE)
_LEAST_LENGTH = 8  # shorter values of the environment are words, not secrets
_read: tuple[dict[Any, Any] | None, list[str]] = None, []  # the environment when it was last read, and its secrets
_kept: list[str] = []  # those of this process that no environment holds, the latest last


def hide(text: str) -> str:
    """Return a text with what looks like a secret, or is one of the environment's, replaced."""
    for value in (*_of_environment(), *_kept):
        if value in text:
            text = text.replace(value, HIDDEN)
    return SHAPES.sub(HIDDEN, text) if any(hint in text for hint in _HINTS) else text


def keep(value: str) -> None:
    """Let a value never be written from now on: a token that this process has made, or was sent."""
    if value not in _kept:
        _kept.append(value)


def received() -> str | None:
    """Return the value that was kept last; None where there is none."""
    return _kept[-1] if _kept else None


def is_secret_name(name: Any) -> bool:
    """Return whether a field of this name holds a secret when it holds a text."""
    return isinstance(name, str) and _names_a_secret(name)


@functools.lru_cache(maxsize=4096)
def _names_a_secret(name: str) -> bool:
    return _NAMES.search(name) is not None


def _of_environment() -> list[str]:
    """Return the environment's secrets; read anew only when it has changed, since each text of each row asks."""
    global _read  # noqa: PLW0603 - one a process
    now = getattr(os.environ, "_data", None)  # the raw dict: comparing it is a hundred times faster than reading it
    before, found = _read  # one name for both, since other threads write it too
    if now is None or now != before:
        before = None if now is None else dict(now)
        found = [value for name, value in os.environ.items() if len(value) >= _LEAST_LENGTH and is_secret_name(name)]
        _read = before, found
    return found
