"""What an exporter is: the contract every exporter plug-in keeps."""

from __future__ import annotations

import abc
from pathlib import Path
from typing import Any

from tune_magic.methods.base import Method


class Exporter(abc.ABC):
    """Base class of exporters: writes a tuned model into an empty folder."""

    @abc.abstractmethod
    def write(self, folder: Path, model: Any, tokenizer: Any, method: Method) -> None:
        """Write the files.

        Args:
            folder: Empty; becomes the export when everything in it is on disk.
            model: The tuned model, float32, in evaluation mode. It may be used up.
            tokenizer: Its tokenizer.
            method: How it was tuned.

        Raises:
            TuneError: This method's models have no such form.
        """
