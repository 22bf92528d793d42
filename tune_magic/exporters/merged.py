"""A plain Transformers model with the tuning folded in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tune_magic.exporters.base import Exporter
from tune_magic.methods.base import Method


class MergedExporter(Exporter):
    """Safetensors that `AutoModelForCausalLM.from_pretrained(folder)` loads, without PEFT."""

    def write(self, folder: Path, model: Any, tokenizer: Any, method: Method) -> None:
        """Write model and tokenizer."""
        method.merge(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
