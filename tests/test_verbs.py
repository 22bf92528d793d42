"""Evaluate, export and the command line, through real workers where these have a say."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import tune_magic
from tune_magic.errors import RunFailed, TuneError
from tune_magic.evaluation.compare import compare
from tune_magic.evaluation.measures import Measure, perplexity
from tune_magic.executors import local


@pytest.fixture(scope="module")
def trained(request, tiny, tmp_path_factory):
    """Two trained runs, by LoRA and in full, shared by this file."""

    from conftest import rows

    from tune_magic.handles import Run
    from tune_magic.recipe import build_recipe
    from tune_magic.storage import folder

    home = tmp_path_factory.mktemp("trained")
    data = home / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(40)))
    made = {}
    for method in ("lora", "full"):
        recipe = build_recipe(
            {"model": str(tiny), "data": str(data), "method": method, "learning_rate": 1e-2, "max_steps": 60,
             "batch_size": 8, "eval": {"steps": 20, "samples": 0}, "dtype": "float32"}
        )  # fmt: skip
        run = Run(folder.create(home / "tune_runs", "finetune", {"name": method, "recipe": recipe.given()}))
        local.start(run.path, "inline")
        assert run.status == "finished"
        made[method] = run
    return made


@pytest.fixture
def inline(monkeypatch):
    """Jobs run in this process."""
    start = local.start
    monkeypatch.setattr(local, "start", lambda path, *_: start(path, "inline"))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_evaluate_compares_base_and_tuned_over_the_same_rows(trained, method, request):
    if method == "full":  # the other one by a real worker
        request.getfixturevalue("inline")
    run = trained[method]
    report = tune_magic.evaluate(run, max_new_tokens=8)
    assert report.about["rows"] == 13
    assert report.about["split"] == "held-out"
    assert report.base["loss"] == pytest.approx(run.metrics["base_held_out_loss"], abs=1e-4)
    assert report.metrics["loss"] == pytest.approx(float(run.summary().best["loss"]), abs=1e-4)
    assert report.metrics["perplexity"] == pytest.approx(math.exp(report.metrics["loss"]), rel=1e-6)
    assert report.difference["loss"] < 0
    assert report.comparisons["loss"].verdict == "better"
    frame = report.frame()
    assert len(frame) == 13
    assert {"question", "reference", "base", "tuned", "exact_match_tuned", "rouge_l_base"} <= set(frame)
    assert frame["exact_match_tuned"].mean() == pytest.approx(report.metrics["exact_match"])
    assert run.metrics["loss"] == report.metrics["loss"]
    card = report.card()
    assert "also chose the checkpoint" in card["text/plain"]
    assert "ROUGE-L" in run.card()["text/plain"]


def test_answers_are_those_of_transformers_one_by_one(trained, inline):
    run = trained["lora"]
    report = run.evaluate(limit=6, max_new_tokens=8)
    model, tokenizer = run.load()
    for row in report.rows:
        messages = [
            {"role": "system", "content": "Name the colour."},
            {"role": "user", "content": row["question"]},
        ]
        ids = torch.tensor(
            [
                tokenizer(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))[
                    "input_ids"
                ]
            ]
        )
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0
        )
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == row["tuned"]


def test_evaluate_on_other_rows_and_without_answers(trained, inline, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "item is red"}, {"role": "assistant", "content": "red"}]}] * 5
    report = tune_magic.evaluate(trained["lora"], data=rows, metrics=["loss", "exact_match"], max_new_tokens=4)
    assert set(report.metrics) == {"loss", "exact_match"}
    assert not report.about["chose_checkpoint"]
    with pytest.raises(RunFailed, match="no metric `bleurt`"):
        tune_magic.evaluate(trained["lora"], metrics=["bleurt"])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_merged_export_is_a_plain_transformers_model(trained, method, inline, tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = trained[method]
    exported = run.export("merged")
    assert exported.receipt["size_bytes"] == sum(p.stat().st_size for p in exported.path.iterdir())
    plain = AutoModelForCausalLM.from_pretrained(exported.path)
    ours, _ = run.load()
    ids = torch.tensor([tokenizer("item 3 is black")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, ours(ids).logits, rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(exported.path).chat_template == tokenizer.chat_template


def test_an_adapter_export_reloads_in_plain_peft(trained, tiny, tokenizer, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    exported = tune_magic.export(trained["lora"], to="adapter", output=tmp_path / "adapter")
    assert exported.path == tmp_path / "adapter"
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), exported.path)
    ours, _ = trained["lora"].load()
    ids = torch.tensor([tokenizer("item 3 is black")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, ours(ids).logits, rtol=0, atol=0)
    config = json.loads((exported.path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny)  # the name in the recipe, no path of a cache
    with pytest.raises(RunFailed, match="already there"):
        tune_magic.export(trained["lora"], to="adapter", output=tmp_path / "adapter")


def test_what_cannot_be_exported_says_so(trained, inline, make_run):
    with pytest.raises(RunFailed, match="no adapter"):
        trained["full"].export("adapter")
    with pytest.raises(TuneError, match="Did you mean `merged`"):
        trained["full"].export("mergd")
    with pytest.raises(TuneError, match="no checkpoint"):
        make_run().export("merged")


def test_the_interval_holds_what_it_should():
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(60):
        base = generator.normal(0, 1, 80)
        tuned = base + generator.normal(0.5, 1, 80)
        found = compare(Measure("x"), base[:, None], tuned[:, None], seed=seed)
        covered += found.low <= 0.5 <= found.high
    assert 51 <= covered <= 60  # 57 are expected of a 95 % interval


def test_weights_make_the_mean_that_of_tokens():
    losses, weights = np.array([1.0, 3.0]), np.array([3.0, 1.0])
    values = np.stack([losses, weights], axis=-1)
    found = compare(Measure("perplexity", perplexity, higher_is_better=False), values, values)
    assert found.base == pytest.approx(math.exp(1.5))
    assert found.verdict == "unclear"


def test_changed_rows_are_never_called_held_out(tiny, data_file, inline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tune_magic.finetune(model=str(tiny), data="rows.jsonl", max_steps=1, eval={"samples": 0}, executor="inline")
    data_file.write_text(data_file.read_text() + data_file.read_text().split("\n")[0] + "\n")
    with pytest.raises(RunFailed, match=r"train of .* has changed"):
        tune_magic.evaluate(run, limit=2, metrics=["loss"])
    assert tune_magic.evaluate(run, data="rows.jsonl", limit=2, metrics=["loss"]).about["split"] == "rows.jsonl"


def command(*words, cwd):
    return subprocess.run(
        [sys.executable, "-m", "tune_magic.cli", *words], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_the_command_line_has_the_same_verbs(tiny, data_file, tmp_path):
    (tmp_path / "bot.yaml").write_text(f"model: {tiny}\ndata: rows.jsonl\nbatch_size: 4\neval: {{samples: 0}}\n")
    done = command("finetune", "bot.yaml", "max_steps=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "bot: finished · 3 steps" in done.stdout
    assert "finished  3 / 3" in command("runs", cwd=tmp_path).stdout
    assert "base" in command("evaluate", "bot", "--limit", "2", "--max-new-tokens", "2", cwd=tmp_path).stdout
    assert "merged" in command("export", "bot", "--to", "merged", cwd=tmp_path).stdout
    for words, code, said in (
        (["finetune"], 2, "recipe file is missing"),
        (["finetun"], 2, "Did you mean finetune"),
        (["show", "nobody"], 1, "no run `nobody`"),
        (["finetune", "bot.yaml", "learning_rate=-1"], 1, "greater than 0"),
        (["-h"], 0, ""),
    ):
        done = command(*words, cwd=tmp_path)
        assert done.returncode == code
        assert said in done.stderr


def test_stop_from_a_terminal(slow, tiny, data_file, tmp_path, make_run, wait_for):
    run = make_run(max_steps=10**6, eval={"steps": 10**6, "samples": 0})
    from tune_magic.executors import local

    local.start(run.path)
    wait_for(run, lambda e: e["type"] == "step")
    assert "asked to stop" in command("stop", "tiny_run", cwd=tmp_path).stdout
    run.wait(timeout_s=30)
    assert run.status == "stopped"


def test_a_run_goes_on_and_is_evaluated_from_another_folder(slow, tiny, data_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tune_magic.finetune(model=str(tiny), data="rows.jsonl", max_steps=2, name="moved", eval={"samples": 0})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    report = tune_magic.evaluate("moved", limit=2, metrics=["loss"])
    assert report.about["rows"] == 2
    assert tune_magic.load_run(run.id).path == run.path
