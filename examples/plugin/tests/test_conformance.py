"""The four plug-ins keep the contracts of their kinds."""

from tune_magic_example.callback import SmoothedLoss
from tune_magic_example.method import OutputScale
from tune_magic_example.metric import WordOverlap
from tune_magic_example.objective import FocalTokens

from tune_magic.testing import CallbackConformance, MethodConformance, MetricConformance, ObjectiveConformance


class TestOutputScale(MethodConformance):
    plugin = OutputScale


class TestFocalTokens(ObjectiveConformance):
    plugin = FocalTokens
    options = {"gamma": 2.0}


class TestWordOverlap(MetricConformance):
    plugin = WordOverlap


class TestSmoothedLoss(CallbackConformance):
    plugin = SmoothedLoss
    options = {"decay": 0.5}
