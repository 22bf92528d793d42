"""The export job: measure the best checkpoint, let the exporter write, measure the files, keep a receipt."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tune_magic import files, plugins
from tune_magic.data.example import Example
from tune_magic.errors import TuneError
from tune_magic.evaluation.answers import longest_answer
from tune_magic.evaluation.job import rows_to_score
from tune_magic.evaluation.metrics import ExactMatch
from tune_magic.exporters import model_card, parity
from tune_magic.exporters.base import Exporter
from tune_magic.exporters.parity import Limits, TorchReader
from tune_magic.models.embeddings import num_embeddings
from tune_magic.storage.control import Control
from tune_magic.storage.events import EventLog
from tune_magic.storage.folder import RunFolder
from tune_magic.training.tuned import Tuned, load_tuned

FORMAT = 1
_ROWS = {True: 200, False: 8}  # by default; a classifier reads a row in milliseconds, a language model writes it out
_MOST_NEW_TOKENS = 48


def export(job: RunFolder, log: EventLog, control: Control) -> dict[str, Any]:
    """Do the export job of a folder and return the fields of the last state event.

    Raises:
        TuneError: The files are not the trained model within tolerance; they are kept, and so is the receipt.
    """
    log.append("state", state="running")
    run, options = RunFolder(job.path.parent.parent), job.info["options"]
    exporter: Exporter = plugins.get("exporter", options["to"])()
    target = Path(options["output"]) if options.get("output") else job.path / "files"
    if target.exists():
        raise TuneError(f"{target} is already there.", hint="Name a folder that does not exist yet.")
    limits = _limits(exporter, options)
    tuned = load_tuned(run)
    examples, split = _rows(tuned, options.get("rows"))
    advance = _advancing(log, control, (3 if tuned.is_quantized else 2) * len(examples) + 1)
    new_tokens = None if tuned.objective.scores_rows else _longest(tuned, examples)
    trained = parity.measure(TorchReader(tuned.model, tuned), examples, new_tokens, advance) if examples else None
    on_quantized, quantization = trained, tuned.recipe.quantization
    if (
        tuned.is_quantized
    ):  # what is written is the tuning on weights that are not packed: that is compared with the files
        tuned.model = None
        gc.collect()
        tuned = tuned.unquantised()
        trained = parity.measure(TorchReader(tuned.model, tuned), examples, new_tokens, advance) if examples else None
    vocab_size = num_embeddings(tuned.method.inner(tuned.model))
    with files.new_folder(target) as folder:
        exporter.write(folder, tuned, options.get("quantize"))
        tuned.model = None
        gc.collect()
        advance(1)
        sizes = {
            str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
        }
    receipt = {
        "format": FORMAT, "to": options["to"], "quantize": options.get("quantize"), "run": run.id,
        "step": int(run.best_checkpoint.name.removeprefix("step-")), "path": str(target), "files": sizes,
        "size_bytes": sum(sizes.values()), "task": tuned.objective.task, "new_tokens": len(tuned.vocabulary.ids),
        "vocab_size": vocab_size,
    }  # fmt: skip
    if quantization.is_on:
        receipt["quantization"] = {
            "kind": quantization.kind, "double_quant": quantization.quantizes_scales,
            "makes_up_for_rounding": tuned.method.makes_up_for_rounding,
        }  # fmt: skip
    if trained is None or on_quantized is None:
        receipt["parity"] = {"ok": None, "complaints": [split]}
    else:
        exported = parity.measure(exporter.open(target, tuned), examples, new_tokens, advance)
        figures = parity.compare(trained, exported, examples, _right(tuned, examples))
        wrong = parity.complaints(figures, limits)
        unit = "row" if new_tokens is None else "token"
        receipt["parity"] = {
            **figures,
            "split": split,
            "unit": unit,
            "limits": vars(limits),
            "ok": not wrong,
            "complaints": wrong,
        }
        if quantization.is_on:
            receipt["parity"]["on_quantized"] = parity.compare(on_quantized, trained, examples, _right(tuned, examples))
    receipt["files"][model_card.FILE] = model_card.write(run, receipt, target)
    receipt["size_bytes"] = sum(receipt["files"].values())
    files.write_json(job.path / "receipt.json", receipt)
    if receipt["parity"]["ok"] is False:
        raise TuneError(
            f"The export is out of tolerance: {'; '.join(receipt['parity']['complaints'])}.",
            hint=f"The files are kept in {target}; use them only if that is good enough.",
        )
    return {"state": "finished", "path": str(target), "size_bytes": receipt["size_bytes"]}


def _limits(exporter: Exporter, options: dict[str, Any]) -> Limits:
    """Return what the export may differ by, with the user's own tolerance for logits."""
    quantize = options.get("quantize")
    if quantize is not None and quantize not in exporter.quantizations:
        known = ", ".join(exporter.quantizations) or "none"
        raise TuneError(f"`--to {options['to']}` cannot be quantised to {quantize!r}.", hint=f"It knows: {known}.")
    limits = exporter.limits if quantize is None else exporter.quantizations[quantize]
    own = options.get("tolerance")
    return limits if own is None else replace(limits, logit_share=own)


def _rows(tuned: Tuned, count: int | None) -> tuple[list[Example], str]:
    """Return rows for the receipt and what they are; none, with the reason, when the run's data is gone."""
    try:
        examples, split = rows_to_score(tuned, tuned.run.path)
    except TuneError as error:
        return [], f"not compared: {error.message}"
    return examples[: count or _ROWS[tuned.objective.scores_rows]], split


def _longest(tuned: Tuned, examples: Sequence[Example]) -> int:
    return min(_MOST_NEW_TOKENS, longest_answer(examples, tuned.tokenizer)) if examples else _MOST_NEW_TOKENS


def _right(tuned: Tuned, examples: Sequence[Example]) -> Callable[[Example, list[int]], bool] | None:
    """Return how an answer is told to be right: the class, or an exact match; None for plain texts."""
    if tuned.objective.gives == "outputs":
        return None
    if tuned.objective.gives == "classes":
        return lambda example, answer: answer == [example.label]
    if any(example.reference is None for example in examples):
        return None
    metric, tokenizer = ExactMatch(), tuned.tokenizer

    def is_match(example: Example, answer: list[int]) -> bool:
        return bool(metric.score(tokenizer.decode(answer, skip_special_tokens=True), example.reference or ""))

    return is_match


def _advancing(log: EventLog, control: Control, total: int) -> Callable[[int], None]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        log.append("progress", done=done, total=total)
        control.check()

    return advance
