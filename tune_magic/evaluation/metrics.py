"""Metrics that compare an answer with its reference, one number a row."""

from __future__ import annotations

import abc
import functools
from typing import Any, ClassVar


class Metric(abc.ABC):
    """Base class of metrics, and their contract: a score a row, averaged over rows.

    Attributes:
        title: What cards call it.
        higher_is_better: Which way is good.
    """

    title: ClassVar[str]
    higher_is_better: ClassVar[bool] = True

    @abc.abstractmethod
    def score(self, answer: str, reference: str) -> float:
        """Return the score of one answer."""


class ExactMatch(Metric):
    """1 where the answer is the reference, white space at both ends aside."""

    title = "exact match"

    def score(self, answer: str, reference: str) -> float:
        """Return 1.0 or 0.0."""
        return float(answer.strip() == reference.strip())


class RougeL(Metric):
    """F-measure of the longest common subsequence of words (Lin 2004, ROUGE), by the rouge-score package."""

    title = "ROUGE-L"

    def score(self, answer: str, reference: str) -> float:
        """Return the F-measure in [0, 1]."""
        return float(_scorer().score(reference, answer)["rougeL"].fmeasure)


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)
