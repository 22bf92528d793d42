"""What every exporter must do."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from tune_magic import launching
from tune_magic.exporters.job import export
from tune_magic.handles import Run
from tune_magic.testing.rows import rows_of
from tune_magic.testing.trial import Conformance, do


class ExporterConformance(Conformance):
    """Tests of an `Exporter`: what it wrote is the trained model, opened from the files alone.

    Attributes:
        method: What the exported model was trained with.
    """

    kind = "exporter"
    method: ClassVar[Any] = {"name": "lora", "r": 4}

    @classmethod
    def new(cls) -> Run:
        """Make the run that is exported."""
        return cls.make(cls.rows or rows_of(("messages",)), method=cls.method)

    def test_what_is_written_is_the_model(self) -> None:
        """The receipt compares it with the trained model over held-out rows."""
        job = launching.new_job(self.trained(self.new), "export", {"to": self.called(), "rows": 3})
        do(export, job)
        receipt = json.loads((job.path / "receipt.json").read_text(encoding="utf-8"))
        assert receipt["files"], "nothing was written"
        assert receipt["parity"]["ok"] is True, receipt["parity"]["complaints"]
