"""Execute a notebook in its own folder and show in the terminal what its cells show.

    python execute.py IN.ipynb OUT.ipynb [--short]

The kernel works in the folder of OUT. ``--short`` trains two steps and scores a few rows: for tests, not for reading.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

CELL_TIMEOUT_S = 3600


class Teller(NotebookClient):
    """A notebook client that says what it does."""

    last_line = ""

    def process_message(self, msg, cell, cell_index):
        """Print the first line of every output and of every update of one."""
        content, kind = msg["content"], msg["msg_type"]
        if kind in ("display_data", "update_display_data", "execute_result"):
            self.tell(content["data"].get("text/plain", ""))
        elif kind == "stream":
            self.tell(content["text"])
        return super().process_message(msg, cell, cell_index)

    def tell(self, text: str) -> None:
        """Print a text unless it has just been said."""
        if text.strip() and text != self.last_line:
            self.last_line = text
            print("   " + text.rstrip().replace("\n", "\n   "), flush=True)


FEWER_ROWS = """
import pathlib

for path in pathlib.Path().glob("*/held_out.*"):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))
"""


def fewer(line: re.Match) -> str:
    """Return a line that scores or exports, over a few rows."""
    bare = re.sub(r" --(limit|max-new-tokens|rows) \d+", "", line[0])
    return f"{bare} --rows 2" if line[2] == "export" else f"{bare} --limit 4 --max-new-tokens 4"


def shorten(notebook) -> None:
    """Make every cell quick: two small steps, few rows; what trains in the background is stopped by the notebook."""
    for cell in notebook.cells:
        trains = cell.source.startswith("%%finetune") and "--background" not in cell.source
        if trains and "model: small/" not in cell.source:  # which trains in seconds
            kept = [line for line in cell.source.splitlines() if not line.startswith(("max_steps:", "batch_size:"))]
            cell.source = "\n".join([*kept, "max_steps: 2", "batch_size: 2"])
        elif cell.source.startswith("%tune methods --try"):
            cell.source = re.sub(r"--steps \d+", "--steps 2", cell.source)
        elif re.match(r"(\w+ = )?%(evaluate|export)", cell.source):
            cell.source = re.sub(r"^(\w+ = )?%(evaluate|export)\b.*", fewer, cell.source, flags=re.MULTILINE)
        elif cell.source.startswith("%run make_"):
            cell.source += FEWER_ROWS


def execute(source: Path, target: Path, *, short: bool = False) -> None:
    """Execute `source` in the folder of `target` and write it there, also when a cell fails."""
    notebook = nbformat.read(source, as_version=4)
    if short:
        shorten(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = Teller(
        notebook,
        timeout=CELL_TIMEOUT_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(target.parent)}},
        store_widget_state=False,
    )
    client.on_cell_execute = lambda cell, cell_index: print(f"[{cell_index}] {cell.source.splitlines()[0]}", flush=True)
    try:
        client.execute()
    finally:
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times that change with every execution
        nbformat.write(notebook, target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    execute(options.source, options.target, short=options.short)
