"""Conformance tests: subclass one in your package's own tests, name your plug-in, and pytest does the rest.

    from tune_magic.testing import MethodConformance

    class TestMine(MethodConformance):
        plugin = Mine
        options = {"r": 4}

Each trains a tiny random model that is made on the spot, within seconds, and needs neither network nor GPU.
docs/PLUGINS.md says what each contract is.
"""

from tune_magic.testing.callbacks import CallbackConformance
from tune_magic.testing.exporters import ExporterConformance
from tune_magic.testing.formats import FormatConformance
from tune_magic.testing.methods import MethodConformance
from tune_magic.testing.metrics import MetricConformance
from tune_magic.testing.models import make_encoder, make_model, make_tokenizer
from tune_magic.testing.objectives import ObjectiveConformance

__all__ = [
    "CallbackConformance", "ExporterConformance", "FormatConformance", "MethodConformance", "MetricConformance",
    "ObjectiveConformance", "make_encoder", "make_model", "make_tokenizer",
]  # fmt: skip
