"""The adapter alone, in PEFT's own format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tune_magic.errors import TuneError
from tune_magic.exporters.base import Exporter
from tune_magic.methods.base import Method


class AdapterExporter(Exporter):
    """A few megabytes that `PeftModel.from_pretrained(base, folder)` puts on the base model."""

    def write(self, folder: Path, model: Any, tokenizer: Any, method: Method) -> None:
        """Write adapter and tokenizer."""
        if not method.adds:
            raise TuneError(
                "This run changed the model itself; there is no adapter.", hint="Export it with `--to merged`."
            )
        model.save_pretrained(folder, save_embedding_layers=False)
        tokenizer.save_pretrained(folder)
