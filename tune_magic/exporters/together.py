"""Several runs on one base in one folder: each is measured with its adapter on, and the base with none."""

from __future__ import annotations

import abc
import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tune_magic import files
from tune_magic.exporters.base import Exporter
from tune_magic.exporters.measuring import Comparison, Order
from tune_magic.exporters.parity import Reader, TorchReader
from tune_magic.storage.folder import RunFolder
from tune_magic.training.tuned import Tuned, load_tuned

BASE = "base"


class TogetherExporter(Exporter):
    """An exporter that writes one base and an adapter of each run; `take` is called with each before `write`."""

    @abc.abstractmethod
    def check(self, runs: Mapping[str, RunFolder]) -> None:
        """Refuse runs that have no such form together.

        Raises:
            TuneError: With what stands against it.
        """

    @abc.abstractmethod
    def take(self, name: str, tuned: Tuned) -> dict[str, Any]:
        """Keep what is needed of a run, whose model is gone afterwards, and return what the receipt says of it."""

    @abc.abstractmethod
    def open_adapter(self, folder: Path, name: str | None) -> Reader:
        """Load what was written with one adapter on; None for the base."""


def written(exporter: TogetherExporter, runs: Mapping[str, RunFolder], order: Order) -> dict[str, Any]:
    """Write runs and return what the receipt says: files, parity of each adapter and of the base, and of all together."""
    exporter.check(runs)
    facts: dict[str, dict[str, Any]] = {}
    measured: dict[str, tuple[Comparison, Any]] = {}
    for name, run in runs.items():
        tuned = load_tuned(run).unquantised()
        comparison = Comparison(tuned, order.rows, order.advance)
        order.advance.total += 2 * len(comparison.examples) * (1 if measured else 2)
        if not measured:
            with tuned.without_tuning() as base:
                measured[BASE] = comparison, comparison.measure(TorchReader(base.model, base))
        measured[name] = comparison, comparison.measure(TorchReader(tuned.model, tuned))
        facts[name] = {
            "run": run.id, "step": tuned.step, **exporter.take(name, tuned)
        }  # fmt: skip
        tuned.model = None
        gc.collect()
    with files.new_folder(order.target) as folder:
        exporter.write(folder, tuned, order.quantize)
        order.advance(1)
        members = sizes(folder)
    found = {
        name: comparison.judged(
            trained, exporter.open_adapter(order.target, None if name == BASE else name), order.limits
        )
        for name, (comparison, trained) in measured.items()
    }
    for name, about in facts.items():
        about["parity"] = found[name]
    return {
        "step": next(iter(facts.values()))["step"], "files": members, "task": tuned.objective.task, "adapters": facts, "base": found[BASE], "parity": _summed(found)
    }  # fmt: skip


def sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each file in a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in paths}


def _summed(found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the verdict over all: figures of the one that is furthest from its own, rows and right answers of all adapters."""
    verdicts = [one["ok"] for one in found.values()]
    complaints = [f"{name}: {text}" for name, one in found.items() for text in one["complaints"]]
    ok = None if None in verdicts else all(verdicts)
    compared = [one for name, one in found.items() if name != BASE and one["ok"] is not None]
    if not compared:
        return {"ok": ok, "complaints": complaints}
    furthest = max(compared, key=lambda one: one["logit_difference"] / max(one["largest_logit"], 1e-12))
    summed = {key: sum(one[key] for one in compared) for key in ("rows", "same_answers")}
    right = {
        key: None if any(one[key] is None for one in compared) else sum(one[key] for one in compared)
        for key in ("trained_right", "exported_right")
    }
    return {**furthest, **summed, **right, "ok": ok, "complaints": complaints}
