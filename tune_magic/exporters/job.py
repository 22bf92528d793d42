"""The export job: measure the best checkpoint, let the exporter write, measure the files, keep a receipt."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

from tune_magic import files, plugins
from tune_magic.errors import TuneError
from tune_magic.exporters import model_card, together
from tune_magic.exporters.base import Exporter
from tune_magic.exporters.measuring import Advance, Comparison, Order
from tune_magic.exporters.parity import Limits, TorchReader
from tune_magic.models.embeddings import num_embeddings
from tune_magic.storage.control import Control
from tune_magic.storage.events import EventLog
from tune_magic.storage.folder import RunFolder
from tune_magic.training.tuned import load_tuned

FORMAT = 1


def export(job: RunFolder, log: EventLog, control: Control) -> dict[str, Any]:
    """Do the export job of a folder and return the fields of the last state event.

    Raises:
        TuneError: The files are not the trained model within tolerance; they are kept, and so is the receipt.
    """
    log.append("state", state="running")
    run, options = RunFolder(job.path.parent.parent), job.info["options"]
    exporter: Exporter = plugins.get("exporter", options["to"])()
    exporter.device = _device(exporter, options)
    target = Path(options["output"]) if options.get("output") else job.path / "files"
    if target.exists():
        raise TuneError(f"{target} is already there.", hint="Name a folder that does not exist yet.")
    order = Order(
        options.get("quantize"), options.get("rows"), _limits(exporter, options), target, Advance(log, control)
    )
    runs = {name: RunFolder(Path(path)) for name, path in (options.get("runs") or {}).items()}
    if isinstance(exporter, together.TogetherExporter):
        found = together.written(exporter, runs or {_own_name(run): run}, order)
    elif runs:
        raise TuneError(
            f"`--to {options['to']}` writes one run at a time.", hint="`--to onnx_adapters` writes several on one base."
        )
    else:
        found = _written(exporter, run, order)
    receipt = {
        "format": FORMAT, "to": options["to"], "quantize": options.get("quantize"), "run": run.id,
        "step": found.pop("step"), "path": str(target), **found,
        "size_bytes": sum(found["files"].values()),
    }  # fmt: skip
    receipt["files"][model_card.FILE] = model_card.write(run, receipt, target)
    receipt["size_bytes"] = sum(receipt["files"].values())
    files.write_json(job.path / "receipt.json", receipt)
    if receipt["parity"]["ok"] is False:
        raise TuneError(
            f"The export is out of tolerance: {'; '.join(receipt['parity']['complaints'])}.",
            hint=f"The files are kept in {target}; use them only if that is good enough.",
        )
    return {"state": "finished", "path": str(target), "size_bytes": receipt["size_bytes"]}


def _own_name(run: RunFolder) -> str:
    return run.id if run.name in (None, together.BASE) else str(run.name)


def _written(exporter: Exporter, run: RunFolder, order: Order) -> dict[str, Any]:
    """Write one run and return what its receipt says of files and parity."""
    tuned = load_tuned(run)
    comparison = Comparison(tuned, order.rows, order.advance)
    order.advance.total = (3 if tuned.is_quantized else 2) * len(comparison.examples) + 1
    trained = on_quantized = comparison.measure(TorchReader(tuned.model, tuned))
    quantization = tuned.recipe.quantization
    if (
        quantization.is_on
    ):  # what is written is the tuning on weights that are not packed: that is compared with the files
        tuned.model = None
        gc.collect()
        tuned = tuned.unquantised()
        trained = comparison.measure(TorchReader(tuned.model, tuned))
    vocab_size = num_embeddings(tuned.method.inner(tuned.model))
    with files.new_folder(order.target) as folder:
        exporter.write(folder, tuned, order.quantize)
        tuned.model = None
        gc.collect()
        order.advance(1)
        session = exporter.tune_session(folder, tuned, comparison.examples)
        sizes = together.sizes(folder)
    found: dict[str, Any] = {
        "step": tuned.step, "files": sizes, "task": tuned.objective.task, "new_tokens": len(tuned.vocabulary.ids), "vocab_size": vocab_size,
        **({"session": session} if session else {}),
    }  # fmt: skip
    if trained is None:
        found["parity"] = {"ok": None, "complaints": [comparison.split]}
    else:
        found["parity"] = comparison.judged(trained, exporter.open(order.target, tuned), order.limits)
    if quantization.is_on:
        found["quantization"] = {
            "kind": quantization.kind, "double_quant": quantization.quantizes_scales,
            "makes_up_for_rounding": tuned.method.makes_up_for_rounding,
        }  # fmt: skip
        if trained is not None and on_quantized is not None:
            found["parity"]["on_quantized"] = comparison.figures(on_quantized, trained)
    return found


def _limits(exporter: Exporter, options: dict[str, Any]) -> Limits:
    """Return what the export may differ by, with the user's own tolerance for logits."""
    quantize = options.get("quantize")
    if quantize is not None and quantize not in exporter.quantizations:
        known = ", ".join(exporter.quantizations) or "none"
        raise TuneError(f"`--to {options['to']}` cannot be quantised to {quantize!r}.", hint=f"It knows: {known}.")
    limits = exporter.limits if quantize is None else exporter.quantizations[quantize]
    own = options.get("tolerance")
    return limits if own is None else replace(limits, logit_share=own)


def _device(exporter: Exporter, options: dict[str, Any]) -> str | None:
    """Return the device that was asked for.

    Raises:
        TuneError: The format is not for a device.
    """
    device: str | None = options.get("device")
    if device is not None and device not in exporter.devices:
        known = (
            f"It knows: {', '.join(exporter.devices)}." if exporter.devices else "Whoever loads the files says where."
        )
        raise TuneError(f"`--to {options['to']}` is not written for the device {device!r}.", hint=known)
    return device
