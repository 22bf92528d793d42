"""What a comparison of two models found. No numpy in here: cards of it are drawn in kernels."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

_CHANCE = 0.05


@dataclass(frozen=True)
class Comparison:
    """A metric of two models over the same rows.

    Attributes:
        title: What cards call the metric.
        base: Its value for the base model.
        tuned: Its value for the tuned model.
        difference: tuned - base.
        low: Lower end of the 95% interval of the difference.
        high: Upper end.
        higher_is_better: Which way is good.
        p: How likely chance alone makes a difference as large, in [0, 1]; None where no test was made.
        test: ``McNemar`` or ``permutation``; empty where none was made.
    """

    title: str
    base: float
    tuned: float
    difference: float
    low: float
    high: float
    higher_is_better: bool
    p: float | None = None
    test: str = ""

    @property
    def verdict(self) -> str:
        """better, worse, or unclear where the interval holds 0 or chance does as well once in twenty times."""
        if self.low <= 0 <= self.high or (self.p is not None and self.p > _CHANCE):
            return "unclear"
        return "better" if (self.difference > 0) == self.higher_is_better else "worse"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a plain mapping."""
        return asdict(self)
