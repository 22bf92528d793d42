"""What holds which memory: machine, runs, this kernel's variables, other programs; and how to get it back.

The kernel is asked about what it has loaded already; nothing is imported for it, and no GPU is touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from tune_magic import display
from tune_magic.errors import TuneError
from tune_magic.storage import places
from tune_magic.storage.folder import RunFolder
from tune_magic.view.memory import Gauge

_NEWEST_RUNS = 50  # older ones are not looked at: a run that trains is a new one
_LEAST_VARIABLE_BYTES = 10e6
_LEAST_PROCESS_BYTES = 200e6
_MOST_PROCESSES = 5
_MOST_ITEMS = 10_000  # of a container that are looked at
_JOBS = {  # what works over a run -> its folders, and what ends it
    "chat": ("chats/2*", "close the chat"), "evaluation": ("evals/2*", "interrupt it"), "export": ("exports/2*", "interrupt it"),
    "server": ("servers/2*", "%tune serve RUN --stop"),
}  # fmt: skip
_LAST_ERROR = ("last_traceback", "last_value", "last_exc")


@dataclass(frozen=True)
class Held:
    """Memory that something holds.

    Attributes:
        name: Of the run, the variable or the program.
        kind: run, variable, error or program.
        num_bytes: Of the machine's memory.
        gpu_bytes: Of a GPU's.
        to_free: What gives it back; empty where that is not ours to say.
    """

    name: str
    kind: str
    num_bytes: int
    gpu_bytes: int = 0
    to_free: str = ""


class Holding:
    """A look at memory.

    Attributes:
        gauges: Machine, kernel, runs and GPUs against all there is.
        held: Who holds how much, the most first.
        freed_bytes: What was given back at this look, None where nobody asked for it.
    """

    def __init__(self, gauges: list[Gauge], held: list[Held], freed_bytes: int | None = None) -> None:
        self.gauges = gauges
        self.held = held
        self.freed_bytes = freed_bytes

    def card(self) -> dict[str, str]:
        """Return it as HTML and as text."""
        from tune_magic.view.memory import holding_card

        return holding_card(self.gauges, self.held, self.freed_bytes)

    def show(self) -> None:
        """Show it: in a notebook as HTML, elsewhere as text."""
        display.show(self.card())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return self.card()

    def __repr__(self) -> str:
        return f"<Holding {', '.join(f'{held.name} {held.num_bytes / 1e9:.1f} GB' for held in self.held)}>"


def look(variables: Mapping[str, Any] | None = None, *, free: bool = False) -> Holding:
    """Return who holds how much memory.

    Args:
        variables: The user's, by name.
        free: First give back what nobody uses: the last error's frames, garbage, caches.
    """
    freed = release() if free else None
    held = [*_runs(), *_variables(variables or {}), *_last_error(variables or {}), *_programs()]
    return Holding(gauges(), sorted(held, key=lambda row: -(row.num_bytes + row.gpu_bytes)), freed)


def gauges() -> list[Gauge]:
    """Return machine, kernel, live runs and GPUs with their memory in bytes."""
    machine = psutil.virtual_memory()
    found = [
        Gauge("machine", machine.total - machine.available, machine.total),
        Gauge("this kernel", _resident_bytes(os.getpid()), machine.total),
    ]
    found += [Gauge(name, _resident_bytes(pid), machine.total) for name, _, pid in _at_work()]
    return [*found, *_gpus()]


def release() -> int:
    """Give back what this process holds and nobody uses; returns how many bytes came free, of machine and GPU."""
    torch = sys.modules.get("torch")
    has_gpu = torch is not None and torch.cuda.is_initialized()
    before = _resident_bytes(os.getpid()) + (torch.cuda.memory_reserved() if torch is not None and has_gpu else 0)
    for name in _LAST_ERROR:  # its frames keep whatever the failed cell had made
        if hasattr(sys, name):
            setattr(sys, name, None)
    gc.collect()
    if torch is not None and has_gpu:
        torch.cuda.empty_cache()
    with contextlib.suppress(AttributeError, OSError):  # glibc's
        ctypes.CDLL(None).malloc_trim(0)
    after = _resident_bytes(os.getpid()) + (torch.cuda.memory_reserved() if torch is not None and has_gpu else 0)
    return max(0, before - after)


def _at_work() -> Iterator[tuple[str, str, int]]:
    """Yield name, what ends it, and process of the runs that train and of jobs over the newest runs."""
    for path in itertools.islice(places.folders(), _NEWEST_RUNS):
        run = RunFolder(path)
        with contextlib.suppress(TuneError):  # damaged, or of a newer version
            name = run.name or run.id
            jobs = [
                (f"{name}, {kind}", end, RunFolder(job))
                for kind, (part, end) in _JOBS.items()
                for job in path.glob(part)
            ]
            for title, end, folder in [(name, f"%tune stop {name}", run), *jobs]:
                owner = folder.holder()
                if owner is not None and owner.pid:
                    yield title, end, owner.pid


def _runs() -> Iterator[Held]:
    by_process = _gpu_bytes()
    for name, end, pid in _at_work():
        if pid != os.getpid():
            yield Held(name, "run", _resident_bytes(pid), by_process.get(pid, 0), end)


def _variables(variables: Mapping[str, Any]) -> Iterator[Held]:
    seen: set[int] = set()
    for name, value in variables.items():
        if name.startswith("_"):
            continue
        on_machine, on_gpu = _size(value, seen)
        if on_machine + on_gpu >= _LEAST_VARIABLE_BYTES:
            yield Held(name, "variable", on_machine, on_gpu, f"del {name}")


def _last_error(variables: Mapping[str, Any]) -> Iterator[Held]:
    """What the frames of the last error hold that no variable does."""
    trace = getattr(sys, "last_traceback", None)
    seen: set[int] = set()
    for value in variables.values():
        _size(value, seen)
    on_machine = on_gpu = 0
    while trace is not None:
        if trace.tb_frame.f_locals is not variables:
            for value in list(trace.tb_frame.f_locals.values()):
                sizes = _size(value, seen)
                on_machine, on_gpu = on_machine + sizes[0], on_gpu + sizes[1]
        trace = trace.tb_next
    if on_machine + on_gpu >= _LEAST_VARIABLE_BYTES:
        yield Held("the last error", "error", on_machine, on_gpu, "%tune gpu --free")


def _size(value: Any, seen: set[int]) -> tuple[int, int]:
    """Return the bytes of tensors, models, arrays and tables in a value, (machine, GPU); each storage once."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.nn.Module):
        return _sum(itertools.chain(value.parameters(), value.buffers()), seen)
    if torch is not None and isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        if storage.data_ptr() in seen:
            return 0, 0
        seen.add(storage.data_ptr())
        return (0, storage.nbytes()) if value.is_cuda else (storage.nbytes(), 0)
    if id(value) in seen:  # a container may hold itself, as `Out` does once it was shown
        return 0, 0
    seen.add(id(value))
    if isinstance(value, dict | list | tuple | set):
        items = value.values() if isinstance(value, dict) else value
        return _sum(list(itertools.islice(items, _MOST_ITEMS)), seen)
    return _array_bytes(value), 0


def _array_bytes(value: Any) -> int:
    """Return the bytes of a NumPy array or a pandas table; 0 for anything else."""
    module = type(value).__module__.partition(".")[0]
    if module == "numpy":
        return int(getattr(value, "nbytes", 0))
    usage = getattr(value, "memory_usage", None) if module == "pandas" else None
    if usage is None:
        return 0
    used = usage(deep=False)  # of a table by column, of a column or an index one number
    return int(used.sum() if hasattr(used, "sum") else used)


def _sum(values: Iterable[Any], seen: set[int]) -> tuple[int, int]:
    on_machine = on_gpu = 0
    for value in values:
        sizes = _size(value, seen)
        on_machine, on_gpu = on_machine + sizes[0], on_gpu + sizes[1]
    return on_machine, on_gpu


def _programs() -> Iterator[Held]:
    """The largest other programs of this machine, and whoever holds memory of a GPU."""
    own = {os.getpid(), *(pid for _, _, pid in _at_work())}
    on_gpu = _gpu_bytes()
    found = []
    for process in psutil.process_iter(["pid", "name", "memory_info"]):
        pid, memory = process.info["pid"], process.info["memory_info"]
        if pid in own or memory is None:
            continue
        if memory.rss >= _LEAST_PROCESS_BYTES or pid in on_gpu:
            found.append(Held(f"{process.info['name']} ({pid})", "program", memory.rss, on_gpu.get(pid, 0)))
    yield from sorted(found, key=lambda row: -(row.gpu_bytes + row.num_bytes))[:_MOST_PROCESSES]


def _resident_bytes(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended, or is not ours to look at
        return 0


@contextlib.contextmanager
def _driver() -> Iterator[Any]:
    """Yield NVIDIA's library with its devices' handles, or None where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _gpus() -> list[Gauge]:
    with _driver() as nvml:
        if nvml is None:
            return []
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        found = [nvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles]
        return [Gauge(f"GPU {index}", int(memory.used), int(memory.total)) for index, memory in enumerate(found)]


def _gpu_bytes() -> dict[int, int]:
    """Return the bytes that each process holds of all GPUs, by its number."""
    found: dict[int, int] = {}
    with _driver() as nvml:
        if nvml is None:
            return found
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                found[process.pid] = found.get(process.pid, 0) + int(process.usedGpuMemory or 0)
    return found
