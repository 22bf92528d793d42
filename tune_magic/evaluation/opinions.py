"""What votes say together: who wins, whether chance would do as well, whether raters agree. No torch in here.

Shares come with Wilson's interval (Wilson 1927) and the exact binomial test, which over wins and losses is the sign
test (Dixon and Mood 1946): pairs without a winner are left out. Of several raters a row counts once, by their majority,
since votes on the same row are not independent. Agreement beyond chance is Cohen's kappa (Cohen 1960) of two raters,
Krippendorff's alpha (Krippendorff 2011, nominal) of more, over better, worse and neither.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tune_magic.evaluation.votes import SKIP, Vote

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Share:
    """How often something was so, of how many times.

    Attributes:
        count: Times it was so.
        total: Times it could have been.
        value: count / total; NaN of nothing.
        low: Lower end of the 95% interval.
        high: Upper end.
        p: How likely a coin does as far from half as this; 1 of nothing.
    """

    count: int
    total: int
    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Agreement:
    """How far raters of the same rows say the same.

    Attributes:
        raters: Those who voted on rows that others voted on, too.
        rows: On which two or more voted.
        same: Share of the pairs of votes on a row that are the same.
        beyond_chance: 1 when they always agree, 0 when chance would agree as often; None where everybody always said
            the same, which tells nothing.
        measure: What `beyond_chance` is.
    """

    raters: int
    rows: int
    same: float
    beyond_chance: float | None
    measure: str


def share(count: int, total: int) -> Share:
    """Return a share with its interval and p value.

    Example:
        >>> found = share(9, 10)
        >>> round(found.low, 3), round(found.high, 3), round(found.p, 4)
        (0.596, 0.982, 0.0215)
    """
    from scipy.stats import binomtest

    if not total:
        nan = float("nan")
        return Share(0, 0, nan, nan, nan, 1.0)
    test = binomtest(count, total)
    interval = test.proportion_ci(CONFIDENCE, method="wilson")
    return Share(count, total, count / total, float(interval.low), float(interval.high), float(test.pvalue))


def majority(votes: Iterable[Vote]) -> dict[int, int]:
    """Return of each row, by its place, whether more raters prefer the tuned model (1), the other (-1), or neither (0).

    Rows that everybody skipped are not there.
    """
    sums: dict[int, int] = defaultdict(int)
    for vote in votes:
        if vote.choice != SKIP:
            sums[vote.place] += _opinion(vote)
    return {place: (total > 0) - (total < 0) for place, total in sums.items()}


def agreement(votes: Sequence[Vote]) -> Agreement | None:
    """Return how far raters agree; None where no row was rated by two."""
    by_row: dict[int, dict[str, int]] = defaultdict(dict)
    for vote in votes:
        if vote.choice != SKIP:
            by_row[vote.place][vote.rater] = _opinion(vote)
    shared = {place: said for place, said in by_row.items() if len(said) > 1}
    if not shared:
        return None
    pairs = [a == b for said in shared.values() for a, b in itertools.combinations(said.values(), 2)]
    raters = sorted({rater for said in shared.values() for rater in said})
    measure = "Cohen's kappa" if len(raters) == 2 else "Krippendorff's alpha"
    is_known = len({opinion for said in shared.values() for opinion in said.values()}) > 1
    beyond = (_kappa if len(raters) == 2 else _alpha)(shared, raters) if is_known else None
    return Agreement(len(raters), len(shared), sum(pairs) / len(pairs), beyond, measure)


def prefers(tuned: float, other: float, *, higher_is_better: bool) -> int:
    """Return what a metric prefers of a row, as `majority` says it of people."""
    better = (tuned > other) - (tuned < other)
    return better if higher_is_better else -better


def choices(votes: Iterable[Vote]) -> Counter[str]:
    """Return how often each was chosen."""
    return Counter(vote.choice for vote in votes)


def _opinion(vote: Vote) -> int:
    return 0 if vote.better is None else 1 if vote.better == vote.sides[0] else -1


def _kappa(shared: Mapping[int, Mapping[str, int]], raters: Sequence[str]) -> float:
    from sklearn.metrics import cohen_kappa_score

    first, second = ([said[rater] for said in shared.values()] for rater in raters)
    return float(cohen_kappa_score(first, second))


def _alpha(shared: Mapping[int, Mapping[str, int]], raters: Sequence[str]) -> float:
    from nltk.metrics.agreement import AnnotationTask

    assert len(raters) > 2
    task = AnnotationTask(
        [(rater, place, opinion) for place, said in shared.items() for rater, opinion in said.items()]
    )
    return float(task.alpha())
