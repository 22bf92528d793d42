"""ipywidgets panels. Callbacks only leave requests in a run folder; every panel has a form without widgets."""

from tune_magic.widgets.run_panel import RunPanel

__all__ = ["RunPanel"]
