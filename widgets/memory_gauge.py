"""Who holds the memory: the machine, this kernel, the runs that train, the GPUs."""

from __future__ import annotations

import itertools
import os
import time

import ipywidgets
import psutil
from tune_magic.widgets.panel import Panel, button

from tune_magic.storage import places
from tune_magic.storage.folder import RunFolder
from tune_magic.view.html import Bundle
from tune_magic.view.memory import Gauge, gauges_bundle

_PERIOD_S = 2.0
_NEWEST_RUNS = 50  # older ones are not looked at: a run that trains is a new one


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


def gauges() -> list[Gauge]:
    """Return machine, kernel, live runs and GPUs with their memory in bytes."""
    machine = psutil.virtual_memory()
    found = [
        Gauge("machine", machine.total - machine.available, machine.total),
        Gauge("this kernel", psutil.Process(os.getpid()).memory_info().rss, machine.total),
    ]
    for path in itertools.islice(places.folders(), _NEWEST_RUNS):
        run = RunFolder(path)
        owner = run.holder()
        if owner is not None and owner.pid:
            found.append(Gauge(run.name or run.id, _resident_bytes(owner.pid), machine.total))
    return [*found, *_gpus()]


def _resident_bytes(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:  # it has just ended
        return 0


def _gpus() -> list[Gauge]:
    """Ask the driver: the kernel itself never touches a GPU."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no NVIDIA driver here
        return []
    found = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        memory = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(index))
        found.append(Gauge(f"GPU {index}", int(memory.used), int(memory.total)))
    pynvml.nvmlShutdown()
    return found
