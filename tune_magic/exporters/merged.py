"""A plain Transformers model with the tuning folded in."""

from __future__ import annotations

from pathlib import Path

import torch

from tune_magic.exporters.base import Exporter
from tune_magic.exporters.parity import Reader, TorchReader
from tune_magic.training.tuned import Tuned


class MergedExporter(Exporter):
    """Safetensors that `from_pretrained(folder)` of Transformers loads, without PEFT."""

    def write(self, folder: Path, tuned: Tuned, quantize: str | None) -> None:
        """Write model and tokenizer."""
        model = tuned.method.merge(tuned.model)
        for name in getattr(model, "added_heads", ()):  # which only training needs
            delattr(model, name)
        model.save_pretrained(folder)
        tuned.tokenizer.save_pretrained(folder)

    def open(self, folder: Path, tuned: Tuned) -> Reader:
        """Load the folder."""
        return TorchReader(tuned.objective.load(folder, torch.float32), tuned)
