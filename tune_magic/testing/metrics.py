"""What every metric must do."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import pytest

from tune_magic.evaluation.metrics import ClassMetric, Metric, OutputMetric, ProbabilityMetric
from tune_magic.testing.trial import Conformance

_HOSTILE = ("", " ", "\n", "\x00", "a" * 5000, "é☃😀", "<b>", "0", "nan")


class MetricConformance(Conformance):
    """Tests of a metric of any kind: finite, best where nothing is wrong, the same each time.

    Attributes:
        pairs: Answers and references that differ, for a metric of answers.
        findings: Of a metric over other findings, what was found in rows and what the rows were given, of which some
            are alike and some are not; and what would have been found where nothing is wrong.
        perfect: The score where nothing is wrong; None where it has no such bound.
    """

    kind = "metric"
    pairs: ClassVar[list[tuple[str, str]]] = [("blue", "red"), ("the red one", "the blue two"), ("", "red")]
    findings: ClassVar[tuple[list[Any], list[Any], list[Any]] | None] = None
    perfect: ClassVar[float | None] = 1.0

    def test_it_has_a_title(self) -> None:
        """Cards call it so."""
        assert self.plugin.title.strip()
        assert isinstance(self.plugin.higher_is_better, bool)

    def test_nothing_is_better_than_the_reference(self) -> None:
        """Every other answer scores no better."""
        if not issubclass(self.plugin, Metric):
            pytest.skip("it reads no answers")
        metric, sign = self.plugin(), 1 if self.plugin.higher_is_better else -1
        for answer, reference in self.pairs:
            best, score = metric.score(reference, reference), metric.score(answer, reference)
            assert sign * score <= sign * best, f"{answer!r} for {reference!r} scores {score}, the reference {best}"
            assert self.perfect is None or math.isclose(best, self.perfect), f"the reference scores {best}"

    def test_any_text_has_a_score(self) -> None:
        """Models answer anything, or nothing."""
        if not issubclass(self.plugin, Metric):
            pytest.skip("it reads no answers")
        metric = self.plugin()
        for answer in _HOSTILE:
            for reference in _HOSTILE:
                score = metric.score(answer, reference)
                assert isinstance(score, int | float), f"a number is wanted, got {score!r}"
                assert math.isfinite(score), f"{answer[:9]!r} for {reference[:9]!r} scores {score}"
                assert score == metric.score(answer, reference)

    def test_many_resamples_are_scored_at_once(self) -> None:
        """Shape (resamples, rows) gives (resamples,), each as alone; what is all right is `perfect`."""
        if not issubclass(self.plugin, ClassMetric):
            pytest.skip("it reads no classes")
        metric, draw = self.plugin(), np.random.default_rng(0)
        chosen, given = draw.integers(3, size=(20, 30)), draw.integers(3, size=(20, 30))
        scores = np.asarray(metric.statistic(chosen, given))
        assert scores.shape == (20,)
        assert np.isfinite(scores).all()
        alone = [float(metric.statistic(c, g)) for c, g in zip(chosen, given, strict=True)]
        np.testing.assert_allclose(scores, alone)
        if self.perfect is not None:
            np.testing.assert_allclose(metric.statistic(given, given), self.perfect)

    def test_probabilities_are_scored_from_numbers_of_each_row(self) -> None:
        """Numbers of each row, (rows, k), that make the score of any draw of rows; certainty of the right class is best."""
        if not issubclass(self.plugin, ProbabilityMetric):
            pytest.skip("it reads no probabilities")
        metric, draw = self.plugin(), np.random.default_rng(0)
        given = draw.integers(4, size=40)
        values = metric.values(draw.dirichlet(np.ones(4), size=40), given)
        assert values.shape[0] == 40 and values.ndim == 2
        rows = draw.integers(40, size=(20, 40))
        scores = np.asarray(metric.statistic(values[rows]))
        assert scores.shape == (20,) and np.isfinite(scores).all()
        np.testing.assert_allclose(scores, [float(metric.statistic(values[own])) for own in rows])
        sign = 1 if metric.higher_is_better else -1
        best = float(metric.statistic(metric.values(np.eye(4)[given], given)))
        assert sign * float(metric.statistic(values)) < sign * best
        assert self.perfect is None or math.isclose(best, self.perfect)

    def test_findings_are_scored_from_numbers_of_each_row(self) -> None:
        """Numbers of each row, (rows, k), that make the score of any draw of rows, many at once."""
        if not issubclass(self.plugin, OutputMetric):
            pytest.skip("it reads answers or classes")
        assert self.findings is not None, "set `findings` on the test class"
        found, given, right = self.findings
        metric, draw = self.plugin(), np.random.default_rng(0)
        values = metric.values(found, given)
        assert values.shape[0] == len(given) and values.ndim == 2
        rows = draw.integers(len(given), size=(20, len(given)))
        scores = np.asarray(metric.statistic(values[rows]))
        assert scores.shape == (20,)
        assert np.isfinite(scores).all()
        np.testing.assert_allclose(scores, [float(metric.statistic(values[own])) for own in rows])
        sign = 1 if metric.higher_is_better else -1
        best = float(metric.statistic(metric.values(right, given)))
        assert sign * float(metric.statistic(values)) < sign * best
        assert self.perfect is None or math.isclose(best, self.perfect)
