"""Memory of this process, the machine and the GPU, in bytes."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Any

import psutil
import torch


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


def peak_rss() -> int:
    """Return the high-water mark of resident memory in bytes.

    Linux's ``ru_maxrss`` outlives an exec, so a worker would start at the size of the kernel that started it; the
    process's own status does not.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_exhausted(error: BaseException) -> bool:
    """Return whether an error says that memory did not suffice, of the GPU or of the machine."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or bool(should_reduce_batch_size(error))


def give_back() -> None:
    """Give unused blocks back to the GPU, so that other sizes fit."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
