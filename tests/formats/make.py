"""Write the run folder of this version's format, which every later version must open: ``python tests/formats/make.py``.

A folder is made once for each format and committed; it is never made again.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import make_model, rows

from tune_magic.executors import local
from tune_magic.handles import Run
from tune_magic.recipe import build_recipe
from tune_magic.storage import events, folder

FORMAT = 1


def main() -> None:
    """Train two steps and copy the folder, with the paths of this machine taken out of it."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(12)))
        recipe = build_recipe({
            "model": str(make_model(place / "model")), "data": {"train": str(place / "rows.jsonl"), "held_out": 0.25},
            "method": {"name": "lora", "r": 2}, "batch_size": 4, "max_steps": 2, "eval": {"steps": 1, "max_new_tokens": 4},
        })  # fmt: skip
        run = Run(folder.create(place / "tune_runs", "finetune", {"name": "sample", "recipe": recipe.given()}))
        local.start(run.path, "inline")
        target = Path(__file__).parent / str(FORMAT)
        shutil.copytree(run.path, target)
        for path in (target / "run.json", target / "owner.lock"):
            path.write_text(path.read_text().replace(name, "/runs"))
        lines = []
        for event in run.events():
            plain = json.loads(json.dumps({k: v for k, v in event.items() if k != "crc"}).replace(name, "/runs"))
            lines.append(events.encode(plain))
        (target / "events.jsonl").write_bytes(b"".join(lines))
        for leftover in ("heartbeat", "worker.log"):
            (target / leftover).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
