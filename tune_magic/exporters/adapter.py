"""The adapter alone, in PEFT's own format."""

from __future__ import annotations

from pathlib import Path

from tune_magic.errors import TuneError
from tune_magic.exporters.base import Exporter
from tune_magic.exporters.parity import Reader, TorchReader
from tune_magic.training.tuned import Tuned


class AdapterExporter(Exporter):
    """A few megabytes that `PeftModel.from_pretrained(base, folder)` puts on the base model."""

    def write(self, folder: Path, tuned: Tuned, quantize: str | None) -> None:
        """Write adapter and tokenizer."""
        if not (tuned.method.adds and hasattr(tuned.model, "peft_config")):
            raise TuneError(
                "This run has no adapter that PEFT could put on the base model.",
                hint="Export it with `--to merged`." if tuned.method.merges else "`run.load()` gives the tuned model.",
            )
        if tuned.compression is not None:
            raise TuneError(
                "This run's adapter belongs on the base that `compress` made smaller, which is in no other place.",
                hint="Export it with `--to merged`: that is the smaller model with the adapter folded in.",
            )
        if getattr(tuned.method.inner(tuned.model), "added_heads", ()):
            raise TuneError(
                "This run's adapter holds a head that only training needs.", hint="Export it with `--to merged`."
            )
        tuned.model.save_pretrained(folder, save_embedding_layers=False)
        tuned.tokenizer.save_pretrained(folder)

    def open(self, folder: Path, tuned: Tuned) -> Reader:
        """Put the adapter on a base that was loaded anew."""
        from peft import PeftModel

        base = tuned.adapter_base()
        if tuned.vocabulary.is_extended:  # as the card says it to whoever loads it
            size = tuned.vocabulary.num_embeddings(base)
            base.resize_token_embeddings(size, mean_resizing=False)
        return TorchReader(PeftModel.from_pretrained(base, folder), tuned)
