"""ipywidgets panels. Callbacks only leave requests or set events; every panel has a form without widgets."""

from tune_magic.widgets.chat_panel import ChatPanel
from tune_magic.widgets.compare_panel import ComparePanel
from tune_magic.widgets.data_panel import DataPanel
from tune_magic.widgets.export_panel import ExportPanel
from tune_magic.widgets.finetune_panel import FinetunePanel
from tune_magic.widgets.memory_gauge import MemoryGauge
from tune_magic.widgets.rate_panel import RatePanel
from tune_magic.widgets.run_panel import RunPanel

__all__ = [
    "ChatPanel",
    "ComparePanel",
    "DataPanel",
    "ExportPanel",
    "FinetunePanel",
    "MemoryGauge",
    "RatePanel",
    "RunPanel",
]
