"""Where a graph runs and how: the execution provider, chosen and explained, and settings of its session, measured."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tune_magic import files
from tune_magic.data.example import Example
from tune_magic.errors import TuneError
from tune_magic.exporters.parity import Reader, prompt_of

SESSION = "session.json"
DEVICES = ("cpu", "cuda", "npu")
FORMAT = 1
_PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider",),
    "npu": ("QNNExecutionProvider", "VitisAIExecutionProvider", "OpenVINOExecutionProvider", "CoreMLExecutionProvider"),
}
_PACKAGES = {
    "cuda": "pip install onnxruntime-gpu",
    "npu": "pip install onnxruntime-qnn (Qualcomm), onnxruntime-openvino (Intel) or onnxruntime-vitisai (AMD)",
}
_LEVELS = ("all", "basic")
_TRIED_ROWS = 4
_TRIED_TOKENS = 8
_LONGEST_S = 6.0  # for all settings together; at least one is tried


@dataclass(frozen=True)
class Settings:
    """How a session is opened.

    Attributes:
        provider: onnxruntime's name of what computes.
        threads: Within an operator; 0: as onnxruntime likes.
        level: How far the graph is rewritten first: ``basic`` or ``all``.
    """

    provider: str = "CPUExecutionProvider"
    threads: int = 0
    level: str = "all"

    def open(self, path: Path) -> Any:
        """Return a session over a graph."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads
        options.graph_optimization_level = getattr(
            onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{self.level.upper()}"
        )
        return onnxruntime.InferenceSession(str(path), options, providers=[self.provider])

    @classmethod
    def of(cls, folder: Path) -> Settings:
        """Return what was found best for a folder; onnxruntime's own where nothing was tried."""
        path = folder / SESSION
        if not path.is_file():
            return cls()
        known = json.loads(path.read_text(encoding="utf-8"))
        return cls(known["provider"], known["threads"], known["level"])

    def code(self) -> str:
        """Return the Python that opens a session so."""
        return (
            "options = onnxruntime.SessionOptions()\n"
            f"options.intra_op_num_threads = {self.threads}\n"
            f"options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_{self.level.upper()}\n"
            f'session = onnxruntime.InferenceSession("model.onnx", options, providers=["{self.provider}"])'
        )


def choose(device: str | None, offered: Sequence[str] | None = None) -> tuple[str, str]:
    """Return the execution provider for a device, and why it is that one.

    Args:
        device: ``cpu``, ``cuda`` or ``npu``; None: nobody asked.
        offered: What onnxruntime has here; default: what it says.

    Raises:
        TuneError: None of the device's is here, with the package that brings one.
    """
    there = offered_here() if offered is None else list(offered)
    wanted = _PROVIDERS[device or "cpu"]
    found = next((provider for provider in wanted if provider in there), None)
    if found is None:
        raise TuneError(
            f"onnxruntime has no provider for the device `{device}` here: {', '.join(there)}.",
            hint=f"{_PACKAGES.get(device or 'cpu', 'pip install onnxruntime')} brings one.",
        )
    if device is None:
        others = [name for name, providers in _PROVIDERS.items() if name != "cpu" and set(providers) & set(there)]
        more = f"; `--device {others[0]}` is here too" if others else ""
        return found, f"no device was named, and every onnxruntime has this one{more}"
    return found, f"`{device}` was asked for"


def offered_here() -> list[str]:
    """Return the execution providers that onnxruntime has here."""
    import onnxruntime

    return [str(name) for name in onnxruntime.get_available_providers()]


def tuned_session(
    folder: Path, device: str | None, examples: Sequence[Example], open_with: Callable[[Settings], Reader]
) -> dict[str, Any]:
    """Try settings over a few rows for a few seconds, write the best beside the model, and return what the receipt says.

    Args:
        folder: What was written.
        device: What was asked for.
        examples: Rows to try on; without any, onnxruntime's own settings stay.
        open_with: Opens what was written.
    """
    provider, why = choose(device)
    about: dict[str, Any] = {"provider": provider, "why": why, "offered": offered_here(), "tried": []}
    chosen = examples[:_TRIED_ROWS]
    started = time.perf_counter()
    every = list(_settings(provider))
    for settings in every if chosen else ():
        if about["tried"] and time.perf_counter() - started > _LONGEST_S:
            break
        seconds = _seconds(open_with(settings), chosen)
        about["tried"].append({"threads": settings.threads, "level": settings.level, "seconds": seconds})
    tried: list[dict[str, Any]] = about["tried"]
    best: dict[str, Any] = min(tried, key=lambda one: one["seconds"]) if tried else {"threads": 0, "level": "all"}
    settings = Settings(provider, best["threads"], best["level"])
    about |= {
        "best": {"threads": settings.threads, "level": settings.level},
        "left_out": len(every) - len(about["tried"]),
    }
    files.write_json(folder / SESSION, {"format": FORMAT, **asdict(settings), "how": settings.code()})
    return about


def _settings(provider: str) -> Iterator[Settings]:
    """Yield what is tried, the likeliest first: threads up to the processor's cores; a GPU has no use for them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = [0] if provider != "CPUExecutionProvider" else sorted({1, cores, *_powers(cores)}, reverse=True)
    for level, count in itertools.product(_LEVELS, counts):
        yield Settings(provider, count, level)


def _powers(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length()) if 2**power <= most]


def _seconds(reader: Reader, examples: Sequence[Example]) -> float:
    """Return the median seconds a row, or a token that is written; the first row is asked twice."""
    found = []
    for example in [examples[0], *examples]:
        started = time.perf_counter()
        if reader.writes:
            answer = reader.generate(prompt_of(example), _TRIED_TOKENS)
            found.append((time.perf_counter() - started) / (len(answer) + 1))
        else:
            reader.found(example)
            found.append(time.perf_counter() - started)
    return statistics.median(found[1:])
