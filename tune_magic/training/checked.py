"""What an engine's self-check found, kept in the user's cache: the same model, method and versions give it again.

A check computes a few rows twice, which on a small machine is a second of every start.
"""

from __future__ import annotations

import contextlib
import json
import platform
from pathlib import Path
from typing import Any

import torch

from tune_magic import files
from tune_magic.data.table import Table
from tune_magic.objectives.base import Objective
from tune_magic.recipe.schema import Recipe
from tune_magic.storage import fingerprint, places
from tune_magic.training import memory
from tune_magic.training.engine import Engine

_CHECKED_ROWS = 8
_FOUND = ("packed", "reason", "attention", "saved_bytes_per_token")
_PACKAGE = Path(__file__).parent.parent


def self_check(engine: Engine, recipe: Recipe, objective: Objective, train: Table, model_print: str) -> None:
    """Let the engine check itself on the first rows, or tell it what it found before.

    Args:
        engine: Of this recipe.
        recipe: What is trained.
        objective: What is minimised.
        train: The training rows.
        model_print: Fingerprint of the model.
    """
    rows = train[:_CHECKED_ROWS]
    path = _path(engine, recipe, objective, model_print)
    found = _read(path)
    if found is None:
        before, known = memory.level(engine.device), engine.reason
        engine.self_check(rows, objective.score_sum)
        memory.give_back()
        seen_bytes = max(0, memory.level(engine.device) - before)
        if engine.reason != known:
            path = None  # what failed now, for lack of memory say, may work next time: it is checked again
        _write(path, {**{name: getattr(engine, name) for name in _FOUND}, "unseen_bytes": seen_bytes})
    else:
        for name, value in found.items():
            setattr(engine, name, value)
    if recipe.torch_compile:
        engine.reason = engine.compile(rows, objective.score_sum) or engine.reason


def _path(engine: Engine, recipe: Recipe, objective: Objective, model_print: str) -> Path | None:
    """Return where the verdict is, by all that it depends on; None for code that has no version."""
    parts = (type(engine), type(engine.method), type(objective))
    if not all(part.__module__.startswith("tune_magic.") for part in parts):
        return None
    on_gpu = engine.device.type == "cuda"
    facts = {
        "model": model_print,
        "method": recipe.normalised()["method"],
        "quantization": recipe.normalised()["quantization"],
        "objective": [type(objective).__name__, objective.options.model_dump(mode="json"), objective.facts()],
        "computed": [str(engine.dtype), recipe.share_prefixes, torch.get_num_threads()],
        "versions": fingerprint.versions(),
        "sources": {str(source): source.stat().st_mtime_ns for source in sorted(_PACKAGE.rglob("*.py"))},
        "processor": [platform.machine(), torch.backends.cpu.get_cpu_capability()],
        "device": torch.cuda.get_device_name(engine.device) if on_gpu else engine.device.type,
    }
    return places.cache_folder() / "checks" / f"{fingerprint.of_text(json.dumps(facts, sort_keys=True))}.json"


def _read(path: Path | None) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path else None
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and set(found) == {*_FOUND, "unseen_bytes"} else None


def _write(path: Path | None, found: dict[str, Any]) -> None:
    if path is not None:
        with contextlib.suppress(OSError):  # then the next start checks again
            files.make_folder(path.parent)
            files.write_json(path, found, durable=False)
