"""How several adapters become one: which, by which weights, in which way, and the recipe of what comes out."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tune_magic.errors import TuneError
from tune_magic.recipe.build import build_recipe
from tune_magic.recipe.schema import Recipe

WAYS = {
    "linear": "weighted sums of the matrices A and of B, the weight's root in each: rough, since the product of sums is not the sum of products",
    "cat": "the matrices side by side: exactly the weighted sum of the updates, its rank the sum of the ranks",
    "svd": "the best approximation of the weighted sum by an update of the rank wanted",
    "ties": "of A and of B the largest entries, of those the ones of the sign that prevails, averaged (Yadav et al. 2023, arXiv:2306.01708)",
    "ties_svd": "the same of the updates themselves, then approximated",
    "dare_linear": "entries of A and of B left out at random, the others scaled up, then as linear (Yu et al. 2023, arXiv:2311.03099)",
    "dare_ties": "entries left out at random instead of the smallest, then as ties",
    "dare_linear_svd": "dare_linear of the updates themselves, then approximated",
    "dare_ties_svd": "dare_ties of the updates themselves, then approximated",
    "magnitude_prune": "of A and of B the largest entries, then as linear",
    "magnitude_prune_svd": "the same of the updates themselves, then approximated",
}  # fmt: skip
_PRUNES = ("ties", "dare", "magnitude_prune")
_DENSITY = 0.5


@dataclass(frozen=True)
class Combination:
    """What is to be combined, and how.

    Attributes:
        weights: By the name of each adapter; negative ones take away.
        how: One of `WAYS`.
        density: Share of entries that stay, above 0 and at most 1, of ways that leave some out; default there: 0.5.
        rank: Of the result, of ways that approximate; default: the largest of the adapters'.
        seed: Of what is left out at random.
    """

    weights: Mapping[str, float]
    how: str = "linear"
    density: float | None = None
    rank: int | None = None
    seed: int = 0

    @property
    def approximates(self) -> bool:
        """Whether the result is the best of its rank, whatever the adapters' ranks."""
        return self.how.endswith("svd")

    @property
    def prunes(self) -> bool:
        """Whether entries are left out."""
        return self.how.startswith(_PRUNES)

    @property
    def share_kept(self) -> float | None:
        """The density, with its default; None of ways that leave nothing out."""
        return None if not self.prunes else _DENSITY if self.density is None else self.density

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready keywords, the default density filled in."""
        return {**asdict(self), "weights": dict(self.weights), "density": self.share_kept}

    def check(self, ranks: Mapping[str, int]) -> None:
        """Find everything that is wrong with it.

        Args:
            ranks: Of the adapters, by name.

        Raises:
            TuneError: Every fault at once.
        """
        faults = [*self._faults_of_weights(), *self._faults_of_way(ranks)]
        if faults:
            raise TuneError(f"These adapters cannot be combined: {'; '.join(faults)}.")

    def result_rank(self, ranks: Mapping[str, int]) -> int:
        """Return the rank of what comes out."""
        of_each = [ranks[name] for name in self.weights]
        if self.how == "cat":
            return sum(of_each)
        return self.rank if self.approximates and self.rank else max(of_each)

    def _faults_of_weights(self) -> list[str]:
        faults = [
            f"the weight of {name} must be a number other than 0, got {weight!r}"
            for name, weight in self.weights.items()
            if isinstance(weight, bool) or not math.isfinite(weight) or weight == 0
        ]
        least = 1 if self.how in ("linear", "cat") else 2
        if len(self.weights) < least:
            faults.append(f"`{self.how}` takes {least} or more, got {len(self.weights)}")
        return faults

    def _faults_of_way(self, ranks: Mapping[str, int]) -> list[str]:
        if self.how not in WAYS:
            near = difflib.get_close_matches(self.how, WAYS, n=1)
            advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(WAYS)}"
            return [f"there is no way called `{self.how}`, {advice}"]
        faults = []
        if self.density is not None and not self.prunes:
            faults.append(f"`{self.how}` leaves nothing out, so it has no density")
        elif self.density is not None and not 0 < self.density <= 1:
            faults.append(f"density must be above 0 and at most 1, got {self.density:g}")
        if self.rank is not None and not self.approximates:
            faults.append(f"the rank of `{self.how}` follows from the adapters'; `svd` takes one")
        elif self.rank is not None and self.rank < 1:
            faults.append(f"rank must be at least 1, got {self.rank}")
        mine = {name: ranks[name] for name in self.weights}
        if len(set(mine.values())) > 1 and self.how != "cat" and not self.approximates:
            each = ", ".join(f"r={rank} in {name}" for name, rank in mine.items())
            faults.append(f"`{self.how}` needs one rank in all, got {each}; `cat` and `svd` take any")
        return faults


def merged_recipe(recipes: Mapping[str, Recipe], combination: Combination) -> Recipe:
    """Return the recipe of what comes out: that of the first adapter, with the rank and the layers of the result.

    Args:
        recipes: Of the adapters, all of method lora, by name.
        combination: How they are combined.

    Raises:
        TuneError: Their layers are named in ways that cannot be joined.
    """
    methods: dict[str, Any] = {name: recipes[name].method for name in combination.weights}
    rank = combination.result_rank({name: method.r for name, method in methods.items()})
    layers = _joined([method.target_modules for method in methods.values()])
    method = {"name": "lora", "r": rank, "lora_alpha": rank, "target_modules": layers}
    return build_recipe({**recipes[next(iter(methods))].given(), "method": method})


def _joined(found: Sequence[str | list[str]]) -> str | list[str]:
    """Return the layers that any of several adapters goes to, as a recipe names them."""
    if all(one == found[0] for one in found):
        return found[0]
    if "all-linear" in found and all(one == "all-linear" or not isinstance(one, str) for one in found):
        return "all-linear"
    if "all-linear" not in found and all(isinstance(one, str) for one in found):
        return "|".join(f"({one})" for one in found)
    if not any(isinstance(one, str) for one in found):
        return sorted({name for one in found for name in one})
    raise TuneError(
        "These adapters cannot be combined: one names its layers by a pattern, another by a list.",
        hint="Train them with `target_modules` of one kind.",
    )
