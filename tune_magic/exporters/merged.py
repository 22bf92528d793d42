"""A plain Transformers model with the tuning folded in."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch

from tune_magic.exporters.base import Exporter
from tune_magic.exporters.limits import BRAIN, HALF
from tune_magic.exporters.parity import Reader, TorchReader
from tune_magic.training.tuned import Tuned

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class MergedExporter(Exporter):
    """Safetensors that `from_pretrained(folder)` of Transformers loads, without PEFT."""

    quantizations: ClassVar = {"fp16": HALF, "bf16": BRAIN}

    def write(self, folder: Path, tuned: Tuned, quantize: str | None) -> None:
        """Write model and tokenizer."""
        model = tuned.method.merge(tuned.model)
        for name in getattr(model, "added_heads", ()):  # which only training needs
            delattr(model, name)
        if quantize is not None:
            model.to(_DTYPES[quantize])
        model.save_pretrained(folder)
        tuned.tokenizer.save_pretrained(folder)

    def open(self, folder: Path, tuned: Tuned) -> Reader:
        """Load the folder; its numbers are widened to float32, which is how the receipt computes."""
        return TorchReader(tuned.objective.load(folder, torch.float32), tuned)
