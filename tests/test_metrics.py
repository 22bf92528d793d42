"""Each metric against an independent reference, on rows drawn at random and on hard ones."""

import json
import math

import numpy as np
import pytest
from sklearn import metrics as sklearn

from tune_magic import plugins
from tune_magic.evaluation.compare import compare
from tune_magic.evaluation.measures import Measure, mean, measure_of
from tune_magic.models.find import installed

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
