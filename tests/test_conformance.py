"""Every installed plug-in keeps the contract of its kind; what breaks it is found out."""

import contextlib

import pytest
import torch

from tune_magic import plugins
from tune_magic.data.content import PromptCompletion
from tune_magic.data.formats.base import BadRow
from tune_magic.evaluation.metrics import Metric
from tune_magic.methods.lora import Lora
from tune_magic.objectives.sft import SFT
from tune_magic.testing import (
    CallbackConformance,
    ExporterConformance,
    FormatConformance,
    MethodConformance,
    MetricConformance,
    ObjectiveConformance,
)
from tune_magic.testing.rows import rows_of
from tune_magic.training.callbacks import Callback
from tune_magic.training.prepare import build_model

OPTIONS = {
    "lora": {"r": 4}, "vera": {"r": 16}, "oft": {"oft_block_size": 8}, "bottleneck": {"bottleneck_size": 8},
    "prompt": {"num_virtual_tokens": 6}, "p_tuning": {"num_virtual_tokens": 6}, "prefix": {"num_virtual_tokens": 6},
    "freeze": {"trainable_layers": 1},
}  # fmt: skip
TRAINED = (
    "lora",
    "full",
    "bottleneck",
    "prefix",
    "sft",
    "classify",
)  # without --full; tests of methods train the others
IMAGE_OR_SOUND = ("image_label", "audio_label")
FORMATS = {
    "conversations": [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}],
    "oasst": [
        {"message_id": "1", "parent_id": None, "role": "prompter", "text": "q"},
        {"message_id": "2", "parent_id": "1", "role": "assistant", "text": "a"},
    ],
    "pair_label": [{"sentence1": "a", "sentence2": "b", "label": "x"}],
    "extractive": [{"question": "q", "context": "it is so", "answers": ["so"]}],
    "pairs": [{"anchor": "a", "positive": "b"}],
    "text_domain": [{"text": "a", "domain": "x", "label": "y"}],
    "text_score": [{"text": "a", "score": 0.5}],
    "text_task": [{"text": "a", "task": "x", "label": "y"}],
    "rated": [{"prompt": "a", "completion": "b", "label": True}],
    "scored_pairs": [{"sentence1": "a", "sentence2": "b", "score": 0.5}],
    "translation": [{"translation": {"en": "a", "de": "b"}}],
}


def classes_of(kind, base, **members):
    """Make a test class of each installed plug-in of a kind."""
    for name, plugin in plugins.working(kind):
        about = {"plugin": plugin, "name": name, "options": OPTIONS.get(name, {})}
        about |= {key: value(name) for key, value in members.items()}
        yield f"Test_{kind}_{name}", type(f"Test_{kind}_{name}", (base,), about)


def format_rows(name):
    with contextlib.suppress(ValueError):
        return FORMATS.get(name) or rows_of((name,), 4)
    return None


globals().update(classes_of("method", MethodConformance))
# Other models than a tiny language model or encoder, a teacher, losses that are no sum over rows, a gradient that is
# reversed on purpose: test_objectives.py and test_distill.py have each of these.
APART = ("classify_audio", "classify_image", "distill", "distill_classes", "domain_adversarial", "embed", "seq2seq")
globals().update({
    name: test for name, test in classes_of("objective", ObjectiveConformance) if test.name not in APART
})  # fmt: skip
NUMBERS = ([1.0, 2.5, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0])
SETS = ([["a"], ["a", "b"], []], [["a"], ["b"], ["c"]], [["a"], ["b"], ["c"]])
TAGS = ([["O", "B-x"], ["B-y"]], [["O", "B-x"], ["B-x"]], [["O", "B-x"], ["B-x"]])
RANKS = ([1, 3, 2], [1, 1, 1], [1, 1, 1])
TEXTS = (["a red car", "b"], ["a red car stops here", "c d"], ["a red car stops here", "c d"])
SPANS = (["a red car", "b"], [["a red car"], ["c", "d"]], ["a red car", "d"])
FINDINGS = {
    "class_accuracy": (["a", "b", "c"], ["a", "b", "b"], ["a", "b", "b"]), "entity_f1": TAGS, "tag_accuracy": TAGS, "exact_sets": SETS,
    "bleu": TEXTS, "semantic_similarity": TEXTS, "micro_f1": SETS, "found_first": RANKS, "reciprocal_rank": RANKS, "span_exact_match": SPANS, "span_f1": SPANS,
} | dict.fromkeys(("mean_absolute_error", "pearson", "r_squared", "spearman"), NUMBERS)  # fmt: skip


def perfect_score(name):
    if name in ("mean_absolute_error", "brier", "calibration_error"):
        return 0.0
    return {"bleu": None, "chrf": 100.0, "meteor": None}.get(name, 1.0)  # BLEU of very short texts; an order's penalty


globals().update(classes_of("metric", MetricConformance, findings=FINDINGS.get, perfect=perfect_score))
formats = dict(classes_of("format", FormatConformance, rows=format_rows))
globals().update({name: test for name, test in formats.items() if test.rows})


@pytest.fixture(autouse=True)
def sampled(request, full):
    """Training tests of some plug-ins only, unless all are wanted."""
    test = request.cls
    if test is None:
        return
    trains = not any(word in request.node.name for word in ("says_what", "facts"))
    if test.kind in ("method", "objective") and trains and not full and test.name not in TRAINED:
        pytest.skip("sampled: --full trains with every plug-in")


def test_every_format_of_texts_has_rows_here():
    assert {name.removeprefix("Test_format_") for name, test in formats.items() if not test.rows} <= {*IMAGE_OR_SOUND}


class Test_adapter(ExporterConformance):
    plugin = plugins.get("exporter", "adapter")
    name = "adapter"


class Test_gguf(ExporterConformance):
    plugin = plugins.get("exporter", "gguf")
    name = "gguf"


class Mean(Callback):
    """Logs the mean loss so far."""

    total = 0.0

    def on_step(self, step, numbers):
        self.total += numbers["loss"]
        return {"mean": self.total / step}

    def state(self):
        return {"total": self.total}

    def load_state(self, state):
        self.total = state["total"]


class Test_mean(CallbackConformance):
    plugin = Mean
    name = "mean"


# --- what is broken is found -------------------------------------------------------------------------------------------
class Forgetful(Mean):
    """Its state is not kept."""

    def state(self):
        return {}

    def load_state(self, state):
        pass


class Meddles(Mean):
    """Changes what it only should look at."""

    def on_step(self, step, numbers):
        with torch.no_grad():
            next(p for p in self.training.model.parameters() if p.requires_grad).mul_(1.001)


class Averages(SFT):
    """A mean instead of a sum."""

    def loss_sum(self, states):
        return super().loss_sum(states) / len(states.targets)


class Detached(SFT):
    """A gradient that is not the loss's."""

    def loss_sum(self, states):
        log_p = states.log_probs()
        return (log_p.detach() * log_p * states.weights).sum()


class NoJson(SFT):
    """Facts that are no JSON."""

    def facts(self):
        return {"seen": (1, 2)}


class Headless(Lora):
    """Leaves a classifier's new head as it came."""

    def apply(self, model, task):
        wrapped = super().apply(model, task)
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.requires_grad_(False)
        return wrapped


class Mergeless(Lora):
    """Says it merges, and loses what was trained."""

    def merge(self, model):
        return model.unload()


class Changed(Lora):
    """Says that the base is in there, and shows the tuned model."""

    def without(self, model):
        return contextlib.nullcontext()


class Drawing(Lora):
    """Trains other parameters each time."""

    calls = 0

    def apply(self, model, task):
        model = super().apply(model, task)
        type(self).calls += 1
        for name, parameter in model.named_parameters():
            if "lora" in name and f"layers.{self.calls % 2}" in name:
                parameter.requires_grad_(False)
        return model


class Greedy(Metric):
    title = "greedy"

    def score(self, answer, reference):
        return len(answer) / len(reference)


class Careless(plugins.get("format", "prompt_completion")):
    def content(self, values):
        return PromptCompletion(values["prompt"].strip(), values["completion"])


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("base", "plugin", "test"),
    [
        (CallbackConformance, Forgetful, "test_a_stopped_run_ends_as_if_unbroken"),
        (CallbackConformance, Meddles, "test_it_changes_nothing"),
        (ObjectiveConformance, Averages, "test_the_loss_is_a_sum_over_rows"),
        (ObjectiveConformance, Detached, "test_its_gradient_is_that_of_its_loss"),
        (ObjectiveConformance, NoJson, "test_what_it_learned_is_json_and_makes_it_again"),
        (ObjectiveConformance, type("Silent", (SFT,), {"summary": ""}), "test_it_says_what_it_is"),
        (MethodConformance, Mergeless, "test_what_is_merged_is_the_model"),
        (MethodConformance, Changed, "test_the_base_is_still_in_there"),
        (MethodConformance, Headless, "test_a_classifier_learns_with_its_head"),
        (MethodConformance, Drawing, "test_a_checkpoint_holds_exactly_what_is_trained"),
        (MetricConformance, Greedy, "test_nothing_is_better_than_the_reference"),
        (MetricConformance, Greedy, "test_any_text_has_a_score"),
        (FormatConformance, Careless, "test_bad_rows_are_told"),
    ],
)
def test_what_breaks_its_contract_is_found_out(base, plugin, test):
    members = {"plugin": plugin, "name": "broken", "pairs": [("longer", "red")]}
    if base is MethodConformance:
        members |= {"options": {"r": 4}, "name": "lora"}
    if base is FormatConformance:
        members["rows"] = [{"prompt": "a", "completion": "b"}]
    case = type("Case", (base,), members)
    case.setup_class()
    try:
        with pytest.raises(Exception) as caught:
            getattr(case(), test)()
        assert not isinstance(caught.value, BadRow)
    finally:
        case.teardown_class()


def test_the_same_classes_pass_what_is_right():
    assert build_model is not None
    case = type("Case", (MetricConformance,), {"plugin": plugins.get("metric", "exact_match"), "name": "fine"})
    case.setup_class()
    case().test_nothing_is_better_than_the_reference()
    case.teardown_class()
    assert plugins.local("metric", "fine") is None
