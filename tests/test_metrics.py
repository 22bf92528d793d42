"""Each metric against an independent reference, on rows drawn at random and on hard ones."""

import json
import math

import numpy as np
import pytest
from sklearn import metrics as sklearn

from tune_magic import plugins
from tune_magic.errors import TuneError
from tune_magic.evaluation.by_evaluate import metric_called
from tune_magic.evaluation.class_metrics import OfEachLabel
from tune_magic.evaluation.compare import compare
from tune_magic.evaluation.curves import curves_of
from tune_magic.evaluation.measures import Measure, mean, measure_of
from tune_magic.models.find import installed
from tune_magic.view.curves import curves_figure
from tune_magic.view.figure import svg

DRAW = np.random.default_rng(7)
GIVEN = DRAW.integers(4, size=90)
LIKELY = DRAW.dirichlet(np.ones(4), size=90)
LIKELY[::3] = 0.6 * np.eye(4)[GIVEN[::3]] + 0.1  # a third is well known
TIED = np.round(LIKELY, 1) + 1e-9
TIED /= TIED.sum(-1, keepdims=True)
CHOSEN = LIKELY.argmax(-1)


def metric(name):
    return plugins.get("metric", name)()


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("macro_precision", lambda g, c: sklearn.precision_score(g, c, average="macro", zero_division=0)),
        ("macro_recall", lambda g, c: sklearn.recall_score(g, c, average="macro", zero_division=0)),
        ("balanced_accuracy", sklearn.balanced_accuracy_score),
        ("weighted_f1", lambda g, c: sklearn.f1_score(g, c, average="weighted", zero_division=0)),
        ("mcc", sklearn.matthews_corrcoef),
    ],
)
@pytest.mark.parametrize("chosen", [CHOSEN, GIVEN, np.zeros(90, dtype=int)], ids=["some", "all", "one class"])
@pytest.mark.filterwarnings("ignore:y_pred contains classes:UserWarning")
def test_scores_of_classes_are_those_of_scikit_learn(name, reference, chosen):
    assert float(metric(name).statistic(chosen, GIVEN)) == pytest.approx(float(reference(GIVEN, chosen)))


@pytest.mark.parametrize("likely", [LIKELY, TIED], ids=["apart", "tied"])
@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("roc_auc", lambda g, p: sklearn.roc_auc_score(g, p, multi_class="ovr")),
        ("average_precision", lambda g, p: sklearn.average_precision_score(np.eye(4)[g], p, average="macro")),
        ("brier", lambda g, p: ((p - np.eye(4)[g]) ** 2).sum(-1).mean()),
    ],
)
def test_scores_of_probabilities_are_those_of_scikit_learn(name, reference, likely):
    found = metric(name)
    assert float(found.statistic(found.values(likely, GIVEN))) == pytest.approx(float(reference(GIVEN, likely)))


def test_top_3_is_that_of_scikit_learn():
    found = metric("top_3")
    expected = sklearn.top_k_accuracy_score(GIVEN, LIKELY, k=3)
    assert float(found.statistic(found.values(LIKELY, GIVEN))) == pytest.approx(expected)


def test_calibration_is_the_gap_between_sure_and_right():
    """Choices that are 0.75 sure and right in three of four rows are calibrated; always right, they are 0.25 off."""
    found, likely = metric("calibration_error"), np.tile([0.75, 0.25], (40, 1))
    right_in_three_of_four = np.tile([0, 0, 0, 1], 10)
    assert float(found.statistic(found.values(likely, right_in_three_of_four))) == pytest.approx(0.0)
    assert float(found.statistic(found.values(likely, np.zeros(40, dtype=int)))) == pytest.approx(0.25)


ANSWERS = ["the cat sat on the mat", "a dog barks", "", "it rains in Spain, mainly on the plain", "yes"]
WANTED = ["the cat is on the mat", "the dog barks loudly", "no", "rain in Spain falls mainly on the plain", "yes"]


def test_bleu_is_that_of_sacrebleu_for_any_rows():
    import sacrebleu

    found = metric("bleu")
    values = found.values(ANSWERS, WANTED)
    for rows in ([0, 1, 2, 3, 4], [0, 0, 3], [2], [4, 4]):
        expected = sacrebleu.corpus_bleu([ANSWERS[i] for i in rows], [[WANTED[i] for i in rows]]).score
        assert float(found.statistic(values[rows])) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "answer", "reference", "expected"),
    [
        ("token_f1", "The red car!", "a red car", 1.0),
        ("token_f1", "red", "red car", 2 / 3),
        ("rouge_1", "a b c", "a b d", 2 / 3),
        ("rouge_2", "a b c", "a b d", 0.5),
        ("chrf", "yes", "yes", 100.0),
        ("meteor", "cats", "cat", 0.5),  # stems match; one word alone is one chunk, whose penalty is a half
        ("meteor", "", "cat", 0.0),
        ("number_match", "So 3 + 4 makes 7.", "#### 7", 1.0),
        ("number_match", "about 1,200.50", "1200.5", 1.0),
        ("number_match", "seven", "7", 0.0),
        ("json_fields", '{"a": 1, "b": "x"}', '{"a": 1, "b": "y"}', 0.5),
        ("json_fields", 'Here: ```json\n{"a": 1}\n```', '{"a": 1}', 1.0),
        ("json_fields", '```\n{"a": 1}\n```', '{"a": 1}', 1.0),
        ("json_fields", "a is 1", '{"a": 1}', 0.0),
        ("json_fields", "[1, 2]", "[1,2]", 1.0),
    ],
)
def test_scores_of_answers(name, answer, reference, expected):
    assert metric(name).score(answer, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "answer", "parses"),
    [
        ("json_fields", 'Sure! {"a": [1, {"b": 2}]} Anything else?', True), ("json_fields", "{'a': 1}", False),
        ("json_fields", "{" * 5000, False), ("number_match", "-1.5e3", True), ("number_match", "none", False),
        ("exact_match", "", True),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_known(name, answer, parses):
    assert metric(name).parses(answer) is parses


@pytest.mark.skipif("minilm-l6" not in installed(), reason="MiniLM is not installed: make install")
def test_alike_in_meaning_is_not_alike_in_words():
    values = metric("semantic_similarity").values(
        ["The cat sleeps.", "The cat sleeps."], ["A kitten naps.", "Taxes rise."]
    )
    assert values[0, 0] > values[1, 0] + 0.3


def test_mcnemar_is_the_binomial_test_of_the_rows_that_differ():
    base, tuned = np.zeros((20, 1)), np.zeros((20, 1))
    tuned[:9], base[9:11] = 1.0, 1.0
    found = compare(Measure("exact match"), base, tuned)
    expected = 2 * sum(math.comb(11, k) for k in range(3)) / 2**11
    assert (found.test, found.p) == ("McNemar", pytest.approx(expected))
    assert compare(Measure("exact match"), base, base).p == 1.0


def test_the_permutation_test_is_exact_where_all_swaps_can_be_counted():
    """Six differences of one sign and size: of 64 swaps two are as extreme."""
    found = compare(Measure("loss"), np.full((6, 1), 2.0), np.full((6, 1), 1.5))
    assert found.test == "permutation"
    assert found.p == pytest.approx(2 / 64, abs=0.006)


def test_chance_finds_a_difference_as_often_as_it_says():
    draw, found = np.random.default_rng(1), []
    for seed in range(200):
        sides = draw.normal(size=(2, 30, 1))
        found.append(compare(Measure("x"), *sides, seed=seed, resamples=400).p < 0.1)
    assert 8 <= sum(found) <= 34  # 20 are expected


def test_rows_that_are_not_read_are_left_out_of_both():
    base, tuned = np.array([[1.0], [np.nan], [3.0]]), np.array([[2.0], [50.0], [np.nan]])
    found = compare(Measure("x", mean), base, tuned)
    assert (found.base, found.tuned) == (1.0, 2.0)


def test_very_many_rows_are_compared_in_little_memory():
    import tracemalloc

    values = np.random.default_rng(0).random((2, 100_000, 1))
    tracemalloc.start()
    found = compare(Measure("x"), *values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.low < found.difference < found.high
    assert peak < 250e6
    assert json.loads(json.dumps(found.to_dict()))["test"] == "permutation"


def test_one_row_proves_nothing():
    assert compare(Measure("exact match"), np.zeros((1, 1)), np.ones((1, 1))).verdict == "unclear"


@pytest.mark.parametrize("name", ["top_3", "exact_sets", "class_accuracy", "span_exact_match", "found_first"])
def test_rows_that_are_right_or_wrong_have_the_exact_test(name):
    base, tuned = np.zeros((9, 1)), np.ones((9, 1))
    assert compare(measure_of(metric(name)), base, tuned).test == "McNemar"


@pytest.fixture
def script(tmp_path):
    """Write the script of a metric as the `evaluate` package loads it, which scores how many are alike."""

    def write(name, kind="string", scores='"{name}": alike', nested=False):
        feature = f'datasets.Value("{kind}")'
        references = f"datasets.Sequence({feature})" if nested else feature
        path = tmp_path / name / f"{name}.py"
        path.parent.mkdir()
        path.write_text(
            "import datasets\nimport evaluate\n\n\nclass Own(evaluate.Metric):\n"
            "    def _info(self):\n"
            "        features = datasets.Features("
            f'{{"predictions": {feature}, "references": {references}}})\n'
            "        return evaluate.MetricInfo(description='', citation='', features=features)\n\n"
            "    def _compute(self, predictions, references):\n"
            "        alike = sum(p in (r if isinstance(r, list) else [r]) for p, r in zip(predictions, references)) / len(references)\n"
            f"        return {{{scores.format(name=name)}}}\n"
        )
        return f"evaluate:{path.parent}"

    return write


@pytest.mark.parametrize("nested", [False, True])
def test_metrics_of_the_evaluate_package_score_texts(script, nested):
    own = metric_called(script(f"alike_{nested}".lower(), nested=nested))
    measure, generator = measure_of(own), np.random.default_rng(0)
    wanted = ["a", "b", "c", "d"] * 10
    base, tuned = (
        own.values([w if generator.random() < share else "x" for w in wanted], wanted) for share in (0.3, 0.9)
    )
    found = compare(measure, base, tuned)
    assert found.base < 0.5 < 0.8 < found.tuned == pytest.approx(measure.of(tuned))
    assert found.low < found.difference < found.high and found.verdict == "better"
    assert measure.resamples == 100


def test_metrics_of_the_evaluate_package_score_classes(script):
    own = metric_called(script("alike_classes", kind="int32"), of_classes=True)
    chosen, given = np.array([[0, 1, 1], [2, 2, 2]]), np.array([0, 1, 2])
    assert own.statistic(chosen, given).tolist() == pytest.approx([2 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("scores", "key", "says"),
    [
        ('"one": 1.0, "two": alike', "", "gives one, two"),
        ('"one": "x"', "", "gives no number"),
        ('"one": 1.0', "#three", "gives one"),
    ],
)
def test_which_score_of_several_must_be_said(script, scores, key, says):
    name = f"several_{abs(hash(scores + key))}"
    own = metric_called(script(name, scores=scores) + key)
    with pytest.raises(TuneError, match=says):
        own.statistic(own.values(["a"], ["a"]))


def test_a_score_of_several_is_chosen(script):
    own = metric_called(script("chosen", scores='"one": 1.0, "two": 0.25') + "#two")
    assert own.statistic(own.values(["a"], ["a"])) == 0.25


def test_a_metric_that_is_nowhere_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(TuneError, match="cannot be loaded") as error:
        metric_called(f"evaluate:{tmp_path / 'nowhere'}")
    assert "a folder with the metric's script needs no network" in str(error.value.hint)


def test_errors_of_such_a_metric_name_it(script):
    own = metric_called(script("numbers", kind="float32"))
    with pytest.raises(TuneError, match="cannot score this"):
        own.statistic(own.values(["no number"], ["none"]))


HAS = DRAW.random((60, 5)) < np.array([0.2, 0.5, 0.8, 0.0, 1.0])  # of two labels all rows have it, or none
LABEL_P = np.clip(0.6 * HAS + 0.5 * DRAW.random((60, 5)), 0.01, 0.99)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("roc_auc", lambda: sklearn.roc_auc_score(HAS[:, :3], LABEL_P[:, :3], average="macro")),
        ("average_precision", lambda: sklearn.average_precision_score(HAS[:, :3], LABEL_P[:, :3], average="macro")),
        ("brier", lambda: 2 * np.mean((LABEL_P - HAS) ** 2)),  # both of having it and of not having it
    ],
)
def test_labels_are_scored_one_by_one(name, reference):
    own = OfEachLabel(metric(name))
    values = own.values(list(LABEL_P), list(HAS.astype(np.float32)))
    assert measure_of(own).of(values) == pytest.approx(reference())
    many = np.stack([values, values[::-1]])
    assert own.statistic(many) == pytest.approx([reference()] * 2)
    assert OfEachLabel(metric(name)).statistic(values) == pytest.approx(reference())  # numbers that were kept


def test_curves_are_those_of_scikit_learn():
    found = curves_of(LIKELY, GIVEN, list("abcd"))
    assert set(found["roc"]) == set("abcd")
    for number, name in enumerate("abcd"):
        x, y = np.array(found["roc"][name]).T
        assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
        assert np.trapezoid(y, x) == pytest.approx(sklearn.roc_auc_score(number == GIVEN, LIKELY[:, number]), abs=0.02)
        assert found["precision_recall"][name][-1][0] == 1.0
    tenths = np.array(found["calibration"])
    assert tenths[:, 2].sum() == len(GIVEN)
    gap = (np.abs(tenths[:, 0] - tenths[:, 1]) * tenths[:, 2]).sum() / len(GIVEN)
    assert gap == pytest.approx(
        measure_of(metric("calibration_error")).of(metric("calibration_error").values(LIKELY, GIVEN))
    )
    assert svg(curves_figure(found)).startswith(b"<?xml") and len(svg(curves_figure(found))) < 30_000


def test_a_hundred_thousand_rows_make_no_longer_curves():
    given = np.arange(100_000) % 2
    likely = np.stack([np.linspace(0, 1, 100_000)] * 2, axis=-1)
    found = curves_of(likely, given, ["a", "b"])
    assert max(len(points) for points in found["roc"].values()) <= 32
