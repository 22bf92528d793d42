"""What conformance tests share: a folder, a plug-in under its name, runs in this process that stop where told."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic_core import PydanticUndefined
from safetensors.torch import load_file

from tune_magic import files, plugins
from tune_magic.handles import Run
from tune_magic.recipe.build import build_recipe
from tune_magic.storage import folder as run_folder
from tune_magic.storage.control import Control, StopRequested
from tune_magic.storage.events import EventLog
from tune_magic.storage.folder import RunFolder
from tune_magic.testing.models import make_encoder, make_model

Job = Callable[[RunFolder, EventLog, Control], dict[str, Any]]


class Counting(Control):
    """Counts the looks at what was asked, and asks for a stop at one of them."""

    looks = 0
    stop_at: int | None = None

    def check(self, done: int = 0, total: int = 0) -> None:
        """Look once more."""
        self.looks += 1
        if self.looks == self.stop_at:
            raise StopRequested
        super().check(done, total)


def do(job: Job, run: RunFolder, stop_at: int | None = None) -> int:
    """Do a job of a folder in this process; what it raises is raised.

    Args:
        job: What to do.
        run: Its folder.
        stop_at: The look at what was asked at which a stop is found; None: never.

    Returns:
        How often it looked.
    """
    with EventLog(run.path / "events.jsonl") as log:
        control = Counting(run.path, log.attempt)
        control.stop_at = stop_at
        log.append("state", state="starting", pid=os.getpid())
        log.append("state", **job(run, log, control))
    return control.looks


class Conformance:
    """Base of the conformance tests of a kind.

    Attributes:
        kind: Of the plug-in.
        plugin: The class under test; a subclass sets it.
        options: Its keys in a recipe, without the name.
        name: What a recipe calls it; by default what its options say.
        recipe: More keys of the recipe that is trained.
        rows: To train on; by default such as the plug-in learns from.
    """

    kind: ClassVar[str]
    plugin: ClassVar[Any]
    options: ClassVar[Mapping[str, Any]] = {}
    name: ClassVar[str | None] = None
    recipe: ClassVar[Mapping[str, Any]] = {}
    rows: ClassVar[list[dict[str, Any]] | None] = None
    folder: ClassVar[Path]
    _stack: ClassVar[contextlib.ExitStack]
    _kept: ClassVar[dict[str, Any]]

    @classmethod
    def setup_class(cls) -> None:
        """Make a folder, and let the plug-in have its name."""
        cls._stack = contextlib.ExitStack()
        cls._kept = {}
        cls.folder = Path(cls._stack.enter_context(tempfile.TemporaryDirectory(prefix="tune_magic-test-")))
        cls._stack.enter_context(plugins.borrowed(cls.kind, cls.called(), cls.plugin))

    @classmethod
    def teardown_class(cls) -> None:
        """Leave nothing."""
        cls._stack.close()

    @classmethod
    def called(cls) -> str:
        """Return what a recipe calls the plug-in."""
        field = cls.plugin.Options.model_fields.get("name") if hasattr(cls.plugin, "Options") else None
        default = None if field is None or field.default is PydanticUndefined else field.default
        return cls.name or default or "under_test"

    @classmethod
    def named(cls) -> dict[str, Any]:
        """Return what a recipe says of the plug-in."""
        return {"name": cls.called(), **cls.options}

    @classmethod
    def model(cls, *, encoder: bool = False) -> Path:
        """Return the folder of the model that is trained; a subclass may make another."""
        path = cls.folder / ("encoder" if encoder else "model")
        return path if path.exists() else (make_encoder(path) if encoder else make_model(path))

    @classmethod
    def make(cls, rows: list[dict[str, Any]], *, encoder: bool = False, **changes: Any) -> Run:
        """Make a run of a few steps, and start nothing."""
        data = cls.folder / f"rows-{len(rows)}.jsonl"
        files.write_text(data, "".join(json.dumps(row) + "\n" for row in rows))
        keys = {
            "model": str(cls.model(encoder=encoder)), "data": {"train": str(data), "held_out": 0.25}, "batch_size": 4,
            "learning_rate": 2e-2, "max_steps": 10, "max_length": 128, "microbatch_tokens": 150,
            "eval": {"steps": 5, "samples": 0}, "dtype": "float32", **cls.recipe, **changes,
        }  # fmt: skip
        content = {"name": "trial", "recipe": build_recipe(keys).given(), "cwd": str(cls.folder)}
        return Run(run_folder.create(cls.folder / "runs", "finetune", content))

    @classmethod
    def trained(cls, make: Callable[[], Run]) -> Run:
        """Return a run that was trained to its end, the same for every test of the class."""
        from tune_magic.training.job import finetune

        if "run" not in cls._kept:
            run = make()
            cls._kept["looks"] = do(finetune, run)
            cls._kept["run"] = run
        found: Run = cls._kept["run"]
        return found

    @classmethod
    def assert_stops_and_goes_on(cls, make: Callable[[], Run]) -> Run:
        """Stop a run in its middle, let it go on, and compare it with one that was not stopped, to the bit."""
        from tune_magic.training.job import finetune

        whole, run = cls.trained(make), make()
        try:
            do(finetune, run, stop_at=2 * cls._kept["looks"] // 3)
        except StopRequested as error:
            raise AssertionError("a stop was not obeyed") from error
        assert run.status == "stopped", "the run should have stopped in its middle"
        do(finetune, run)
        for of in ("steps", "evaluations"):
            ours, theirs = (
                {step: event["loss"] for step, event in getattr(r.summary(), of).items()} for r in (run, whole)
            )
            assert ours == theirs, f"stopped and resumed, the losses of its {of} are others"
        for name, tensor in tensors(whole).items():
            assert torch.equal(tensors(run)[name], tensor), f"stopped and resumed, {name} is another"
        return run


def tensors(run: Run) -> dict[str, torch.Tensor]:
    """Return what the last checkpoint of a run holds of parameters and optimizer."""
    last = run.checkpoints[max(run.checkpoints)]
    found: dict[str, torch.Tensor] = load_file(last / "trainable.safetensors")
    return found | dict(load_file(last / "optimizer.safetensors"))


def assert_learns(run: Run) -> None:
    """The held-out loss must have become lower than the base's."""
    evaluations = run.summary().evaluations
    best = min(float(event["loss"]) for step, event in evaluations.items() if step)
    assert best < float(evaluations[0]["loss"]), f"nothing was learned: {evaluations[0]['loss']} before, {best} after"


def assert_explained(plugin: Any) -> None:
    """What it is must be told to people."""
    for what in ("summary", "formula", "source", "when"):
        assert isinstance(getattr(plugin, what), str), f"`{what}` must be a text"
        assert getattr(plugin, what).strip(), f"`{what}` is empty: `%tune explain` has nothing to say"
