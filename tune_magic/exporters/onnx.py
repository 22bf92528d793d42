"""ONNX: classifiers, and decoders with a cache of keys and values, run by onnxruntime without torch.

Decoders go through ONNX Runtime GenAI's builder, whose files run in onnxruntime-genai and in plain onnxruntime; families
it does not know are traced by torch.onnx and run in plain onnxruntime. Classifiers are always traced.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tune_magic import files
from tune_magic.data.example import Example
from tune_magic.data.locate import ensure
from tune_magic.errors import TuneError
from tune_magic.exporters.base import Exporter
from tune_magic.exporters.limits import EIGHT_BITS, FOUR_BITS
from tune_magic.exporters.onnx_build import agrees, build, is_installed
from tune_magic.exporters.onnx_quantize import calibrated, quantize_decoder, quantize_products
from tune_magic.exporters.onnx_readers import ABOUT, MODEL, OnnxClassifier, OnnxDecoder
from tune_magic.exporters.onnx_session import DEVICES, Settings, choose, tuned_session
from tune_magic.exporters.onnx_trace import FED, cache_sizes, trace_classifier, trace_decoder
from tune_magic.exporters.parity import Reader
from tune_magic.models.generate import end_tokens
from tune_magic.storage import fingerprint
from tune_magic.training.tuned import Tuned, check_unchanged

_CALIBRATION_ROWS = 64


class OnnxExporter(Exporter):
    """A graph with its weights, and the tokenizer beside it."""

    quantizations: ClassVar = {"int8": EIGHT_BITS, "static": EIGHT_BITS, "int4": FOUR_BITS}
    devices: ClassVar = DEVICES

    def write(self, folder: Path, tuned: Tuned, quantize: str | None) -> None:
        """Write graph, weights, configuration and tokenizer."""
        if tuned.objective.engine == "outputs":
            raise TuneError(f"Runs of `{tuned.recipe.objective.name if tuned.recipe.objective else 'this objective'}` are not written as ONNX.",
                            hint="Export it with `--to merged`.")  # fmt: skip
        choose(self.device)  # where it cannot run here, say so before it is written
        scores_rows = tuned.objective.scores_rows
        if quantize == ("int4" if scores_rows else "static"):
            what = "Classifiers" if scores_rows else "Language models"
            others = "int8 and static" if scores_rows else "int8 and int4"
            raise TuneError(f"{what} are not quantised to {quantize} as ONNX.", hint=f"They know {others}.")
        examples = _calibration_rows(tuned) if quantize == "static" else []
        model = tuned.method.merge(tuned.model).cpu().eval()
        if scores_rows:
            _write_classifier(model, tuned.tokenizer, folder)
        else:
            _write_decoder(model, tuned.tokenizer, folder)
        if quantize == "static":
            calibrated(folder / MODEL, examples)
        elif quantize is not None and scores_rows:
            quantize_products(folder / MODEL)
        elif quantize is not None:
            quantize_decoder(folder / MODEL, bits={"int8": 8, "int4": 4}[quantize])
        tuned.tokenizer.save_pretrained(folder)

    def open(self, folder: Path, tuned: Tuned) -> Reader:
        """Run the graph by onnxruntime."""
        return OnnxClassifier(folder) if tuned.objective.scores_rows else OnnxDecoder(folder)

    def tune_session(self, folder: Path, tuned: Tuned, examples: Sequence[Example]) -> dict[str, Any]:
        """Try threads and levels of rewriting, and write the fastest beside the graph."""

        def open_with(settings: Settings) -> Reader:
            if tuned.objective.scores_rows:
                return OnnxClassifier(folder, settings)
            return OnnxDecoder(folder, settings=settings)

        return tuned_session(folder, self.device, examples, open_with)


def _calibration_rows(tuned: Tuned) -> list[Example]:
    """Return training rows, drawn by the run's seed, by which the scales of activations are set.

    Raises:
        TuneError: They are gone, or are not what the run was trained on.
    """
    train = tuned.recipe.data.train
    path = ensure(train, tuned.run.path)
    if not path.is_file():
        raise TuneError("`--quantize static` sets scales by training rows, which are gone.", hint="int8 needs none.")
    check_unchanged(tuned.run, "train", fingerprint.of_file(path))
    table = tuned.rows().training()
    order = np.random.default_rng(tuned.recipe.seed).permutation(len(table))
    return [table[place] for place in order[:_CALIBRATION_ROWS].tolist()]


def _write_classifier(model: Any, tokenizer: Any, folder: Path) -> None:
    trace_classifier(model, folder / MODEL)
    tokenizer.model_input_names = list(FED)  # what it gives is what the graph takes
    tokenizer.init_kwargs["model_input_names"] = list(FED)
    model.config.save_pretrained(folder)


def _write_decoder(model: Any, tokenizer: Any, folder: Path) -> None:
    """Let the builder write the graph, or trace the model where that cannot be, or is not the same model."""
    about = {"end_tokens": end_tokens(model, tokenizer), **cache_sizes(model)}
    files.write_json(folder / ABOUT, about)
    if is_installed() and build(model, tokenizer, folder) is None and agrees(model, lambda: OnnxDecoder(folder)):
        return
    for left in folder.glob("[!.]*"):
        if left.name != ABOUT:
            files.discard(left)
    trace_decoder(model, folder / MODEL)
    model.config.save_pretrained(folder)
