"""A metric: the words that answer and reference share."""

from __future__ import annotations

from tune_magic.evaluation.metrics import Metric


class WordOverlap(Metric):
    """Words in both, as a share of the words in either, whatever their order."""

    title = "word overlap"

    def score(self, answer: str, reference: str) -> float:
        """Return a share in [0, 1]; two texts without words are the same."""
        ours, theirs = set(answer.lower().split()), set(reference.lower().split())
        either = ours | theirs
        return len(ours & theirs) / len(either) if either else 1.0
