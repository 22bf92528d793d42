"""What an exporter is: the contract every exporter plug-in keeps."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from tune_magic.data.example import Example
from tune_magic.exporters.parity import Limits, Reader
from tune_magic.training.tuned import Tuned


class Exporter(abc.ABC):
    """Base class of exporters: writes a tuned model into an empty folder, and opens what it wrote.

    Attributes:
        quantizations: Names `--quantize` may have, with what the result may differ by.
        limits: What the result may differ by when nothing is quantised.
        devices: Names `--device` may have; none where whoever loads the files says where they run.
        device: The one that was asked for, set before anything is written; None: the exporter's own choice.
    """

    quantizations: ClassVar[dict[str, Limits]] = {}
    limits: ClassVar[Limits] = Limits()
    devices: ClassVar[tuple[str, ...]] = ()
    device: str | None = None

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

    def tune_session(self, folder: Path, tuned: Tuned, examples: Sequence[Example]) -> dict[str, Any] | None:
        """Find how what was written runs fastest here and write that beside it; None where nothing can be set.

        Args:
            folder: What was written.
            tuned: Whose it is; its model is gone.
            examples: Held-out rows to try settings on.

        Returns:
            What the receipt says: provider, why, what was tried and what was best.
        """
        return None
