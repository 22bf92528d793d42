"""Who holds the memory: the machine, this kernel, the runs that train, the GPUs."""

from __future__ import annotations

import time

import ipywidgets
from tune_magic.widgets.panel import Panel, button

from tune_magic.holding import gauges
from tune_magic.view.html import Bundle
from tune_magic.view.memory import Gauge, gauges_bundle

_PERIOD_S = 2.0


class MemoryGauge(Panel):
    """Bars for what holds how much memory; the last look stays in the saved notebook.

    A bar is redrawn when it has moved by a hundredth of its scale, so that a quiet machine leaves the notebook alone.

    Args:
        minutes: How long it goes on looking.

    Example:
        >>> MemoryGauge()  # doctest: +SKIP
    """

    def __init__(self, minutes: float = 30.0) -> None:
        self._until = time.monotonic() + 60 * minutes
        super().__init__(ipywidgets.HBox([button("Stop looking", "Keep the last look", self.close)]), _PERIOD_S)
        self._last: list[Gauge] = []
        self._clock = ""

    def bundle(self) -> Bundle:
        """Return the gauges, as they were drawn last unless one has moved."""
        now = gauges()
        if [gauge.mark for gauge in now] != [gauge.mark for gauge in self._last]:
            self._last, self._clock = now, time.strftime("%H:%M:%S")
        return gauges_bundle(self._last, self._clock)

    @property
    def is_over(self) -> bool:
        """Whether its time is up."""
        return time.monotonic() > self._until
