"""Facts about the notebook a cell belongs to: hints, never needed. The .ipynb itself is never touched."""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path
from typing import Any

from tune_magic.storage.fingerprint import of_text

_NEWEST_RUNS = 20


def notebook_link(shell: Any, source: str | None) -> dict[str, Any]:
    """Return the notebook's path, the cell's id, and our cell's source with its hash, as far as they are known."""
    return {
        "notebook": notebook_path(shell),
        "cell_id": _cell_id(shell),
        "source": source,
        "source_sha256": of_text(source) if source is not None else None,
    }


def live_run(shell: Any) -> str | None:
    """Return the name of a run of this notebook that is still training, if there is one; only the newest are looked at."""
    from tune_magic.errors import TuneError
    from tune_magic.storage import places
    from tune_magic.storage.folder import RunFolder

    notebook = notebook_path(shell)
    for path in itertools.islice(places.folders([places.default_root(notebook)]), _NEWEST_RUNS):
        run = RunFolder(path)
        with contextlib.suppress(TuneError):  # a damaged neighbour
            if run.holder() is not None and run.link.get("notebook") == notebook:
                return run.name or run.id
    return None


def notebook_path(shell: Any) -> str | None:
    """Return the path of the notebook a shell belongs to, as far as the front end tells."""
    for named in (
        shell.user_ns.get("__vsc_ipynb_file__"),
        shell.user_ns.get("__session__"),
        os.environ.get("JPY_SESSION_NAME"),
    ):
        if isinstance(named, str) and ".ipynb" in named:
            path = Path(named)
            # a server gives the path from its own root; the kernel's working directory is the notebook's folder
            return str(path if path.is_absolute() else Path.cwd() / path.name)
    return None


def _cell_id(shell: Any) -> str | None:
    kernel = getattr(shell, "kernel", None)
    if kernel is None:
        return None
    metadata = (kernel.get_parent() or {}).get("metadata", {})
    found = metadata.get("cellId") or metadata.get("cell_id")
    return str(found) if found else None
