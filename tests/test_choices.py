"""The likeliest of several answers, and the general set that is asked with them."""

import numpy as np
import pytest
import torch

from tune_magic.errors import RunFailed
from tune_magic.evaluation import answers, general, likelihood, probe
from tune_magic.executors import local
from tune_magic.handles import Report
from tune_magic.testing import models as testing
from tune_magic.training.tuned import load_tuned


@pytest.fixture
def inline(monkeypatch):
    """Jobs run in this process."""
    start = local.start
    monkeypatch.setattr(local, "start", lambda path, *_: start(path, "inline"))


@pytest.fixture
def colours(tmp_path, tiny):
    """Keywords of a recipe whose rows are answered by one of three words."""
    names = ["red", "green", "blue"]
    rows = [f'{{"prompt": "{n} {names[n % 3][0] * 4}", "completion": "{names[n % 3]}"}}' for n in range(36)]
    path = tmp_path / "colours.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return {"data": {"train": str(path), "held_out": 0.25}}


def alone(tuned, prompt, tail):
    """Return the log-likelihood of an answer by one padded-free pass of the whole model."""
    ids = torch.from_numpy(np.concatenate([prompt, tail]).astype(np.int64))[None]
    with torch.no_grad():
        log_p = torch.log_softmax(tuned.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float(), -1)
    return float(log_p.gather(1, ids[0, len(prompt) :, None]).sum())


def test_each_choice_is_as_likely_as_by_a_pass_of_its_own(train, colours):
    tuned = load_tuned(train(**colours, max_steps=3))
    rows = probe.QUESTIONS.encode(tuned.rows(room=512).renderer)[:5]
    done = []
    found = likelihood.of_choices(tuned, rows, done.append)
    assert done == [1] * 5
    for row, own in zip(rows, found, strict=True):
        assert len(own) == len(row.branches) == 4
        expected = [alone(tuned, row.trunk.tokens, branch.tokens) for branch in row.branches]
        assert own == pytest.approx(expected, abs=1e-4)


def test_the_prompt_of_all_choices_is_computed_once(train, colours, monkeypatch):
    tuned = load_tuned(train(**colours, max_steps=1))
    rows = probe.QUESTIONS.encode(tuned.rows(room=512).renderer)[:6]
    engine, computed = tuned.engine(), []
    monkeypatch.setattr(type(tuned), "engine", lambda self: engine)
    compute = engine.compute
    monkeypatch.setattr(engine, "self_check", lambda *_: None)
    monkeypatch.setattr(
        engine, "compute", lambda batch, examples: computed.append(batch.input_ids.size) or compute(batch, examples)
    )
    likelihood.of_choices(tuned, rows, lambda count: None)
    each = sum(len(row.trunk) + len(branch) for row in rows for branch in row.branches)
    once = sum(len(row.trunk) + sum(map(len, row.branches)) for row in rows)
    assert sum(computed) <= once < each / 2


def test_the_likeliest_answer_needs_no_writing(train, colours, inline, monkeypatch):
    run = train(**colours, max_steps=6)
    monkeypatch.setattr(answers, "generate", None)
    report = run.evaluate(metrics="likeliest")
    tuned, rows = load_tuned(run), run.evaluate(metrics="likeliest").rows
    held_out = {example.index: example for example in tuned.rows().held_out()}
    tails = {example.reference: example.trunk.tokens[example.answer_start :] for example in held_out.values()}
    assert set(tails) == {"red", "green", "blue"}
    for row in rows:
        by_itself = {text: alone(tuned, held_out[row["row"]].prompt, tail) for text, tail in tails.items()}
        assert row["tuned"] == max(by_itself, key=by_itself.get)
        assert row["likeliest_tuned"] == (row["tuned"] == row["reference"])
    assert report.metrics["likeliest"] == pytest.approx(np.mean([row["likeliest_tuned"] for row in rows]))
    assert report.comparisons["likeliest"].test == "McNemar"


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (['{"text": "only a text"}'] * 12, "plain texts"),
        ([f'{{"prompt": "say", "completion": "number {n}"}}' for n in range(80)], "more than 64"),
    ],
)
def test_rows_without_a_few_answers_are_refused(train, inline, write, lines, says):
    run = train(max_steps=1)
    with pytest.raises(RunFailed, match=says):
        run.evaluate(data=write("rows.jsonl", "\n".join(lines)), metrics="likeliest")


def test_the_general_set_is_the_same_each_time():
    asked = general.questions()
    assert asked == general.questions()
    assert len(asked) == 84 and len({question.text for question in asked}) > 70
    for question in asked:
        assert len(set(question.choices)) == 4
    right = {question.text: question.choices[question.right] for question in asked}
    assert right["What is the capital of Japan?"] == "Tokyo"
    assert right["Which day comes after Monday?"] == "Tuesday"
    for text, answer in right.items():
        if "plus" in text:
            a, b = (int(word) for word in text.removesuffix("?").split() if word.isdigit())
            assert int(answer) == a + b
    assert len(general.paragraphs()) == 32
    assert all(len(text.split()) > 40 or len(text) >= 240 for text in general.paragraphs())


def test_the_probe_tells_what_was_forgotten(train, inline, write):
    nothing_but_marks = "\n".join(f'{{"prompt": "~", "completion": "{"~" * (20 + n)}"}}' for n in range(12))
    run = train(data={"train": str(write("marks.jsonl", nothing_but_marks)), "held_out": 0.25}, max_steps=30)
    report = run.evaluate(metrics="loss", limit=4, probe=True)
    assert set(report.probe) == {"likeliest", "loss", "perplexity"}
    assert report.probe["loss"].verdict == "worse"
    assert report.probe_sizes["prose"] > 20
    frame = report.probe_frame
    assert {"kind", "question", "reference", "base", "tuned"} <= set(frame.columns)
    assert report.probe["likeliest"].base == pytest.approx((frame.base == frame.reference).mean())
    assert "Something was forgotten: loss · prose got worse" in report.card()["text/plain"]
    assert "a general set" in Report(report.path).card()["text/html"]
    assert "probe" not in run.evaluate(metrics="loss", limit=4).card()["text/plain"]


def test_another_run_is_probed_beside_the_base(train, inline):
    first, second = train(max_steps=2), train(max_steps=3)
    second.rename("second")
    report = first.evaluate(metrics="loss", limit=4, probe=True, against=second, baselines="few", shots=1)
    assert set(report.probe_against) == {"second"}
    assert report.probe_against["second"]["loss"].base != report.probe["loss"].tuned


def test_new_words_do_not_make_the_probe_easier(train, inline, colours):
    run = train(**colours, max_steps=1, vocabulary={"tokens": ["capital", "manual"]})
    report = run.evaluate(metrics="loss", probe=True)
    assert report.probe["likeliest"].base == pytest.approx(report.probe["likeliest"].tuned, abs=0.2)


def test_runs_that_choose_classes_are_not_probed(train, inline, tmp_path, write):
    rows = "\n".join(f'{{"text": "item {n}", "label": "{"ab"[n % 2]}"}}' for n in range(16))
    run = train(
        model=str(testing.make_encoder(tmp_path / "e")), data={"train": str(write("r.jsonl", rows))}, max_steps=1
    )
    with pytest.raises(RunFailed, match="no language model that goes on"):
        run.evaluate(probe=True)


def test_token_accuracy_counts_the_likeliest_tokens(train, colours, inline):
    run = train(**colours, max_steps=20)
    report = run.evaluate(metrics="token_accuracy,loss")
    tuned = load_tuned(run)
    hits, tokens = 0, 0
    for example in tuned.rows().held_out():
        ids = torch.from_numpy(example.trunk.tokens.astype(np.int64))[None]
        with torch.no_grad():
            likeliest = tuned.model(input_ids=ids).logits[0].argmax(-1).numpy()
        trained = np.flatnonzero(example.trunk.weights)
        hits += int((likeliest[trained - 1] == example.trunk.tokens[trained]).sum())
        tokens += len(trained)
    assert report.metrics["token_accuracy"] == pytest.approx(hits / tokens)
    assert report.base["token_accuracy"] < report.metrics["token_accuracy"]
