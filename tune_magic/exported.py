"""All exports of a run side by side: what each costs and what is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tune_magic import display
from tune_magic.errors import TuneError
from tune_magic.handles import Run

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class ExportedForms:
    """Exports of a run beside each other.

    Args:
        run: A run that was exported.

    Raises:
        TuneError: It was not.

    Example:
        >>> ExportedForms(run).table.sort_values("size_bytes")  # doctest: +SKIP
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.exports = run.exports
        if not self.exports:
            name = run.name or run.id
            raise TuneError(f"{name} was not exported yet.", hint=f"`%export {name} --to merged` writes it.")

    @property
    def table(self) -> pd.DataFrame:
        """A line an export; see `Run.export_table`."""
        return self.run.export_table()

    def plot(self) -> Figure:
        """Return quality and latency against size as a matplotlib figure."""
        return self.run.plot_exports()

    def card(self) -> dict[str, str]:
        """Return table and figure as HTML and as text."""
        from tune_magic.view.exports import exports_card

        return exports_card([export.receipt for export in self.exports], self.run.name or self.run.id)

    def show(self) -> None:
        """Show it: in a notebook as HTML, elsewhere as text."""
        display.show(self.card(), run=self.run)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return self.card()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {len(self.exports)} of {self.run.name or self.run.id}>"
