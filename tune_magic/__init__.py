"""Fine-tune models from a notebook cell.

    %load_ext tune_magic

Importing this package imports nothing heavy; each name below is found when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tune_magic.api import (
        chat,
        compare,
        doctor,
        evaluate,
        explain,
        export,
        finetune,
        inspect,
        last,
        list_methods,
        load_model,
        load_run,
        merge_adapters,
        rate,
        runs,
        stack,
        try_methods,
    )
    from tune_magic.decorators import augmenter, callback, data_format, exporter, method, metric, objective
    from tune_magic.deploying import list_models, push, register, serve, set_stage
    from tune_magic.errors import RecipeError, RunFailed, Stopped, TuneError
    from tune_magic.handles import Export, Report, Run

__version__ = "0.1.0"
__all__ = [
    "Export", "RecipeError", "Report", "Run", "RunFailed", "Stopped", "TuneError",
    "augmenter", "callback", "chat", "compare", "data_format", "doctor", "evaluate", "explain", "export", "exporter",
    "finetune", "inspect", "last", "list_methods", "list_models", "load_model", "load_run", "merge_adapters", "method", "metric",
    "objective", "push", "rate", "register", "runs", "serve", "set_stage", "stack", "try_methods",
]  # fmt: skip

_HOMES = {
    **dict.fromkeys(
        (
            "chat",
            "compare",
            "doctor",
            "evaluate",
            "explain",
            "export",
            "finetune",
            "inspect",
            "last",
            "list_methods",
            "load_model",
            "load_run",
            "merge_adapters",
            "rate",
            "runs",
            "stack",
            "try_methods",
        ),
        "tune_magic.api",
    ),
    **dict.fromkeys(("list_models", "push", "register", "serve", "set_stage"), "tune_magic.deploying"),
    **dict.fromkeys(
        ("augmenter", "callback", "data_format", "exporter", "method", "metric", "objective"), "tune_magic.decorators"
    ),
    **dict.fromkeys(("Export", "Report", "Run"), "tune_magic.handles"),
    **dict.fromkeys(("RecipeError", "RunFailed", "Stopped", "TuneError"), "tune_magic.errors"),
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tune_magic' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def load_ipython_extension(shell: Any) -> None:
    """Add the magics; what ``%load_ext tune_magic`` calls."""
    from tune_magic.magics.extension import load

    load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """Take everything back that loading added."""
    from tune_magic.magics.extension import unload

    unload(shell)
