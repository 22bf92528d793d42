"""Show things where the user is: HTML in a kernel, lines of text elsewhere. IPython is only used when it is there."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

from tune_magic.view.html import Bundle

_shown: dict[Path, int] = {}


def shell() -> Any | None:
    """Return the IPython shell of this process, or None."""
    if "IPython" not in sys.modules:
        return None
    from IPython import get_ipython

    return get_ipython()  # type: ignore[no-untyped-call, unused-ignore]


def in_kernel() -> bool:
    """Return whether this process is a notebook's kernel, where HTML can be shown."""
    current = shell()
    return current is not None and hasattr(current, "kernel")


def show(bundle: Bundle, run: Any = None) -> None:
    """Show a bundle once."""
    if not in_kernel():
        print(bundle["text/plain"], flush=True)  # noqa: T201 - this is the display
        return
    from IPython.display import publish_display_data

    publish_display_data(bundle, metadata(run))
    if run is not None:
        mark_shown(run.path)


def show_text(text: str) -> None:
    """Show plain text, such as a log."""
    print(text, flush=True)  # noqa: T201 - this is the display


def metadata(run: Any) -> dict[str, Any]:
    """Return output metadata that links a saved output to its run."""
    return {} if run is None else {"tune_magic": {"run_id": run.id}}


def mark_shown(path: Path) -> None:
    """Remember that this cell already shows what is in `path`."""
    current = shell()
    if current is not None:
        _shown[path] = current.execution_count


def was_shown(path: Path) -> bool:
    """Return whether the cell being run already shows it, so that its value need not show it again."""
    current = shell()
    return current is not None and _shown.get(path) == current.execution_count


class Live:
    """One place in the output that can be updated: a display with an id in a kernel, new lines elsewhere.

    Args:
        run: What the output is linked to; None for outputs that are about no run.
    """

    def __init__(self, run: Any = None) -> None:
        self._metadata = metadata(run)
        self._path: Path | None = None if run is None else run.path
        self._in_kernel = in_kernel()
        self._handle: Any = None
        self._last_text = ""

    @property
    def is_text(self) -> bool:
        """Whether only text is shown."""
        return not self._in_kernel

    def update(self, bundle: Bundle) -> None:
        """Replace what is shown."""
        if not self._in_kernel:
            if bundle["text/plain"] != self._last_text:
                self._last_text = bundle["text/plain"]
                print(self._last_text, flush=True)  # noqa: T201 - this is the display
            return
        if self._handle is None:
            from IPython.display import DisplayHandle

            self._handle = DisplayHandle()
            self._handle.display(bundle, raw=True, metadata=self._metadata)
        else:
            self._handle.update(bundle, raw=True, metadata=self._metadata)
        on_main = threading.current_thread() is threading.main_thread()
        if self._path is not None and on_main:  # on another thread, another cell may be the one that runs
            mark_shown(self._path)

    def link(self, run: Any) -> None:
        """Link the output to a run from the next update on."""
        self._metadata = metadata(run)


class Passing(Live):
    """A place for what is true for a while only: taken back at the end, and not shown where it cannot be."""

    def update(self, bundle: Bundle) -> None:
        """Replace what is shown."""
        if self._in_kernel:
            super().update(bundle)

    def clear(self) -> None:
        """Take it back."""
        if self._handle is not None:
            super().update({"text/html": "", "text/plain": ""})
