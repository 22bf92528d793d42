"""Classification: class names, stratified splits, encoders and decoders, scores, probabilities."""

import contextlib
import errno
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from test_training import StopAt

import tune_magic
from tune_magic.data.split import split
from tune_magic.errors import RecipeError, RunFailed, TuneError
from tune_magic.evaluation.metrics import Accuracy, MacroF1
from tune_magic.executors import local
from tune_magic.objectives.classify import Classify, ClassifyOptions
from tune_magic.recipe import build_recipe
from tune_magic.testing import models as testing
from tune_magic.training import trunk
from tune_magic.training.rows import RowStates
from tune_magic.training.tuned import load_tuned
from tune_magic.view.card import card

COLOURS = ["blue", "green", "red"]


def make_encoder(folder, family="bert", **changes):
    """Save a two-layer encoder or decoder without a head, its keys and values shared where it knows that."""
    return testing.make_encoder(folder, family, **({"num_key_value_heads": 2} | changes))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("models") / "encoder")


def labelled(count=48, names=COLOURS):
    return [{"text": f"{names[i % len(names)]} thing {i}", "label": names[i % len(names)]} for i in range(count)]


@pytest.fixture
def intents(tmp_path):
    path = tmp_path / "intents.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in labelled()))
    return path


@pytest.fixture
def recipe(encoder, intents):
    return {
        "model": str(encoder), "data": {"train": str(intents), "held_out": 0.25}, "learning_rate": 5e-3,
        "method": {"name": "full"}, "batch_size": 8, "max_steps": 30, "max_length": 128, "eval": {"steps": 10},
    }  # fmt: skip


@pytest.mark.parametrize("method", ["full", "lora", "freeze"])
def test_each_method_trains_a_head_on_an_encoder(train, method):
    rate = 5e-3 if method == "full" else 2e-2
    run = train(method={"name": method}, objective="classify", learning_rate=rate)
    run.raise_for_state()
    plan = run.summary().plan
    assert plan["objective"] == {"name": "classify", "classes": COLOURS}
    first, last = run.summary().evaluations[0], run.summary().best
    assert last["loss"] < first["loss"]
    assert last["accuracy"] >= (0.9 if method != "freeze" else first["accuracy"])
    assert run.summary().samples[30]["items"][0]["answer"].split(" (")[0] in COLOURS
    trained = plan["trainable_parameters"] / plan["parameters"]
    assert {"full": trained == 1, "lora": 0 < trained < 0.5, "freeze": 0 < trained < 0.15}[method]


@pytest.mark.parametrize("family", ["distilbert", "roberta", "llama", "qwen2", "gpt2"])
@pytest.mark.sampled(2)
def test_other_encoders_and_decoders_learn_too(family, tmp_path, train):
    changes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64} if family == "distilbert" else {}
    run = train(model=str(make_encoder(tmp_path / family, family, **changes)), max_steps=40)
    run.raise_for_state()
    assert run.summary().best["accuracy"] >= 0.9


def test_rows_with_a_label_are_classified_unless_told_otherwise(train, tiny, intents):
    assert train().summary().plan["objective"]["name"] == "classify"
    told = train(model=str(tiny), objective="sft", max_steps=1)
    told.raise_for_state()
    assert told.summary().plan["objective"] == {"name": "sft"}


def test_the_padding_of_a_batch_changes_nothing(encoder, train):
    from tune_magic.training.outputs import outputs_of
    from tune_magic.training.tuned import load_tuned

    run = train()
    tuned = load_tuned(run)
    held_out = tuned.rows().dataset().held_out
    together = outputs_of(tuned.engine(), tuned.objective, held_out)
    alone = [outputs_of(tuned.engine(), tuned.objective, [example])[0] for example in held_out]
    assert np.abs(np.stack(together) - np.stack(alone)).max() < 1e-5


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_stopped_run_goes_on_to_the_same_bits(method, make_run, monkeypatch, tmp_path):
    from tune_magic.training.loop import Loop

    changes = {"method": {"name": method}, "model": str(make_encoder(tmp_path / "drops", hidden_dropout_prob=0.1))}
    whole = make_run(**changes)
    local.start(whole.path, "inline")
    parts = make_run(**changes)
    step = Loop._step

    def stop_at_7(self, number):
        step(self, number)
        if number == 7 and self.session.folder == parts.path:
            parts.stop()

    monkeypatch.setattr(Loop, "_step", stop_at_7)
    local.start(parts.path, "inline")
    assert parts.status == "stopped"
    parts.resume("inline")
    assert parts.status == "finished"
    for run in (whole, parts):
        assert set(run.summary().evaluations) == {0, 10, 20, 30}
    assert whole.history["loss"].tolist() == parts.history["loss"].tolist()
    ours, theirs = whole.summary().evaluations, parts.summary().evaluations
    assert [ours[s]["loss"] for s in ours] == [theirs[s]["loss"] for s in ours]


def test_the_report_agrees_with_scikit_learn(train):
    run = train(max_steps=6)
    report = run.evaluate()
    given, chosen = report.frame()["reference"], report.frame()["tuned"]
    assert report.metrics["accuracy"] == pytest.approx(accuracy_score(given, chosen))
    assert report.metrics["macro_f1"] == pytest.approx(f1_score(given, chosen, average="macro"))
    assert list(report.confusion.index) == report.classes == COLOURS
    assert report.confusion.to_numpy().sum() == len(given)
    assert report.per_class["rows"].tolist() == [sum(given == name) for name in COLOURS]
    guess = report.about["most_frequent"]
    assert guess["accuracy"] == pytest.approx((given == guess["class"]).mean())
    card = report.card()
    assert "confusion matrix" in card["text/html"]
    assert "untrained head" in card["text/html"]
    assert "macro F1: base" in card["text/plain"]


def test_probabilities_name_the_classes(train):
    run = train()
    found = run.predict(["red thing 7", "blue thing 3 and more of it", "green"])
    assert isinstance(found, pd.DataFrame)
    assert list(found.columns) == COLOURS
    assert found.to_numpy().sum(1) == pytest.approx(np.ones(3), abs=1e-5)
    assert found.idxmax(axis=1).tolist() == ["red", "blue", "green"]
    assert run.predict("red thing 7").to_numpy() == pytest.approx(found.iloc[:1].to_numpy(), abs=1e-5)
    with pytest.raises(TuneError, match=r"predict"):
        run.generate("red thing 7")


def test_a_language_model_has_no_probabilities_of_classes(train, tiny, data_file):
    run = train(model=str(tiny), data=str(data_file), max_steps=1)
    with pytest.raises(TuneError, match=r"generate"):
        run.predict("red")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": "x"}] * 9, "one class only"),
        ([{"text": f"t {i}", "label": f"l{i}"} for i in range(9)], "9 classes in 9 rows"),
        ([{"text": f"t {i}", "label": 0.5 if i == 4 else "ab"[i % 2]} for i in range(9)], "line 5: .*must be a class"),
        (
            [{"text": f"t {i}", "label": None if i == 3 else i % 2} for i in range(9)],
            r"line 4: column `label` is missing",
        ),
        ([{"text": "" if i == 3 else "t", "label": i % 2} for i in range(9)], r"line 4: column `text` is empty"),
    ],
)
def test_rows_that_are_no_classes_are_refused(rows, message, train, intents):
    intents.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RunFailed, match=message):
        train().raise_for_state()


def test_labels_that_are_measures_are_no_classes(train, intents):
    intents.write_text("".join(json.dumps({"text": f"t {i}", "label": 0.5 + i % 2}) + "\n" for i in range(9)))
    assert train(max_steps=1).summary().plan["objective"]["name"] == "regression"
    with pytest.raises(RunFailed, match=r"recognised as `text_score`(?s:.*)learns from: text_label"):
        train(objective="classify").raise_for_state()


def test_a_class_that_training_never_saw_is_refused(train, intents, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "a", "label": "red"}\n{"text": "b", "label": "purple"}\n')
    with pytest.raises(
        RunFailed, match=r"(?s)other.jsonl: 1 bad row.*line 2: no training row has this class: `purple`"
    ):
        train(data={"train": str(intents), "held_out": str(other)}).raise_for_state()


def test_numbers_and_booleans_are_classes_in_their_order(train, intents):
    intents.write_text("".join(json.dumps({"text": f"t {i}", "label": i % 11}) + "\n" for i in range(66)))
    assert train(max_steps=1).summary().plan["objective"]["classes"] == [str(n) for n in range(11)]
    intents.write_text("".join(json.dumps({"text": f"t {i}", "label": i % 2 == 0}) + "\n" for i in range(30)))
    assert train(max_steps=1).summary().plan["objective"]["classes"] == ["false", "true"]


def test_other_columns_and_a_template_serve_as_well(train, intents):
    intents.write_text("".join(json.dumps({"a": r["text"], "b": "x", "kind": r["label"]}) + "\n" for r in labelled()))
    train(data={"train": str(intents), "columns": {"text": "a", "label": "kind"}}, max_steps=1).raise_for_state()
    run = train(data={"train": str(intents), "template": "{b}: {a}", "columns": {"label": "kind"}}, max_steps=1)
    run.raise_for_state()
    assert run.summary().plan["objective"]["classes"] == COLOURS
    assert run.summary().plan["lens"][0]["spans"][0][0].count("x: ") == 1


def test_a_long_text_is_cut_to_the_model_and_keeps_its_end_token(train, intents):
    rows = [{**row, "text": row["text"] + " and" * 50} for row in labelled()]
    intents.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = train(max_steps=1, max_length=1024).summary().plan
    assert plan["max_length"] == 64  # the model has no more positions
    assert plan["longest_row_tokens"] == 64
    assert plan["cut_rows"] == plan["train_rows"]


def test_a_frozen_language_model_needs_layers(train, tiny, data_file):
    with pytest.raises(RunFailed, match=r"no head of its own.*trainable_layers"):
        train(model=str(tiny), data=str(data_file), method={"name": "freeze"}).raise_for_state()
    run = train(model=str(tiny), data=str(data_file), method={"name": "freeze", "trainable_layers": 1}, max_steps=2)
    run.raise_for_state()
    with pytest.raises(RunFailed, match=r"at most 2"):
        train(model=str(tiny), data=str(data_file), method={"name": "freeze", "trainable_layers": 3}).raise_for_state()


@pytest.mark.parametrize("sizes", [(40, 40, 20), (97, 2, 1), (30, 30, 30), (5, 5, 90)])
def test_a_split_gives_each_class_its_share(sizes):
    labels = [name for name, size in enumerate(sizes) for _ in range(size)]
    train_rows, held_out = (rows.tolist() for rows in split(len(labels), 0.2, seed=3, labels=labels))
    assert sorted(train_rows + held_out) == list(range(len(labels)))
    assert len(held_out) == round(0.2 * len(labels))
    for name, size in enumerate(sizes):
        count = sum(labels[row] == name for row in held_out)
        assert abs(count - 0.2 * size) < 1
        assert count < size  # no class is lost to training
    assert split(len(labels), 0.2, seed=3, labels=labels)[1].tolist() == held_out
    assert split(len(labels), 0.2, seed=4, labels=labels)[1].tolist() != held_out


def test_metrics_over_resamples_are_those_of_scikit_learn():
    generator = np.random.default_rng(0)
    given, chosen = generator.integers(0, 5, (2, 40))
    rows = generator.integers(0, 40, (20, 40))
    for metric, reference in (
        (Accuracy(), accuracy_score),
        (MacroF1(), lambda a, b: f1_score(a, b, average="macro")),
    ):
        expected = [reference(given[r], chosen[r]) for r in rows]
        assert metric.statistic(chosen[rows], given[rows]) == pytest.approx(expected)


def test_a_text_metric_is_refused_for_classes_and_the_reverse(train, tiny, data_file):
    with pytest.raises(RunFailed, match=r"compares answers"):
        train(max_steps=1).evaluate(metrics="exact_match")
    with pytest.raises(RunFailed, match=r"compares classes"):
        train(model=str(tiny), data=str(data_file), max_steps=1).evaluate(metrics="accuracy")


def test_the_python_twin_classifies_a_table(encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tune_magic.finetune(
        model=str(encoder), data=pd.DataFrame(labelled()), method="full", learning_rate=5e-3, max_steps=30,
        max_length=48, executor="inline",
    )  # fmt: skip
    assert run.predict(["red thing 1"]).idxmax(axis=1).item() == "red"


@pytest.mark.parametrize("count", [2, 12, 25, 150])
def test_a_card_keeps_its_budget_however_many_classes_there_are(count, tmp_path):
    from tune_magic.evaluation.report import PER_CLASS, Scores
    from tune_magic.view.report import report_card

    generator = np.random.default_rng(0)
    names = [f"class ${i} <b>&amp" for i in range(count)]
    rows = [
        {"row": i, "question": "text " * 100, "reference": names[i % count], "tuned": names[0], "accuracy_tuned": 0.0,
         "probability_tuned": 0.5, "loss_base": 1.0, "loss_tuned": 1.0}
        for i in range(20)
    ]  # fmt: skip
    per_class = [{"class": name, **dict.fromkeys(PER_CLASS, 0.5)} for name in names]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = {"rows": 20, "split": "test", "step": 1, "chose_checkpoint": False}
    matrix = generator.integers(0, 30, (count, count)).tolist()  # every cell is filled: the worst case
    content = {"about": about, "metrics": {}, "classes": names, "per_class": per_class, "confusion": matrix}
    (tmp_path / "report.json").write_text(json.dumps(content))
    card = report_card(Scores(tmp_path), "bot")
    assert len(card["text/html"]) < 60_000
    assert "<b>&amp" not in card["text/html"]


FROZEN = {"method": {"name": "freeze"}, "learning_rate": 2e-2, "max_steps": 12, "eval": {"steps": 6, "samples": 0}}


def curve(run):
    summary = run.summary()
    return [event["loss"] for event in summary.steps.values()], [e["loss"] for e in summary.evaluations.values()]


@pytest.mark.parametrize("layers", [0, 1])
def test_frozen_layers_are_computed_once_a_row(train, monkeypatch, layers):
    from torch import nn

    changes = FROZEN | {"method": {"name": "freeze", "trainable_layers": layers}}
    fresh = train(**changes, cache_frozen_layers=False)
    rows_seen = []
    real = nn.Module.__call__

    def call(module, *args, **kwargs):
        if type(module).__name__ == "BertSelfAttention":
            rows_seen.append(args[0].shape[1] if args else kwargs["hidden_states"].shape[1])
        return real(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", call)
    kept = train(**changes)
    kept.raise_for_state()
    plan = kept.summary().plan
    assert plan["kept_layers"] == 2 - layers
    if not layers:  # each of two layers, once for each row, and the few rows of the self-check twice
        tokens = plan["kept_bytes"] // 64  # 32 numbers of two bytes, one token a row
        assert tokens == 48
        lengths = sum(rows_seen)
        assert plan["tokens_per_epoch"] * 2 < lengths < plan["tokens_per_epoch"] * 2 * 48 / 36 + 400
    for ours, theirs in zip(curve(kept), curve(fresh), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=5e-3, atol=1e-3)
    assert not [path for path in kept.path.rglob("*") if "scratch" in path.name]


def test_kept_outputs_are_the_same_after_a_resume(train, make_run, monkeypatch):
    with monkeypatch.context() as patch:
        looks = StopAt(patch, n=-1)
        whole = train(**FROZEN)
    for stop in (4, looks.count // 3, looks.count - 3):  # the first while the outputs are computed
        run = make_run(**FROZEN)
        with monkeypatch.context() as patch:
            StopAt(patch, stop)
            local.start(run.path, "inline")
        assert run.status == "stopped"
        run.resume("inline")
        assert curve(run) == curve(whole)


def test_f22_too_little_memory_to_keep_outputs_costs_time_not_the_run(train, monkeypatch):
    import torch

    from tune_magic.training.trunk import Trunk

    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Trunk, "_outputs", refuse)
    run = train(**FROZEN)
    run.raise_for_state()
    assert [event["kind"] for event in run.events("warning")] == ["trunk_not_kept"]


def test_f23_a_full_disk_costs_time_not_the_run(train, monkeypatch):
    @contextlib.contextmanager
    def full(folder):
        def append(data):
            raise OSError(errno.ENOSPC, "No space left on device")

        yield SimpleNamespace(append=append)

    monkeypatch.setattr(trunk, "files", SimpleNamespace(scratch=full))
    run = train(**FROZEN)
    run.raise_for_state()
    (warning,) = run.events("warning")
    assert warning["kind"] == "trunk_not_kept"
    assert "No space left" in warning["message"]


def test_one_epoch_keeps_nothing(train):
    assert train(**FROZEN | {"max_steps": 4}).summary().plan["kept_layers"] == 0
    assert train(**FROZEN | {"max_steps": 6}).summary().plan["kept_layers"] == 2


def skewed(count=60):
    """Nine rows of ten are blue."""
    return [
        {"text": f"{'red' if i % 10 == 0 else 'blue'} thing {i}", "label": "red" if i % 10 == 0 else "blue"}
        for i in range(count)
    ]


def test_weights_and_focus_are_the_formulas():
    logits, targets = [[2.0, 0.5, -1.0], [0.1, 0.2, 0.3], [40.0, 0.0, 0.0]], [0, 2, 0]
    p = torch.tensor(logits, dtype=torch.float64).softmax(-1)[torch.arange(3), torch.tensor(targets)]
    for gamma, weights in ((0.0, [1, 1, 1]), (2.0, [1, 1, 1]), (0.5, [0.2, 1.0, 3.0]), (0.0, [0.2, 1.0, 3.0])):
        options = ClassifyOptions(focal_gamma=gamma)
        objective = Classify(options, classes=COLOURS, weights=[] if weights == [1, 1, 1] else weights)
        expected = -(torch.tensor(weights)[torch.tensor(targets)] * (1 - p) ** gamma * p.log()).sum()
        given = torch.tensor(logits, requires_grad=True)
        found = objective.loss_sum(RowStates(given, torch.tensor(targets)))
        assert float(found.detach()) == pytest.approx(float(expected), rel=1e-5)
        found.backward()
        assert given.grad.isfinite().all()


def test_rare_classes_count_more(train, tmp_path):
    path = tmp_path / "skewed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in skewed()))
    run = train(data={"train": str(path)}, objective={"name": "classify", "class_weights": "balanced"}, max_steps=2)
    plan = run.summary().plan
    assert plan["objective"] == {"name": "classify", "classes": ["blue", "red"], "weights": [0.555556, 5.0]}
    assert sum(np.array(plan["objective"]["weights"]) * [54, 6]) == pytest.approx(60)
    named = train(data={"train": str(path)}, objective={"name": "classify", "class_weights": {"red": 3}}, max_steps=2)
    assert named.summary().plan["objective"]["weights"] == [1.0, 3.0]
    assert load_tuned(named).objective.weights == [1.0, 3.0]
    assert named.recipe["objective"] == {"name": "classify", "class_weights": {"red": 3.0}}
    assert "blue 1, red 3" in card(named)["text/plain"]
    with pytest.raises(RunFailed, match=r"'green'.*(?s:.)*Classes: blue, red"):
        train(
            data={"train": str(path)}, objective={"name": "classify", "class_weights": {"green": 3}}
        ).raise_for_state()


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        ({"name": "classify", "class_weights": "even"}, "balanced or a weight for each class"),
        ({"name": "classify", "class_weights": {"red": 0}}, "greater than 0"),
        ({"name": "classify", "focal_gamma": -1}, "at least 0"),
        ({"name": "classify", "gamma": 2}, "no such key"),
        ({"class_weights": "balanced"}, r"objective\.name.*is needed"),
        ("clasify", "Did you mean `classify`"),
        ({"name": "sft", "class_weights": "balanced"}, "no such key"),
    ],
)
def test_what_an_objective_does_not_know_is_told(objective, told):
    with pytest.raises(RecipeError, match=told):
        build_recipe({"model": "m", "data": "rows.jsonl", "objective": objective})


def test_another_objective_on_the_line_has_its_own_options():
    body = {"model": "m", "data": "rows.jsonl", "objective": {"name": "classify", "focal_gamma": 2}}
    assert build_recipe(body, {"objective": "sft"}).given()["objective"] == {"name": "sft"}
    changed = build_recipe(body, {"objective.focal_gamma": 1}).given()["objective"]
    assert changed == {"name": "classify", "focal_gamma": 1}
    assert build_recipe({**body, "objective": "classify"}).short()["objective"] == "classify"
