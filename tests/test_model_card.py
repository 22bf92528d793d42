"""Model cards: what a run's folder says, as the hub reads it, without a path or a secret of this machine."""

import json
import re

import pytest

from tune_magic.errors import TuneError
from tune_magic.executors import local


@pytest.fixture
def inline(monkeypatch):
    start = local.start
    monkeypatch.setattr(local, "start", lambda path, *_: start(path, "inline"))


def content_of(card):
    from huggingface_hub import ModelCard

    return ModelCard(card).data


def test_a_card_says_what_it_is_how_it_was_trained_and_how_it_scores(train, inline):
    run = train()
    run.note("for the help desk")
    report = run.evaluate(metrics="loss,exact_match")
    card = run.model_card()
    data = content_of(card)
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-generation")
    assert {"tune-magic", "lora", "sft"} <= set(data.tags)
    assert data.get("language") is None
    scores = {result.metric_type: result for result in data.eval_results}
    assert scores["loss"].metric_value == pytest.approx(report.metrics["loss"], abs=1e-5)
    assert scores["loss"].metric_args["rows"] == 6
    low, high = scores["loss"].metric_args["difference_95"]
    assert low <= report.difference["loss"] <= high
    plan = run.summary().plan
    for part in ("# tiny_run", "> for the help desk", "18 trained, 6 held out", f"transformers {plan['versions']['transformers']}",
                 "learning_rate: 0.01", plan["fingerprints"]["train"], plan["identity"], run.id, "| exact match |", "also chose the checkpoint"):  # fmt: skip
        assert part in card, part
    for title in ("How it was trained", "Results", "Limits", "How to use it", "Where it comes from"):
        assert f"## {title}" in card


def test_nothing_of_the_machine_is_in_it(train, inline, data_file, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "the-very-secret-word")
    rows = data_file.rename(tmp_path / "rows|bars.jsonl")
    run = train(data={"train": str(rows), "held_out": 0.25, "test": str(rows)})
    run.export("merged", rows=2)
    (run.path / "meta.json").write_text(json.dumps({"note": "by the-very-secret-word"}))
    card = run.model_card()
    assert str(tmp_path) not in card
    assert not re.search(r"(^|[\s`'\"(])/\w", card)
    assert "very-secret" not in card
    assert "> by [hidden]" in card
    assert "rows\\|bars.jsonl" in card
    assert "Export as merged: the same answer to 2 of 2" in card


def test_an_export_lies_beside_its_card(train, inline):
    run = train()
    for to, library in (("adapter", "peft"), ("merged", "transformers")):
        exported = run.export(to, rows=2)
        card = (exported.path / "README.md").read_text()
        assert content_of(card).library_name == library
        assert f"its export as {to}" in card
        assert exported.receipt["files"]["README.md"] == len(card.encode())
        assert ("PeftModel" in card) == (to == "adapter")


def test_the_code_of_a_card_loads_the_model(train, inline, monkeypatch, tiny):
    import torch

    exported = train().export("adapter", rows=2)
    code = re.search(r"```python\n(.*?)```", (exported.path / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tiny.parent)  # the card calls the base by its own name
    names: dict = {}
    exec(
        code.replace("THIS_FOLDER_OR_REPOSITORY", str(exported.path)).replace("max_new_tokens=100", "max_new_tokens=2"),
        names,
    )
    with torch.no_grad():
        assert names["model"](**names["inputs"]).logits.shape[0] == 1


def test_limits_name_where_it_lost(train, inline):
    run = train()
    report = run.evaluate(metrics="loss").path / "report.json"
    content = json.loads(report.read_text())
    worse = {
        **content["metrics"]["loss"],
        "base": 1.0,
        "tuned": 2.0,
        "difference": 1.0,
        "low": 0.5,
        "high": 1.5,
        "p": 0.001,
    }
    content["slices"] = [{"column": "topic", "value": "<b>|bills", "rows": 3, "metrics": {"loss": worse}}]
    report.write_text(json.dumps(content))
    assert "Worse than the base on rows with topic = &lt;b>\\|bills (3 rows): loss 1 → 2." in run.model_card()


def test_a_merged_run_names_its_sources(train, inline):
    import tune_magic

    runs = [train(seed=seed) for seed in (1, 2)]
    merged = tune_magic.merge_adapters({runs[0]: 1, runs[1]: 0.5}, "cat", name="both")
    card = merged.model_card()
    assert all(run.id in card for run in runs)
    assert "made of the adapters of several runs" in card
    assert "by `cat`" in card


def test_what_is_not_trained_has_no_card(make_run):
    with pytest.raises(TuneError, match="no checkpoint yet"):
        make_run().model_card()
