"""A run with buttons: what `%tune watch` shows, and stop, checkpoint, resume."""

from __future__ import annotations

import threading
from typing import Any

import ipywidgets

from tune_magic.handles import Run
from tune_magic.storage.state import RESUMABLE, TERMINAL
from tune_magic.view import frame

_REFRESH_S = 1.0


class RunPanel:
    """Shows a run that trains in the background, and acts on it.

    A thread reads the run folder and sets the panel's own properties, so nothing lands in another cell. It ends with
    the run, or with `close`.

    Args:
        run: The run.

    Example:
        >>> RunPanel(run)  # doctest: +SKIP
    """

    def __init__(self, run: Run) -> None:
        self.run = Run(run.path)  # its own reader: two threads must not share one
        self.view = ipywidgets.HTML()
        self.stop = self._button("Stop", "Save the last completed step and stop", run.stop)
        self.checkpoint = self._button("Checkpoint now", "Save a checkpoint after this step", run.checkpoint)
        self.resume = self._button("Resume", "Go on from the last checkpoint", self._resume)
        self.box = ipywidgets.VBox([self.view, ipywidgets.HBox([self.stop, self.checkpoint, self.resume])])
        self._closed = threading.Event()
        self._follow()

    def refresh(self) -> None:
        """Show the run as it is now."""
        state = self.run.status
        is_over = state in TERMINAL and not self.run.is_coming_up
        bundle = self.run.card() if is_over else frame.frame(self.run, state, frame.curve(self.run.summary()))
        self.view.value = bundle["text/html"]
        self.stop.disabled = self.checkpoint.disabled = is_over
        self.resume.disabled = not (is_over and state in RESUMABLE)

    def close(self) -> None:
        """Stop refreshing; the run goes on."""
        self._closed.set()

    def _resume(self) -> None:
        self.run.resume()
        self._follow()

    def _follow(self) -> None:
        """Refresh until the run is over, on a thread that never prints."""
        self.refresh()

        def follow() -> None:
            while not self._closed.wait(_REFRESH_S):
                self.refresh()
                if not (self.run.is_live or self.run.is_coming_up):
                    return

        threading.Thread(target=follow, name=f"panel of {self.run.id}", daemon=True).start()

    def _button(self, title: str, tooltip: str, act: Any) -> Any:
        button = ipywidgets.Button(description=title, tooltip=tooltip)
        button.on_click(lambda _: act())
        return button

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Any:
        """The widgets, with the card as HTML and text for front ends that have none."""
        bundle = self.box._repr_mimebundle_(include=include, exclude=exclude)
        return {**(bundle[0] if isinstance(bundle, tuple) else bundle), **self.run.card()}
