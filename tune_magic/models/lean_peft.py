"""PEFT without bitsandbytes, which it imports wherever it is installed, and which takes seconds and a tenth of a gigabyte.

Importing this module imports PEFT. Whoever quantises calls `know_bitsandbytes` first.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any

_HIDDEN = "bitsandbytes"
_ASKED = {  # cached answers to whether it is installed
    "peft.import_utils": ("is_bnb_available", "is_bnb_4bit_available"),
    "transformers.utils.import_utils": ("is_bitsandbytes_available",),
}


@contextlib.contextmanager
def _hidden() -> Iterator[None]:
    """While inside, bitsandbytes is not installed, unless it was imported before."""
    if _HIDDEN in sys.modules:
        yield
        return
    sys.modules[_HIDDEN] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[_HIDDEN]


def know_bitsandbytes() -> None:
    """Let PEFT see that bitsandbytes is installed: from now on it imports it."""
    for module, names in _ASKED.items():
        for name in names:
            clear = getattr(getattr(importlib.import_module(module), name, None), "cache_clear", None)
            if clear is not None:
                clear()


with _hidden():
    peft: Any = importlib.import_module("peft")
    for _name in _ASKED["peft.import_utils"]:
        getattr(importlib.import_module("peft.import_utils"), _name)()  # the answer is kept
