"""Choose a form for a tuned model, write it, and see its receipt."""

from __future__ import annotations

from typing import Any

import ipywidgets
from tune_magic.widgets.panel import Panel, button

from tune_magic import launching, plugins
from tune_magic.commands import COMMANDS, QUANTIZATIONS
from tune_magic.errors import TuneError
from tune_magic.executors import local
from tune_magic.follow import progress_bundle
from tune_magic.handles import Export, Run
from tune_magic.storage import places
from tune_magic.storage.state import TERMINAL
from tune_magic.view.html import Bundle, Html, bundle, note_bundle

_PERIOD_S = 0.5
_FIELD = ipywidgets.Layout(width="385px")
_STYLE = {"description_width": "120px"}
_WHOLE = "no: as trained"


def _kinds(to: str) -> list[tuple[str, str]]:
    """Return what a format may be quantised to, with its value; a plug-in's own is known to it alone, so all are offered."""
    every = next(flag for flag in COMMANDS["export"].flags if flag.name == "quantize").choices
    return [(_WHOLE, ""), *((kind, kind) for kind in QUANTIZATIONS.get(to, every))]


class ExportPanel(Panel):
    """Format, quantisation and folder; below them the progress, and the receipt of each export of the run.

    Args:
        run: A run with a checkpoint, or its name or id.

    Attributes:
        export: The last export that was written here, also one out of tolerance; None before.

    Raises:
        TuneError: There is no such run, or it has no checkpoint.

    Example:
        >>> ExportPanel("support_bot")  # doctest: +SKIP
    """

    def __init__(self, run: Run | str) -> None:
        self.run = run if isinstance(run, Run) else Run(places.find(run))
        self.run.best_checkpoint  # noqa: B018 - without one, say so now
        self.export: Export | None = None
        self._job: Run | None = None
        self._problem: str | None = None
        self._is_asked = False
        flags = {flag.name: flag for flag in COMMANDS["export"].flags}
        quantize, device = flags["quantize"], flags["device"]
        self.to = ipywidgets.Dropdown(
            options=plugins.names("exporter"), value="merged", description="format", layout=_FIELD, style=_STYLE,
            tooltip="adapter: PEFT's files; merged: a plain Transformers model; gguf: for llama.cpp; onnx: for ONNX Runtime; "
            "genai: for ONNX Runtime GenAI; onnx_adapters: a base, and the adapter in a file",
        )  # fmt: skip
        self.quantize = ipywidgets.Dropdown(
            options=_kinds("merged"), value="", description="quantise", tooltip=quantize.help, layout=_FIELD, style=_STYLE,
        )  # fmt: skip
        self.device = ipywidgets.Dropdown(
            options=[("cpu", ""), ("cuda", "cuda"), ("npu", "npu")], value="", description="device", tooltip=device.help, layout=_FIELD, style=_STYLE,
        )  # fmt: skip
        self.output = ipywidgets.Text(
            placeholder="inside the run folder", description="folder", layout=_FIELD, style=_STYLE,
            tooltip="A folder that does not exist yet",
        )  # fmt: skip
        self.rows = ipywidgets.BoundedIntText(
            0, min=0, max=100_000, description="rows", layout=_FIELD, style=_STYLE,
            tooltip="Held-out rows to compare with the trained model on; 0: 200 to classify, 8 to answer",
        )  # fmt: skip
        self.start = button(
            "Export", "Write the files and compare them with the model", self._ask, button_style="primary"
        )
        self.stop = button("Stop", "Break the export off", self._break_off)
        fields = ipywidgets.HBox(
            [self.to, self.quantize, self.device, self.output, self.rows],
            layout=ipywidgets.Layout(flex_flow="row wrap"),
        )
        super().__init__(ipywidgets.VBox([fields, ipywidgets.HBox([self.start, self.stop])]), _PERIOD_S)
        self.to.observe(self._offer_kinds, "value")
        for field in (self.to, self.quantize, self.device, self.output, self.rows):
            field.observe(self.wake, "value")

    def bundle(self) -> Bundle:
        """Return the progress, what went wrong, and the receipt."""
        parts = []
        if self._problem is not None:
            parts.append(note_bundle(self._problem))
        if self._is_at_work:
            assert self._job is not None
            parts.append(progress_bundle(self._job))
        if self.export is not None:
            parts.append(self.export.card())
        if not parts:
            return note_bundle(f"{self.run.name or self.run.id}: nothing was exported here yet.")
        html = Html("".join(part["text/html"] for part in parts))
        return bundle(html, [part["text/plain"] for part in parts])

    def act(self) -> None:
        """Start an export when asked, and see one end."""
        if self._is_asked and not self._is_at_work:
            self._is_asked = False
            self.settle()
            self._begin()
        if self._job is not None and not self._is_at_work:
            self._end(self._job)
        self.start.disabled, self.stop.disabled = self._is_at_work, not self._is_at_work

    @property
    def _is_at_work(self) -> bool:
        job = self._job
        return job is not None and (job.status not in TERMINAL or job.is_coming_up)

    def _begin(self) -> None:
        self._problem = None
        try:
            self._job = launching.begin_export(
                self.run, self.to.value, quantize=self.quantize.value or None, rows=self.rows.value or None,
                output=self.output.value.strip() or None, device=self.device.value or None,
            )  # fmt: skip
        except TuneError as error:
            self._problem = str(error)

    def _end(self, job: Run) -> None:
        self._job = None
        local.job_ended()
        if (job.path / "receipt.json").is_file():
            self.export = Export(job.path)
        try:
            job.raise_for_state()
        except TuneError as error:
            self._problem = str(error)

    def _break_off(self) -> None:
        if self._job is not None:
            Run(self._job.path).stop()

    def _offer_kinds(self, change: Any) -> None:
        """Offer the numbers that the chosen format knows; one that it does not know goes back to none."""
        kept, offered = self.quantize.value, _kinds(change["new"])
        self.quantize.options = offered
        self.quantize.value = kept if kept in [kind for _, kind in offered] else ""

    def _ask(self) -> None:
        self._is_asked = True
        self.wake()
