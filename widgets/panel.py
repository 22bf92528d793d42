"""What panels share: buttons that live as long as the kernel, and a view that outlives it.

A widget does not survive a saved notebook: reopened, it is a line of error. So nothing that is worth keeping is inside
one. A panel is two outputs, the controls (widgets) and below them the view: plain HTML, redrawn by its display's id.
Callbacks never work themselves: they leave a request in a run folder or set an event that the panel's thread waits for,
since a kernel handles callbacks only between cells, and may handle them on a thread of its own.
"""

from __future__ import annotations

import abc
import threading
import time
from collections.abc import Callable
from typing import Any

import ipywidgets

from tune_magic.display import Live
from tune_magic.view.html import Bundle, note_bundle

_CLOSING_S = 10.0
_SETTLED_S, _MOST_SETTLING_S = 0.3, 3.0
_NOTHING: Bundle = {"text/html": "", "text/plain": ""}


class Panel(abc.ABC):
    """Base class of panels.

    A thread draws the view until `close`, and never prints.

    Args:
        controls: The widgets.
        period_s: Seconds between looks at what the view shows.
    """

    def __init__(self, controls: ipywidgets.Widget, period_s: float) -> None:
        self.controls = controls
        self._period_s = period_s
        self._changed = threading.Event()
        self._closed = threading.Event()
        self._view: Live | None = None
        self._buttons: Live | None = None
        self._shown: Bundle = {}
        self._has_failed = False
        self._thread = threading.Thread(target=self._live, name=type(self).__name__, daemon=True)

    @abc.abstractmethod
    def bundle(self) -> Bundle:
        """Return the view as it should be now, as HTML and as text."""

    def act(self) -> None:  # noqa: B027 - a panel may only look
        """Do what callbacks have asked for; called on the panel's thread."""

    @property
    def is_over(self) -> bool:
        """Whether nothing will change any more, so that the controls can go."""
        return False

    def close(self) -> None:
        """Stop drawing and take the controls away, as should be done before a notebook is saved; the view stays."""
        self._closed.set()
        self._changed.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(_CLOSING_S)
        if self._view is not None and not self._has_failed:
            self._draw()  # what came since the thread last looked; this may be the notebook's last cell

    def wake(self, *_: Any) -> None:
        """Let the thread look now; safe to call from any callback."""
        self._changed.set()

    def settle(self) -> None:
        """Wait until what was typed is here; not for callbacks.

        While a kernel is busy a front end holds typed text back, and clicks not, so a click may come before its text.
        """
        deadline = time.monotonic() + _MOST_SETTLING_S
        self._changed.clear()
        while self._changed.wait(_SETTLED_S) and time.monotonic() < deadline:
            self._changed.clear()

    def _ipython_display_(self) -> None:
        """Show controls and view, and start the thread."""
        is_first = self._view is None
        self._buttons, self._view, self._shown = Live(), Live(), {}
        self._buttons.update({**self.controls._repr_mimebundle_(), **_text_of(self)})
        self._draw()
        if is_first:
            self._thread.start()

    def _live(self) -> None:
        try:
            while not (self._closed.is_set() or self.is_over):
                self._changed.wait(self._period_s)
                self._changed.clear()
                self.act()
                self._draw()
            self._draw()  # it may have ended since
        except Exception as error:  # noqa: BLE001 - a thread's error is seen by nobody, unless it is shown
            self._show_error(error)
        if self._buttons is not None:
            self._buttons.update(_NOTHING)

    def _show_error(self, error: Exception) -> None:
        assert self._view is not None
        self._has_failed = True
        self._view.update(note_bundle(f"{type(self).__name__} stopped: {type(error).__name__}: {error}"))

    def _draw(self) -> None:
        bundle = self.bundle()
        if self._view is not None and bundle != self._shown:
            self._shown = bundle
            self._view.update(bundle)


def button(title: str, tooltip: str, act: Callable[[], object], **options: Any) -> ipywidgets.Button:
    """Return a button that calls `act`, which must only leave a request or set an event."""
    made = ipywidgets.Button(
        description=title, tooltip=tooltip, layout=ipywidgets.Layout(width="auto", min_width="110px"), **options
    )
    made.on_click(lambda _: act())
    return made


def _text_of(panel: Panel) -> Bundle:
    """What stands for the controls where there are no widgets."""
    return {"text/plain": f"{type(panel).__name__}: its controls need a running kernel"}
