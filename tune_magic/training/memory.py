"""Memory of this process, the machine and the GPU, in bytes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from tune_magic import files

_GROUPS = Path("/sys/fs/cgroup")


def snapshot() -> dict[str, Any]:
    """Return what the gauges show.

    ``rss``: resident memory of this process now; ``peak``: its high-water mark; ``system_used`` and ``system_total``;
    with a GPU also ``gpu`` (reserved by this process), ``gpu_peak`` (allocated at most) and ``gpu_total``.
    """
    system = psutil.virtual_memory()
    found: dict[str, Any] = {
        "rss": psutil.Process(os.getpid()).memory_info().rss,
        "peak": peak_rss(),
        "system_used": system.total - system.available,
        "system_total": system.total,
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found |= {
            "gpu": torch.cuda.memory_reserved(),
            "gpu_peak": torch.cuda.max_memory_allocated(),
            "gpu_used": total - free,
            "gpu_total": total,
        }
    return found


def forget_peak(device: torch.device) -> None:
    """Let `peak` begin anew, where the system can do that: on a GPU and on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        files.tell_system(Path("/proc/self/clear_refs"), "5")


def peak_rss() -> int:
    """Return the high-water mark of resident memory in bytes, since `forget_peak` where it was called.

    Linux's ``ru_maxrss`` outlives an exec, so a worker would start at the size of the kernel that started it; the
    process's own status does not.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def level(device: torch.device) -> int:
    """Return what this process holds now: allocated on the GPU, or resident in the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process(os.getpid()).memory_info().rss)


def peak(device: torch.device) -> int:
    """Return the most this process held so far, as `level` counts it."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss()


def free(device: torch.device) -> int:
    """Return what this process could still take, of the GPU or of the machine and its control group."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return min(psutil.virtual_memory().available, *_group_rooms())


def _group_rooms() -> list[int]:
    """Return what the control groups of a container leave; at least one number, however large."""
    rooms = [sys.maxsize]
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # not there, or the word max
            room = int((_GROUPS / limit).read_text()) - int((_GROUPS / usage).read_text())
            rooms.append(max(0, room))
    return rooms


@dataclass
class Saved:
    """What autograd saved for a backward pass, without parameters, each storage once."""

    total_bytes: int = 0


@contextlib.contextmanager
def count_saved(model: torch.nn.Module) -> Iterator[Saved]:
    """While inside, count the bytes that autograd saves."""
    saved = Saved()
    seen = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            saved.total_bytes += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield saved


def is_exhausted(error: BaseException) -> bool:
    """Return whether an error says that memory did not suffice, of the GPU or of the machine."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or bool(should_reduce_batch_size(error))


def give_back() -> None:
    """Give unused blocks back to the GPU, so that other sizes fit, and to the system."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
