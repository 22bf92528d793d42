"""The export job: load the best checkpoint, let the exporter write, keep a receipt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tune_magic import files, plugins
from tune_magic.errors import TuneError
from tune_magic.exporters.base import Exporter
from tune_magic.storage.control import Control
from tune_magic.storage.events import EventLog
from tune_magic.storage.folder import RunFolder
from tune_magic.training.tuned import load_tuned

FORMAT = 1


def export(job: RunFolder, log: EventLog, control: Control) -> dict[str, Any]:
    """Do the export job of a folder and return the fields of the last state event."""
    log.append("state", state="running")
    run = RunFolder(job.path.parent.parent)
    options = job.info["options"]
    exporter: Exporter = plugins.get("exporter", options["to"])()
    target = Path(options["output"]) if options.get("output") else job.path / "files"
    if target.exists():
        raise TuneError(f"{target} is already there.", hint="Name a folder that does not exist yet.")
    step = int(run.best_checkpoint.name.removeprefix("step-"))
    tuned = load_tuned(run)
    control.check()
    with files.new_folder(target) as folder:
        exporter.write(folder, tuned.model, tuned.tokenizer, tuned.method)
        control.check()
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    receipt = {
        "format": FORMAT, "to": options["to"], "run": run.id, "step": step, "path": str(target), "files": sizes,
        "size_bytes": sum(sizes.values()),
    }  # fmt: skip
    files.write_json(job.path / "receipt.json", receipt)
    return {"state": "finished", "path": str(target), "size_bytes": receipt["size_bytes"]}
