"""The cell a run was started from, as the saved notebook has it now. Read only; the .ipynb is never written."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def has_changed(link: Mapping[str, Any]) -> bool:
    """Return whether the saved notebook has another recipe in a run's cell; False where that cannot be told.

    Args:
        link: The run's: path of the notebook, cell id, the recipe as written.
    """
    notebook, cell_id, source = link.get("notebook"), link.get("cell_id"), link.get("source")
    if not (notebook and cell_id and source):
        return False
    path = Path(notebook)
    try:
        now = _bodies(path, path.stat().st_mtime_ns).get(cell_id)
    except (OSError, ValueError, TypeError, AttributeError):  # gone, or no notebook
        return False
    return now is not None and now.strip() != str(source).strip()


@functools.lru_cache(maxsize=4)
def _bodies(path: Path, _mtime_ns: int) -> dict[str, str]:
    """Return the text below the first line of each cell, by the cell's id."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = {cell["id"]: "".join(cell["source"]) for cell in cells if "id" in cell}
    return {cell_id: text.partition("\n")[2] for cell_id, text in texts.items()}
