"""Evaluations of several models over the same rows: against runs, by slices, by metrics, kept and streamed."""

import json

import numpy as np
import psutil
import pytest

from tune_magic import files, plugins
from tune_magic.errors import RunFailed, TuneError
from tune_magic.evaluation import answers, baselines, classes, kept, slices
from tune_magic.evaluation.measures import Measure
from tune_magic.executors import local
from tune_magic.handles import Report
from tune_magic.storage import places
from tune_magic.testing import models as testing
from tune_magic.training.tuned import load_tuned


@pytest.fixture
def inline(monkeypatch):
    """Jobs run in this process."""
    start = local.start
    monkeypatch.setattr(local, "start", lambda path, *_: start(path, "inline"))


@pytest.fixture
def named(train):
    """Train a run in this process and give it a name."""

    def start(name, **changes):
        run = train(**changes)
        run.raise_for_state()
        run.rename(name)
        return run

    return start


@pytest.fixture
def asked(monkeypatch):
    """Count how often models are asked for answers."""
    calls, generate = [], answers.generate

    def counted(model, tokenizer, prompts, **options):
        calls.append(len(prompts))
        return generate(model, tokenizer, prompts, **options)

    monkeypatch.setattr(answers, "generate", counted)
    return calls


def test_runs_are_compared_with_each_other_and_with_the_base(named, inline):
    long = named("long", max_steps=40)
    short = named("short", max_steps=4, method={"name": "full"}, learning_rate=1e-4)
    report = long.evaluate(against=short, limit=6, max_new_tokens=8)
    assert set(report.against) == {"short"}
    own, theirs = report.comparisons["loss"], report.against["short"]["loss"]
    assert own.tuned == theirs.tuned < theirs.base
    alone = short.evaluate(limit=6, max_new_tokens=8)
    assert theirs.base == pytest.approx(alone.metrics["loss"], rel=1e-5)
    assert alone.base["loss"] == pytest.approx(own.base, rel=1e-6)
    assert {"loss_short", "short", "tuned", "base", "exact_match_short"} <= set(report.frame())
    assert report.frame()["short"].tolist() == alone.frame()["tuned"].tolist()
    assert 0 < theirs.p <= 1 and theirs.test == "permutation"
    text = report.card()["text/plain"]
    assert "short · loss: short " in text
    assert "against others" in report.card()["text/html"]
    assert "McNemar" in report.card()["text/html"]


def test_runs_of_one_name_are_told_apart_by_their_ids(train, inline):
    runs = [train(max_steps=2, learning_rate=rate) for rate in (1e-2, 1e-3, 1e-4)]
    report = runs[0].evaluate(against=runs[1:], limit=2, metrics="loss")
    assert list(report.against) == ["tiny_run", runs[2].id]


def test_runs_that_find_other_things_are_not_compared(named, inline, tmp_path):
    talker = named("talker", max_steps=1)
    rows = tmp_path / "classes.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{'ab'[i % 2]} {i}", "label": "xy"[i % 2]}) + "\n" for i in range(40)))
    encoder = testing.make_encoder(tmp_path / "encoder")
    chooser = named("chooser", model=str(encoder), data={"train": str(rows)}, max_steps=1)
    with pytest.raises(RunFailed, match="one finds texts, the other classes"):
        talker.evaluate(against=chooser, limit=2)
    with pytest.raises(TuneError):
        talker.evaluate(against="nobody")
    assert chooser.evaluate(against="base").against == {}


def test_what_was_said_once_is_not_asked_again(named, inline, asked):
    first = named("first", max_steps=6)
    report = first.evaluate(limit=5, max_new_tokens=4)
    assert asked == [5, 5]
    again = first.evaluate(limit=5, max_new_tokens=4, metrics="chrf,token_f1,loss")
    assert asked == [5, 5]  # other metrics of the same answers
    assert again.frame()["tuned"].tolist() == report.frame()["tuned"].tolist()
    assert again.metrics["loss"] == report.metrics["loss"]
    named("second", max_steps=6, learning_rate=1e-3).evaluate(limit=5, max_new_tokens=4)
    assert asked == [5, 5, 5]  # another tuned model; the base is the same
    first.evaluate(limit=5, max_new_tokens=5)
    first.evaluate(limit=4, max_new_tokens=4)
    assert len(asked) == 7  # asked otherwise, and about other rows
    log = (
        [event for event in first.evaluations[-1].events() if event["type"] == "progress"]
        if hasattr(first, "evaluations")
        else []
    )
    assert all(event["done"] <= event["total"] for event in log)


def test_without_a_cache_everything_is_asked_each_time(train, inline, asked, monkeypatch, tmp_path):
    run = train(max_steps=2)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(kept.places, "cache_folder", lambda: tmp_path / "file" / "cache")
    for _ in range(2):
        report = run.evaluate(limit=3, max_new_tokens=3)
    assert asked == [3] * 4
    assert not list(report.path.glob("*.said"))


def test_the_oldest_answers_go(train, inline, monkeypatch):
    run = train(max_steps=2)
    run.evaluate(limit=3, max_new_tokens=3)
    folder = places.cache_folder() / "said"
    assert len(list(folder.iterdir())) == 2
    monkeypatch.setattr(kept, "_MOST_BYTES", 10)
    run.evaluate(limit=2, max_new_tokens=3)
    assert len(list(folder.iterdir())) == 2  # the new ones
    assert all(len(path.read_text().splitlines()) == 2 for path in folder.iterdir())


def test_rows_are_scored_by_the_values_of_a_column(train, inline, tmp_path):
    rows = [
        {"prompt": f"item {i} is", "completion": ["red", "blue"][i % 2], "kind": "ab"[i % 2], "size": i, "who": f"u{i}"}
        for i in range(40)
    ]
    path = tmp_path / "kinds.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = train(max_steps=4)
    report = run.evaluate(data=str(path), by="kind,size,who,length", max_new_tokens=4, metrics="exact_match,loss")
    frame = report.slices
    assert set(frame["column"]) == {"kind", "size", "who", "length"}
    kinds = frame[(frame["column"] == "kind") & (frame["metric"] == "loss")].set_index("value")
    scored = report.frame()
    for value, remainder in (("a", 0), ("b", 1)):
        own = scored[scored["row"] % 2 == remainder]
        assert kinds.loc[value, "rows"] == len(own) == 20
        assert kinds.loc[value, "tuned"] == pytest.approx(own["loss_tuned"].mean(), rel=0.2)  # weighted by tokens
    assert frame[frame["column"] == "size"]["value"].nunique() == 4
    assert frame[frame["column"] == "who"]["value"].nunique() == 12
    text = report.card()
    assert "exact match by kind" in text["text/html"] or "loss by kind" in text["text/html"]
    assert "kind a (20 rows) · " in text["text/plain"]
    with pytest.raises(RunFailed, match=r"has no column `colour`.*") as failed:
        run.evaluate(data=str(path), by="colour", limit=4, metrics="loss")
    assert "completion, kind, prompt" in str(failed.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2, True, None, ""], ["1", "2", "True", "none", "none"]),
        ([*map(str, range(100)), None], [*["up to 24.75"] * 25, *["24.75 to 49.5"] * 25, *["49.5 to 74.25"] * 25,
                                         *["above 74.25"] * 25, "none"]),
        (list(range(100)), ["up to 24.75"] * 25 + ["24.75 to 49.5"] * 25 + ["49.5 to 74.25"] * 25 + ["above 74.25"] * 25),
        ([float("nan")], ["none"]),
    ],
)  # fmt: skip
def test_values_become_slices(values, expected):
    assert slices.sliced(values)[0] == expected


def test_rare_values_are_one_slice():
    found, order = slices.sliced(["a"] * 40 + ["b"] * 50 + [f"rare {i}" for i in range(30)])
    assert len(set(found)) == 12 == len(order)
    assert (order[:2], order[-1]) == (["b", "a"], slices.OTHERS)
    assert found.count(slices.OTHERS) == 21


def test_numbers_go_upwards():
    values = [float(i % 50) for i in range(100)]
    assert slices.sliced(values)[1] == ["up to 12", "12 to 24.5", "24.5 to 37", "above 37"]
    assert slices.sliced([3, 1, 3, None, 2, 3])[1] == ["1", "2", "3", "none"]
    assert len(slices.sliced([110, 111, 112, 113, 115, 118, 120])[1]) == 4


def test_slices_without_rows_that_count_are_left_out():
    values = np.array([[1.0], [np.nan], [0.0], [np.nan]])
    found = slices.compare_slices({"x": Measure("x")}, {"x": values}, {"x": values}, {"side": ["l", "r", "l", "r"]})
    assert [(own["value"], list(own["metrics"])) for own in found] == [("l", ["x"]), ("r", [])]


def test_answers_that_cannot_be_read_are_counted(train, inline):
    run = train(max_steps=2)
    report = run.evaluate(limit=4, max_new_tokens=4, metrics="json_fields,number_match")
    assert set(report.about["unreadable"]) == {"tuned", "base"}
    assert report.about["unreadable"]["base"]["json_fields"] == sum(
        not plugins.get("metric", "json_fields")().parses(text) for text in report.frame()["base"]
    )
    assert "cannot read, of 4: " in report.card()["text/plain"]


def test_reports_of_earlier_versions_are_read(tmp_path):
    comparison = {
        "title": "loss", "base": 2.0, "tuned": 1.0, "difference": -1.0, "low": "nan", "high": "nan", "higher_is_better": False,
    }  # fmt: skip
    about = {"rows": 3, "split": "test", "step": "1", "chose_checkpoint": False}
    (tmp_path / "report.json").write_text(json.dumps({"format": 1, "about": about, "metrics": {"loss": comparison}}))
    (tmp_path / "rows.jsonl").write_text("")
    report = Report(tmp_path)
    assert report.comparisons["loss"].p is None
    assert report.against == {} and report.slices.empty


def test_a_hundred_thousand_rows_are_scored_in_the_memory_of_a_few(slow, tmp_path, train, inline, monkeypatch):
    """A few numbers of each row stay; what is answered, and how likely each class was, goes to disk."""
    count = 100_000
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"item {i},{'xy'[i % 2]}\n" for i in range(count)))
    few = tmp_path / "few.csv"
    few.write_text("".join(rows.read_text().splitlines(keepends=True)[:41]))
    run = train(model=str(testing.make_encoder(tmp_path / "encoder")), data={"train": str(few)}, max_steps=1)

    def guessed(engine, objective, examples, done):
        done(len(examples))
        return [np.array([0.0, float(example.label)]) for example in examples]

    monkeypatch.setattr(classes, "outputs_of", guessed)  # the model itself would take minutes
    run.evaluate(data=str(few), metrics="accuracy,brier")
    process = psutil.Process()
    before, most, write = process.memory_info().rss, 0, files.write_json_lines

    def watched(path, lines):
        def each():
            nonlocal most
            for number, line in enumerate(lines):
                if number % 5000 == 0:
                    most = max(most, process.memory_info().rss - before)
                yield line

        write(path, each())

    monkeypatch.setattr(files, "write_json_lines", watched)
    report = run.evaluate(data=str(rows), metrics="accuracy,brier")
    assert report.about["rows"] == count
    assert report.metrics["accuracy"] == 1.0
    assert most < 150e6  # as lists of what was said they would be 400 MB
    with (report.path / "rows.jsonl").open() as lines:
        assert sum(1 for _ in lines) == count


@pytest.mark.parametrize("chat", [True, False])
def test_examples_stand_before_the_question_and_only_its_answer_counts(chat, train, inline, tmp_path, tokenizer):
    """By hand: four training rows as turns behind the system message, or as text; losses are of the last answer alone."""
    rows = [{"prompt": f"item {i} is", "completion": ["red", "blue"][i % 2]} for i in range(40)]
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(path), "held_out": 0.25, "chat_template": chat}
    run = train(max_steps=20, data=data, max_length=64)
    report = run.evaluate(baselines="zero,few,rag", limit=5, max_new_tokens=3)
    assert report.about["shots"] == {"few-shot": 4, "retrieval": 4}
    assert set(report.against) == {"few-shot", "retrieval"}
    frame = report.frame()
    for column in ("few-shot", "retrieval", "loss_few-shot", "exact_match_retrieval"):
        assert column in frame
    tuned = load_tuned(run)
    known = baselines._shots(tuned)
    held_out = set(frame["question"])
    assert len(known) == 30 and not held_out & {question for question, _ in known}
    rows = tuned.rows().held_out()
    table, places, _ = baselines.rows_of(tuned, "few", 4, (str(path), tmp_path), rows)
    assert places.tolist() == list(range(10))
    shown = [known[n] for n in np.random.default_rng(tuned.recipe.seed).choice(30, 4, replace=False)]
    example, own = table[0], rows[0]
    text = tokenizer.decode(example.trunk.tokens)
    if chat:
        turns = [{"role": r, "content": t} for shot in shown for r, t in zip(("user", "assistant"), shot, strict=True)]
        asked = [*turns, {"role": "user", "content": own.question}]
        before = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    else:
        before = "".join(f"{question} {answer}\n\n" for question, answer in shown) + own.question
    assert text.startswith(before) or before in text
    assert tokenizer.decode(example.prompt).endswith(before[-12:])
    trained = [row.trunk.tokens[row.trunk.weights > 0].tolist() for row in (example, own)]
    assert trained[0] == trained[1]  # the answer's own, not those of the examples
    near = baselines._nearest(known, 4)
    assert near(known[7][0], 4)[-1] == known[7]


def test_large_numbers_are_told_apart():
    order = slices.sliced([1_700_000_000 + i for i in range(100)])[1]
    assert len(set(order)) == 4
    assert "1700000024" in order[0]


def test_a_row_that_is_cut_anyway_takes_no_examples_from_others(train, inline, tmp_path):
    rows = [{"prompt": f"item {i} is", "completion": "red"} for i in range(40)]
    path, data = tmp_path / "one.jsonl", {"held_out": 0.25, "chat_template": False}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:5] + rows[6:]))
    run = train(max_steps=1, data={"train": str(path), **data})
    asked = tmp_path / "asked.jsonl"
    asked.write_text(
        "".join(json.dumps(row) + "\n" for row in (rows[4], {**rows[5], "completion": "red " * 900}, rows[6]))
    )
    report = run.evaluate(data=str(asked), baselines="few", max_new_tokens=2, metrics="loss,exact_match")
    assert report.about["shots"] == {"few-shot": 4}
    assert report.about["rows"] == 2


def test_rows_that_the_other_run_was_trained_on_are_left_out(train, inline):
    ours, theirs = train(max_steps=2, seed=0), train(max_steps=2, seed=1)
    held_out = [set(np.asarray(load_tuned(run).rows().held_out().indices).tolist()) for run in (ours, theirs)]
    report = ours.evaluate(against=theirs, metrics="loss")
    assert {row["row"] for row in report.rows} == held_out[0] & held_out[1] < held_out[0]


def test_unlikely_classes_are_told_apart(tmp_path, train, inline, monkeypatch):
    """All rows are given the class that is third of four, with a probability of e^-60: right among three."""
    rows = tmp_path / "four.jsonl"
    rows.write_text("".join(json.dumps({"text": f"item {i}", "label": "abcd"[i % 4]}) + "\n" for i in range(40)))
    run = train(model=str(testing.make_encoder(tmp_path / "encoder")), data={"train": str(rows)}, max_steps=1)

    def sure(engine, objective, examples, done):
        done(len(examples))
        return [np.roll([-60.0, -80.0, 0.0, -1.0], example.label) for example in examples]

    monkeypatch.setattr(classes, "outputs_of", sure)
    assert run.evaluate(metrics="top_3,accuracy").metrics == {"top_3": 1.0, "accuracy": 0.0}


def test_a_ruined_model_is_infinitely_bad(train, inline, monkeypatch):
    run = train(max_steps=2)
    scored = answers.AnswerScorer._losses

    def ruined(self, side, examples):
        found = scored(self, side, examples)
        found[0] = float("nan") if side is self.tuned else found[0]
        return found

    monkeypatch.setattr(answers.AnswerScorer, "_losses", ruined)
    report = run.evaluate(limit=3, metrics="loss")
    assert report.metrics["loss"] == float("inf")
    assert report.comparisons["loss"].p is None
    assert report.card()


def test_rows_that_are_too_long_for_four_examples_have_fewer(train, inline, tmp_path):
    rows = [{"prompt": f"item {i} " + "and " * 40, "completion": "red"} for i in range(40)]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = train(max_steps=1, data={"train": str(path), "held_out": 0.25}, max_length=512)
    report = run.evaluate(baselines="few", limit=3, max_new_tokens=2, metrics="loss,exact_match")
    assert 0 < report.about["shots"]["few-shot"] < 4
    assert report.about["rows"] == 3


def test_baselines_are_for_runs_that_answer(train, inline, tmp_path):
    rows = tmp_path / "classes.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{'ab'[i % 2]} {i}", "label": "xy"[i % 2]}) + "\n" for i in range(40)))
    run = train(model=str(testing.make_encoder(tmp_path / "encoder")), data={"train": str(rows)}, max_steps=1)
    with pytest.raises(RunFailed, match="writes no texts"):
        run.evaluate(baselines="few")
    with pytest.raises(TuneError, match="no baseline 'many'"):
        run.evaluate(baselines="many")


def test_the_curves_of_a_classifier_are_in_its_card(tmp_path, train, inline, write):
    rows = "\n".join(f'{{"text": "{"red" if n % 2 else "blue"} {n}", "label": "{"ab"[n % 2]}"}}' for n in range(24))
    encoder = str(testing.make_encoder(tmp_path / "encoder"))
    run = train(model=encoder, data={"train": str(write("rows.jsonl", rows)), "held_out": 0.5}, max_steps=4)
    report = run.evaluate(metrics="roc_auc,calibration_error")
    assert set(report.curves["roc"]) == {"a", "b"}
    assert "calibration" in report.card()["text/html"] and "report.curves" in report.card()["text/html"]
    assert not run.evaluate(metrics="accuracy").curves


def test_probabilities_of_labels_are_scored_and_found_again(tmp_path, train, inline, write):
    lines = [
        {"text": f"{colour} {n}", "labels": [colour] * (n % 3 > 0)} for n in range(12) for colour in ("red", "blue")
    ]
    rows = write("rows.jsonl", "\n".join(map(json.dumps, lines)))
    encoder = str(testing.make_encoder(tmp_path / "encoder"))
    run = train(model=encoder, data={"train": str(rows), "held_out": 0.5}, max_steps=6)
    first = run.evaluate(metrics="roc_auc,average_precision,micro_f1")
    assert 0 <= first.metrics["roc_auc"] <= 1
    assert run.evaluate(metrics="roc_auc,average_precision,micro_f1").metrics == first.metrics
    with pytest.raises(RunFailed, match="`top_3` does not score"):
        run.evaluate(metrics="top_3")
