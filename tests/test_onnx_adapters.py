"""Several runs in one ONNX folder: each adapter is its run, and without one the graph is the base."""

import numpy as np
import pytest
from conftest import make_model
from test_exports import inline, wide  # noqa: F401 - fixtures

from tune_magic import api
from tune_magic.errors import RunFailed, TuneError
from tune_magic.exporters.onnx_adapters import _Pair
from tune_magic.handles import Run
from tune_magic.magics import verbs
from tune_magic.view.export import usage


@pytest.fixture
def two(train, wide):  # noqa: F811
    """Two runs of other ranks and other layers on one base."""
    first = train(model=str(wide), method={"name": "lora", "r": 4, "lora_alpha": 12})
    second = train(
        model=str(wide), seed=5, max_steps=6,
        method={"name": "lora", "r": 8, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    )  # fmt: skip
    return first.rename("first"), second.rename("second")


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.sampled(2)
def test_each_adapter_is_its_run_and_none_is_the_base(quantize, two, inline):  # noqa: F811
    first, second = two
    exported = api.export(
        first, "onnx_adapters", beside=[second], quantize=quantize, rows=2, tolerance=quantize and 0.3
    )
    receipt = exported.receipt
    assert list(receipt["adapters"]) == ["first", "second"]
    assert [about["rank"] for about in receipt["adapters"].values()] == [4, 8]
    assert receipt["adapters"]["second"]["layers"] == 4
    assert receipt["adapters"]["first"]["layers"] > 4
    most = 1e-3 if quantize is None else 0.3
    for about in (*(one["parity"] for one in receipt["adapters"].values()), receipt["base"]):
        assert about["logit_difference"] < most * about["largest_logit"]
    assert receipt["parity"]["rows"] == 4
    for name in ("model.onnx", "adapters/first.onnx_adapter", "adapters/second.onnx_adapter", "genai_config.json"):
        assert name in receipt["files"]
    text = exported.card()["text/plain"]
    assert "first · 4 ·" in text
    assert "base · – ·" in text
    known = {}
    exec(usage(receipt, str(exported.path)), known)  # what the card shows
    differs_by_adapter(known["session"], known["options"])
    assert second.exports == []
    assert Run(first.path).exports[0].ok


def differs_by_adapter(session, options):
    feeds = {"input_ids": np.array([[5, 6, 7]]), "attention_mask": np.ones((1, 3), dtype=np.int64)}
    for node in session.get_inputs():
        if node.name.startswith("past_key_values"):
            feeds[node.name] = np.zeros((1, 2, 0, 16), dtype=np.float32)
    plain, tuned = session.run(["logits"], feeds)[0], session.run(["logits"], feeds, options)[0]
    assert np.abs(plain - tuned).max() > 1e-3


def test_a_larger_rank_by_zeros_is_the_same_product():
    random = np.random.default_rng(0)
    pair = _Pair(random.normal(size=(6, 2)).astype(np.float32), random.normal(size=(2, 5)).astype(np.float32))
    more = pair.padded(7)
    assert more.down.shape == (6, 7)
    assert np.abs(more.down @ more.up - pair.down @ pair.up).max() < 1e-6


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"method": {"name": "full"}}, r"trained by `full`, which leaves no adapter"),
        ({"model": "another"}, r"the base model of first is"),
    ],
)
def test_runs_that_share_no_base_are_refused_before_anything_is_written(other, message, train, inline, tmp_path):  # noqa: F811
    first = train(max_steps=1).rename("first")
    if "model" in other:
        other = {"model": str(make_model(tmp_path / "m", seed=3))}
    second = train(max_steps=1, **other).rename("second")
    with pytest.raises(TuneError, match=message):
        api.export(first, "onnx_adapters", beside=[second])
    assert first.exports == []


def test_what_no_two_matrices_hold_is_refused(train, inline):  # noqa: F811
    run = train(max_steps=1, method={"name": "lora", "r": 4, "use_dora": True})
    with pytest.raises(RunFailed, match=r"lengths of columns beside its matrices"):
        api.export(run, "onnx_adapters")


def test_other_formats_write_one_run_at_a_time(train, inline, one_shell, monkeypatch):  # noqa: F811
    runs = {"first": train(max_steps=1).rename("first"), "second": train(max_steps=2).rename("second")}
    monkeypatch.setitem(one_shell.user_ns, "first", runs["first"])
    monkeypatch.setitem(one_shell.user_ns, "second", runs["second"])
    with pytest.raises(RunFailed, match=r"`--to merged` writes one run at a time.*`--to onnx_adapters`"):
        verbs.run(one_shell, "export", "first second --to merged", None)
