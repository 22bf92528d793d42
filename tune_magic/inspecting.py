"""What `tune_magic.inspect` returns: rows as they would be trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tune_magic import display
from tune_magic.handles import Run

if TYPE_CHECKING:
    import pandas as pd


class DataReport:
    """Rows before they are trained on.

    Args:
        job: A data job that has finished; its folder may go afterwards.

    Attributes:
        facts: What the card shows, by name: format, columns, numbers of rows and tokens, classes, label lens.

    Example:
        >>> tune_magic.inspect("tickets.jsonl").findings  # doctest: +SKIP
    """

    def __init__(self, job: Run) -> None:
        self.path = job.path  # tells it from others; the folder may be gone
        self.facts: dict[str, Any] = dict(job.summary().result)
        self._card = job.card()

    @property
    def findings(self) -> pd.DataFrame:
        """What should be looked at: kind, says, count of rows, the first rows (numbered from 1), change."""
        import pandas as pd

        return pd.DataFrame(self.facts["findings"], columns=["kind", "says", "count", "rows", "change"])

    def card(self) -> dict[str, str]:
        """Return the card as HTML and as text."""
        return self._card

    def show(self) -> None:
        """Show the card: in a notebook as HTML, elsewhere as text."""
        display.show(self._card)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": repr(self)} if display.was_shown(self.path) else self._card

    def __repr__(self) -> str:
        count = len(self.facts["findings"])
        return f"<{type(self).__name__} {self.facts['train_rows']} rows, {count} finding{'' if count == 1 else 's'}>"
