"""ONNX with fewer bits, and ONNX Runtime GenAI: each is measured, and what is lost is told."""

import json

import numpy as np
import pytest
from conftest import make_model
from test_exports import classified, inline, wide  # noqa: F401 - fixtures

from tune_magic.errors import RunFailed
from tune_magic.exporters import genai
from tune_magic.view.export import usage


@pytest.fixture
def language(train, wide):  # noqa: F811
    """A run with heads wide enough for the builder."""
    return train(model=str(wide))


@pytest.mark.parametrize(("quantize", "most"), [(None, 1e-4), ("int8", 0.05), ("int4", 0.6)])
@pytest.mark.sampled(3)
def test_genai_answers_through_its_own_generator(quantize, most, language, inline):  # noqa: F811
    exported = language.export("genai", quantize=quantize, rows=2, tolerance=1.0)
    found = exported.receipt["parity"]
    assert found["computed_by"] == "ONNX Runtime GenAI"
    assert found["logit_difference"] / found["largest_logit"] < most
    if quantize is None:
        assert found["same_answers"] == 2
        known = {"messages": [{"role": "user", "content": "item 3 is black"}]}
        exec(usage(exported.receipt, str(exported.path)), known)  # what the card shows


def test_answers_of_genai_end_where_those_of_the_model_do(slow, language, inline):  # noqa: F811
    """The builder takes the end from the base's configuration alone."""
    exported = language.export("genai", rows=1)
    about = json.loads((exported.path / "genai_config.json").read_text())
    _, tokenizer = language.load()
    assert tokenizer.eos_token_id in about["model"]["eos_token_id"]


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", {}, r"builder cannot write this `gpt2` model.*`--to onnx`, which traces it"),
        ("olmo", {"hidden_size": 64}, r"`olmo` model does not run, or is another model.*`--to onnx`"),
        ("llama", {}, r"`llama` model does not run, or is another model"),
    ],
)
@pytest.mark.sampled(3)
def test_what_the_builder_cannot_is_refused(slow, family, changes, message, train, inline, tmp_path):  # noqa: F811
    """A family it does not know, one that it writes wrongly, heads too narrow for its attention."""
    run = train(model=str(make_model(tmp_path / "m", family, **changes)), max_steps=1)
    with pytest.raises(RunFailed, match=message):
        run.export("genai", rows=1)


def test_without_genai_the_package_is_named(language, inline, monkeypatch):  # noqa: F811
    monkeypatch.setattr(genai, "is_installed", lambda: False)
    with pytest.raises(RunFailed, match=r"needs onnxruntime-genai.*pip install onnxruntime-genai"):
        language.export("genai")


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.sampled(2)
def test_scales_set_by_training_rows_keep_the_classes(family, classified, inline):  # noqa: F811
    run = classified(family)
    exported = run.export("onnx", quantize="static")
    found = exported.receipt["parity"]
    assert exported.ok is True
    assert found["same_answers"] >= 11
    assert found["logit_difference"] > 1e-4

    import onnx

    graph = onnx.load(exported.path / "model.onnx").graph
    kinds = {node.op_type for node in graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    rounded = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    assert not any(
        rounded & set(node.input) for node in graph.node if node.op_type in ("Softmax", "Add") and len(node.input) < 2
    )


def test_static_scales_need_the_rows_they_are_set_by(classified, inline, tmp_path):  # noqa: F811
    run = classified()
    (tmp_path / "labelled.jsonl").write_text("")
    with pytest.raises(RunFailed, match=r"has changed since it was trained"):
        run.export("onnx", quantize="static")
    (tmp_path / "labelled.jsonl").unlink()
    with pytest.raises(RunFailed, match=r"set(s)? scales by training rows, which are gone.*int8 needs none"):
        run.export("onnx", quantize="static")


def test_each_kind_of_model_says_which_numbers_it_knows(language, classified, inline):  # noqa: F811
    with pytest.raises(RunFailed, match=r"Language models are not quantised to static.*int8 and int4"):
        language.export("onnx", quantize="static")
    with pytest.raises(RunFailed, match=r"Classifiers are not quantised to int4.*int8 and static"):
        classified().export("onnx", quantize="int4")


def test_four_bits_are_smaller_than_eight_and_the_receipt_tells_their_price(slow, language, inline):  # noqa: F811
    eight = language.export("onnx", quantize="int8", rows=2, tolerance=1.0).receipt
    four = language.export("onnx", quantize="int4", rows=2, tolerance=1.0).receipt
    assert four["size_bytes"] < eight["size_bytes"]
    assert four["parity"]["logit_difference"] > 2 * eight["parity"]["logit_difference"]


def test_four_bits_of_products_that_have_none_are_refused(slow, train, inline, tmp_path):  # noqa: F811
    run = train(model=str(make_model(tmp_path / "m", "gpt2")), max_steps=1)
    with pytest.raises(RunFailed, match=r"none that onnxruntime has in 4 bits.*int8"):
        run.export("onnx", quantize="int4", rows=1)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("quantize", "most"), [("fp16", 0.005), ("bf16", 0.04)])
def test_a_merged_model_in_half_the_bytes(quantize, most, language, inline):  # noqa: F811
    from transformers import AutoModelForCausalLM

    whole, half = language.export("merged", rows=2), language.export("merged", quantize=quantize, rows=2)
    assert half.receipt["files"]["model.safetensors"] < 0.55 * whole.receipt["files"]["model.safetensors"]
    found = half.receipt["parity"]
    assert 0 < found["logit_difference"] / found["largest_logit"] < most
    model = AutoModelForCausalLM.from_pretrained(half.path)
    assert str(model.dtype) == {"fp16": "torch.float16", "bf16": "torch.bfloat16"}[quantize]
    assert np.isfinite(found["logit_difference"])
