"""What a GPU is given, computed on the CPU as far as it can be: FlexAttention's own mathematics, without its kernels."""

import warnings

import numpy as np
import pytest
import torch
from conftest import fast, make_model, plainly
from test_engine import CASES, engine_of, load, loss_and_gradient, segment
from test_rows import classifier, some_rows
from test_rows import engine_of as row_engine_of
from test_tree_attention import forest, random_examples
from torch.nn.attention import flex_attention

from tune_magic.data.example import Example
from tune_magic.objectives.classify import Classify
from tune_magic.objectives.sft import SFT
from tune_magic.training import engine as engines
from tune_magic.training import packing
from tune_magic.training.tree_attention import Tree, way_on


@pytest.fixture
def flex_on_cpu(monkeypatch):
    """FlexAttention refuses gradients on the CPU and warns where it is not compiled; its plain form can both."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(engines.tree_attention, "way_on", lambda device: "flex")
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*flex_attention called without torch.compile")
        yield


def test_each_device_has_its_way():
    assert way_on(torch.device("cuda")) == "flex"
    assert way_on(torch.device("cpu")) == "pairs"
    assert way_on(torch.device("meta")) == "dense"


@pytest.mark.parametrize("seed", range(3))
def test_the_block_mask_is_the_tree(seed):
    batch, _ = forest(seed=seed)
    batch = packing.rounded(batch)
    tree = Tree(batch.nodes, torch.device("cpu"), "flex")
    places = torch.arange(tree.size)
    blocks = tree.blocks
    seen = blocks.mask_mod(None, None, places[:, None], places[None, :])
    expected = np.zeros((tree.size, tree.size), dtype=bool)
    for start, end, stop in batch.nodes:
        expected[start:stop, start:end] = True
    assert np.array_equal(seen.numpy(), np.tril(expected))
    some = seen.view(tree.size // 128, 128, tree.size // 128, 128).any(1).any(-1)
    assert torch.equal(blocks.to_dense()[0, 0].bool(), some)  # only blocks in which something is seen are computed


def deep_trees():
    rows = [e for e in random_examples(5, count=9, longest=40) if e.weight]
    return [Example(segment([1, *e.trunk.tokens], [0, *e.trunk.weights]), e.branches) for e in rows]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox"])
@pytest.mark.sampled(2)
def test_a_tree_by_flex_attention_is_exact(family, tmp_path, flex_on_cpu):
    engine = engine_of(load(make_model(tmp_path / family, family)).eval())
    assert engine.attention == "flex"
    for examples in [*CASES.values(), deep_trees()]:
        assert engine._packed(examples).input_ids.size % 128 == 0
        ours = loss_and_gradient(engine, fast(engine), examples)
        theirs = loss_and_gradient(engine, plainly(engine), examples)
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
        assert (ours[1] - theirs[1]).norm() / theirs[1].norm() < 1e-5


def test_a_classifier_by_flex_attention_is_exact(flex_on_cpu):
    engine, rows = row_engine_of(classifier("llama")), some_rows(prefix=range(5, 25))
    ours, theirs = (loss_and_gradient(engine, way, rows, Classify()) for way in (fast(engine), plainly(engine)))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert (ours[1] - theirs[1]).norm() / theirs[1].norm() < 1e-4


def test_attention_dropout_takes_the_dense_mask(tmp_path, flex_on_cpu):
    engine = engine_of(load(make_model(tmp_path / "m", attention_dropout=0.5)).train())
    first, second = (float(SFT().loss_sum(engine.states(CASES["branches"])).detach()) for _ in range(2))
    assert first != second


def test_where_flex_attention_fails_a_dense_mask_is_taken_and_said(tiny, monkeypatch):
    """Here it fails by itself: it has no gradients on the CPU."""
    monkeypatch.setattr(engines.tree_attention, "way_on", lambda device: "flex")
    engine = engine_of(load(tiny))
    engine.self_check(CASES["shared prefix"], SFT().loss_sum)
    assert engine.packed
    assert engine.attention == "dense"
    assert "a dense mask instead of FlexAttention" in engine.reason
    assert "backward on CPU" in engine.reason


def test_rows_are_filled_up_to_few_sizes():
    sizes = set()
    for length in range(1, 5000, 7):
        tokens = np.arange(length)[None]
        nothing = np.empty(0)
        batch = packing.Batch(tokens, tokens, nothing, nothing, nothing, nothing, nodes=((0, length, length),))
        size = packing.rounded(batch).input_ids.size
        assert size % 128 == 0
        assert length <= size < length + max(128, length / 8)
        sizes.add(size)
    assert len(sizes) < 30


def test_compiled_layers_give_the_same(tiny):
    engine, plain = engine_of(load(tiny)), engine_of(load(tiny))
    assert engine.compile(CASES["shared prefix"], SFT().loss_sum) is None
    assert engine.compiled
    for name in ("shared prefix", "branches"):
        ours, theirs = (loss_and_gradient(e, e.states, CASES[name]) for e in (engine, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert engine.inner.base_model.layers[0]._compiled_call_impl is None  # generation calls the layer itself


def test_without_a_compiler_layers_stay_as_they_are_and_the_plan_says_why(train, monkeypatch):
    from torch._inductor import cpp_builder, exc

    def missing(*_, **__):
        raise exc.InvalidCxxCompiler

    torch.compiler.reset()
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    run = train(max_steps=2, torch_compile=True)
    assert run.status == "finished"
    assert not run.summary().plan["compiled"]
    assert run.summary().plan["engine_note"].startswith("the layers are not compiled: ")
