"""What an exporter is: the contract every exporter plug-in keeps."""

from __future__ import annotations

import abc
from pathlib import Path
from typing import ClassVar

from tune_magic.exporters.parity import Limits, Reader
from tune_magic.training.tuned import Tuned


class Exporter(abc.ABC):
    """Base class of exporters: writes a tuned model into an empty folder, and opens what it wrote.

    Attributes:
        quantizations: Names `--quantize` may have, with what the result may differ by.
        limits: What the result may differ by when nothing is quantised.
    """

    quantizations: ClassVar[dict[str, Limits]] = {}
    limits: ClassVar[Limits] = Limits()

    @abc.abstractmethod
    def write(self, folder: Path, tuned: Tuned, quantize: str | None) -> None:
        """Write the files.

        Args:
            folder: Empty; becomes the export when everything in it is on disk.
            tuned: The tuned model, float32, in evaluation mode. It may be used up.
            quantize: One of `quantizations`, or None.

        Raises:
            TuneError: This method's models have no such form.
        """

    @abc.abstractmethod
    def open(self, folder: Path, tuned: Tuned) -> Reader:
        """Load what was written, from the files alone, as another program would; only `tuned.model` may be gone."""
