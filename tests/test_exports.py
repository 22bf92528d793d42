"""Exports: what is written runs elsewhere, and a receipt says whether it is the same model."""

import json
import shutil
import sys

import numpy as np
import pytest
from conftest import make_model
from safetensors.torch import load_file, save_file
from test_classify import labelled, make_encoder

from tune_magic import plugins
from tune_magic.data.example import Example, Segment
from tune_magic.errors import RunFailed, TuneError
from tune_magic.exporters import job, parity
from tune_magic.exporters.base import Exporter
from tune_magic.exporters.parity import Limits, Measured
from tune_magic.handles import Export
from tune_magic.storage.folder import RunFolder
from tune_magic.training.tuned import load_tuned
from tune_magic.view.export import usage


@pytest.fixture
def inline(monkeypatch):
    """Export jobs in this process, so that plug-ins of a test are known and no worker has to import torch."""
    from tune_magic.executors import local

    start = local.start
    monkeypatch.setattr(local, "start", lambda folder, executor="inline": start(folder, "inline"))


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    """A decoder whose heads are wide enough for the builder."""
    return make_model(tmp_path_factory.mktemp("models") / "wide", hidden_size=64)


@pytest.fixture
def classified(train, tmp_path):
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in labelled()))

    def start(family="bert", **changes):
        return train(
            model=str(make_encoder(tmp_path / family, family)), data={"train": str(path), "held_out": 0.25},
            method={"name": "lora", "r": 4}, learning_rate=2e-2, max_steps=30, **changes,
        )  # fmt: skip

    return start


@pytest.mark.sampled(3)
@pytest.mark.parametrize("to", ["adapter", "merged", "onnx"])
def test_a_language_model_comes_with_its_receipt(to, train, inline, wide):
    run = train(model=str(wide))
    exported = run.export(to, rows=4)
    found = exported.receipt["parity"]
    assert exported.ok is True
    assert found["rows"] == found["same_answers"] == 4
    assert found["logit_difference"] <= 1e-3 * found["largest_logit"]
    assert found["trained_right"] == found["exported_right"]
    assert found["unit"] == "token"
    assert exported.receipt["size_bytes"] == sum(
        path.stat().st_size for path in exported.path.rglob("*") if path.is_file()
    )
    text = exported.card()["text/plain"]
    for part in ("same answers: 4 of 4", "largest logit difference", "latency", "the same model, within tolerance"):
        assert part in text


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.sampled(4)
def test_a_classifier_in_onnx_chooses_the_same_classes(family, quantize, classified, inline):
    run = classified(family)
    exported = run.export("onnx", quantize=quantize)
    found = exported.receipt["parity"]
    assert found["rows"] == found["same_answers"] == 12
    assert found["trained_right"] >= 11
    assert 0 < found["logit_difference"] < (1e-4 if quantize is None else 0.2 * found["largest_logit"])

    import onnxruntime
    from transformers import AutoConfig, AutoTokenizer

    # as a stranger would: onnxruntime, the tokenizer beside it, a batch of unequal lengths
    session = onnxruntime.InferenceSession(exported.path / "model.onnx")
    texts = ["red thing 1", "a longer text about a green thing, number 17"]
    batch = AutoTokenizer.from_pretrained(exported.path)(texts, return_tensors="np", padding=True)
    logits = session.run(None, dict(batch))[0]
    names = AutoConfig.from_pretrained(exported.path).id2label
    expected = run.predict(texts)
    assert [names[i] for i in logits.argmax(-1)] == expected.idxmax(axis=1).tolist()
    known = {"texts": texts}
    exec(usage(exported.receipt, str(exported.path)), known)  # what the card shows
    assert (known["logits"] == logits).all()
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert np.abs(shares - expected.to_numpy()).max() < (1e-4 if quantize is None else 0.1)


@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {}), ("llama", {"hidden_size": 64}), ("gpt2", {}), ("olmo", {"hidden_size": 64})]
)
@pytest.mark.sampled(4)
def test_int8_decoders_are_smaller_and_keep_their_answers(family, changes, train, inline, tmp_path):
    """Heads too narrow for the builder, a family of it, one that it does not know, and one that it writes wrongly."""
    run = train(model=str(make_model(tmp_path / "m", family, **changes)), max_steps=4)
    plain, small = run.export("onnx", rows=3), run.export("onnx", quantize="int8", rows=3)
    assert small.receipt["size_bytes"] < 0.85 * plain.receipt["size_bytes"]
    assert plain.receipt["parity"]["logit_difference"] < 1e-4
    if "genai_config.json" not in plain.receipt["files"]:
        exec(usage(plain.receipt, str(plain.path)), {})
    assert sys.prefix.encode() not in (plain.path / "model.onnx").read_bytes()  # no path of this machine
    assert 1e-5 < small.receipt["parity"]["logit_difference"] < 0.1


def test_onnxruntime_genai_answers_as_the_model_does(slow, train, inline, wide, capsys):
    import onnxruntime_genai as og

    run = train(model=str(wide))
    exported = run.export("onnx", rows=2)
    model, tokenizer = run.load()
    messages = [{"role": "user", "content": "item 3 is black"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    prompt = list(prompt["input_ids"] if isinstance(prompt, dict) or hasattr(prompt, "keys") else prompt)
    params = og.GeneratorParams(loaded := og.Model(str(exported.path)))
    params.set_search_options(max_length=len(prompt) + 6, do_sample=False)
    generator = og.Generator(loaded, params)
    generator.append_tokens(prompt)
    answer = []
    while not generator.is_done():
        generator.generate_next_token()
        answer.append(int(generator.get_next_tokens()[0]))
    reader = parity.TorchReader(
        model,
        type(
            "T",
            (),
            {
                "objective": type("O", (), {"scores_rows": False, "engine": "tokens"}),
                "tokenizer": tokenizer,
                "method": None,
            },
        ),
    )
    expected = reader.generate(np.array(prompt), 6)
    assert answer[: len(expected)] == expected
    exec(usage(exported.receipt, str(exported.path)), {"messages": messages})  # what the card shows
    printed = capsys.readouterr().out
    assert tokenizer.decode(prompt + expected).rstrip() in printed


def test_out_of_tolerance_is_an_error_that_keeps_the_files(train, inline, wide):
    run = train(model=str(wide), max_steps=3)
    with pytest.raises(RunFailed, match=r"out of tolerance: the largest logit difference.*The files are kept in"):
        run.export("onnx", quantize="int8", rows=2, tolerance=1e-9)
    kept = run.exports[0]
    assert kept.ok is False
    assert (kept.path / "model.onnx").is_file()
    assert "out of tolerance" in kept.card()["text/plain"]
    assert "1e-07" not in kept.card()["text/plain"]


def test_an_exporter_that_ruins_the_model_is_caught(classified, inline, monkeypatch):
    """No exception, the right size, the right speed: only the outputs tell."""
    monkeypatch.setattr(plugins, "_local", {})

    class Ruined(plugins.get("exporter", "merged")):
        def open(self, folder, tuned):
            reader = super().open(folder, tuned)
            reader.model.classifier.bias.data[0] += 5
            return reader

    plugins.register("exporter", "ruined")(Ruined)
    run = classified()
    with pytest.raises(RunFailed, match=r"rows are answered otherwise"):
        run.export("ruined")


def test_an_exporter_says_what_it_cannot(train, inline, tiny):
    run = train(max_steps=1)
    with pytest.raises(RunFailed, match=r"`--to adapter` cannot be quantised to 'int8'.*It knows: none"):
        run.export("adapter", quantize="int8")
    with pytest.raises(RunFailed, match=r"`--to merged` cannot be quantised to 'int8'.*It knows: fp16, bf16"):
        run.export("merged", quantize="int8")
    with pytest.raises(RunFailed, match=r"`--to onnx` cannot be quantised to 'int3'.*It knows: int8"):
        run.export("onnx", quantize="int3")
    with pytest.raises(TuneError, match=r"There is no exporter `onx`.*Did you mean `onnx`"):
        run.export("onx")


def test_without_the_rows_an_export_is_written_and_says_it_was_not_compared(train, inline, data_file):
    run = train(max_steps=1)
    data_file.unlink()
    exported = run.export("merged")
    assert exported.ok is None
    assert (exported.path / "model.safetensors").is_file()
    assert "not compared" in exported.card()["text/plain"]


@pytest.mark.parametrize(
    ("change", "limits", "expected"),
    [
        ({}, Limits(), None),
        ({"logit_difference": 0.02}, Limits(), "2.0% of the largest logit"),
        ({"logit_difference": float("nan")}, Limits(), "largest logit difference is nan"),
        ({"same_answers": 9}, Limits(), "1 of 10 rows are answered otherwise"),
        ({"same_answers": 9}, Limits(spare_rows=1), None),
        ({"exported_right": 6}, Limits(spare_rows=1), "6 rows are right, not 8"),
        ({"exported_right": 10}, Limits(), None),
        ({"trained_right": None, "exported_right": None}, Limits(), None),
    ],
)
def test_what_is_held_against_an_export(change, limits, expected):
    figures = {
        "rows": 10,
        "logit_difference": 1e-6,
        "largest_logit": 1.0,
        "same_answers": 10,
        "trained_right": 8,
        "exported_right": 8,
    }
    found = parity.complaints(figures | change, limits)
    assert (found == []) if expected is None else (expected in found[0])


def test_the_receipt_is_read_from_disk(tmp_path):
    job = tmp_path / "run" / "exports" / "x"
    job.mkdir(parents=True)
    (job / "receipt.json").write_text(
        json.dumps({"format": 1, "to": "merged", "path": "p", "size_bytes": 5, "files": {"a": 5}, "step": 3})
    )
    assert Export(job).ok is None  # one written before there were receipts


def test_every_exporter_keeps_the_contract():
    for name in plugins.names("exporter"):
        exporter = plugins.get("exporter", name)
        assert issubclass(exporter, Exporter)
        assert all(isinstance(limits, Limits) for limits in exporter.quantizations.values())
    assert Measured().answers == []


def test_rows_that_are_no_numbers_are_seen_wherever_they_come():
    rows = [np.full((2, 4), float(number)) for number in range(8)]
    broken = [*rows[:5], np.full((2, 4), np.nan), *rows[6:]]
    examples = [Example(Segment(np.arange(3, dtype=np.int32), np.ones(3, dtype=np.float32)))] * 8
    figures = parity.compare(parity.Measured(rows, [[1]] * 8), parity.Measured(broken, [[1]] * 8), examples, None)
    assert np.isnan(figures["logit_difference"])
    assert parity.complaints(figures, parity.Limits(spare_rows=1))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_run_that_goes_on_meanwhile_is_exported_as_it_was_when_it_was_loaded(
    quantization, train, inline, wide, monkeypatch
):
    """A better checkpoint is there when the files are written: they, receipt and card are of the one that was loaded."""
    run = train(model=str(wide), quantization=quantization)
    old = RunFolder(run.path).best_checkpoint
    new = old.with_name("step-99")
    shutil.copytree(old, new)
    weights = load_file(new / "trainable.safetensors")
    save_file({name: 3 * tensor for name, tensor in weights.items()}, new / "trainable.safetensors")
    now = [old]
    monkeypatch.setattr(RunFolder, "best_checkpoint", property(lambda self: now[0]))

    def load(run):
        tuned = load_tuned(run)
        now[0] = new
        return tuned

    monkeypatch.setattr(job, "load_tuned", load)
    exported = run.export("merged", rows=4)
    step = int(old.name.removeprefix("step-"))
    assert exported.receipt["step"] == step
    assert exported.ok is True
    assert f"checkpoint of step {step}" in (exported.path / "README.md").read_text()
