"""Attention over trees equals attention with a dense mask, and the trees are those of the rows."""

import numpy as np
import pytest
import torch
from conftest import fast, make_model, plainly
from test_engine import FAMILIES, engine_of, load, loss_and_gradient, segment
from torch.nn import functional

from tune_magic.data.example import Example
from tune_magic.training import packing, tree_attention
from tune_magic.training.tree_attention import Tree


def random_examples(seed, count=9, letters=3, longest=14):
    """Rows over so few letters that many begin alike, at several depths."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        tokens = draw.integers(3, 3 + letters, draw.integers(2, longest)).tolist()
        first = int(draw.integers(0, len(tokens)))
        branches = [segment(draw.integers(3, 90, n), [1] * n) for n in draw.integers(1, 5, draw.integers(0, 3))]
        found.append(Example(segment(tokens, [0] * first + [1] * (len(tokens) - first)), tuple(branches)))
    return found


def forest(share=True, worth=1, seed=0):
    batch = packing.pack(random_examples(seed), share=share, worth=worth)
    return batch, Tree(batch.nodes, torch.device("cpu"))


@pytest.mark.parametrize("worth", [1, 8])
@pytest.mark.parametrize("seed", range(20))
def test_every_target_is_predicted_from_its_own_row_and_nothing_else(seed, worth):
    examples = random_examples(seed)
    batch = packing.pack(examples, share=True, worth=worth)
    mask = Tree(batch.nodes, torch.device("cpu")).mask[0, 0].numpy()
    tokens, positions = batch.input_ids[0], batch.position_ids[0]
    seen = []
    for source, target, owner in zip(batch.sources, batch.targets, batch.owners, strict=True):
        if source < 0:
            continue  # a first token is predicted from nothing
        visible = np.flatnonzero(mask[source])
        assert positions[visible].tolist() == list(range(len(visible)))
        seen.append((int(owner), tuple(tokens[visible].tolist()), int(target)))
    expected = []
    for owner, example in enumerate(examples):
        for number, path in enumerate(packing._paths(example)):
            for place in np.flatnonzero(path.weights):
                if place and (number == 0 or place >= len(example.trunk)):
                    expected.append((owner, tuple(path.tokens[:place].tolist()), int(path.tokens[place])))
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("seed", range(5))
def test_shared_nodes_are_as_few_tokens_as_the_rows_have_prefixes(seed):
    """At every depth: the tokens of the row are the nodes of the trie of untrained prefixes, and each row's rest."""
    examples = [Example(e.trunk) for e in random_examples(seed)]
    free = [packing._sharable(e.trunk).tolist() for e in examples]
    prefixes = {tuple(tokens[:n]) for tokens in free for n in range(1, len(tokens) + 1)}
    rests = sum(len(e.trunk) - len(tokens) for e, tokens in zip(examples, free, strict=True))
    assert packing.pack(examples, share=True, worth=1).input_ids.size == len(prefixes) + rests


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_attention_with_the_dense_mask(seed, groups, dtype, tolerance):
    batch, tree = forest(seed=seed)
    assert any(stop > end for _, end, stop in tree.nodes)
    torch.manual_seed(seed)
    size, heads, width = batch.input_ids.size, 6, 16
    query = torch.randn(1, heads, size, width, dtype=dtype, requires_grad=True)
    key, value = (torch.randn(1, heads // groups, size, width, dtype=dtype, requires_grad=True) for _ in range(2))
    upstream = torch.randn(1, size, heads, width, dtype=dtype)
    ours, _ = tree_attention._attend(torch.nn.Module(), query, key, value, tree.as_mask(), scaling=0.3)
    wide_key, wide_value = (x.repeat_interleave(groups, 1) for x in (key, value))
    dense = functional.scaled_dot_product_attention(query, wide_key, wide_value, attn_mask=tree.mask, scale=0.3)
    theirs = dense.transpose(1, 2)
    found = (ours, *torch.autograd.grad(ours, (query, key, value), upstream))
    expected = (theirs, *torch.autograd.grad(theirs, (query, key, value), upstream))
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.sampled(2)
def test_deep_trees_are_exact_for_every_family_on_the_list(family, tmp_path):
    changes = {"sliding_window": None} if family == "mistral" else {}
    engine = engine_of(load(make_model(tmp_path / family, family, **changes)).eval())
    examples = [e for e in random_examples(3, count=12, longest=30) if e.weight]
    examples = [Example(segment([1, *e.trunk.tokens], [0, *e.trunk.weights]), e.branches) for e in examples]
    nodes = packing.pack(examples, share=True, worth=1).nodes
    depths = [sum(end <= start < stop for _, end, stop in nodes) for start, _, _ in nodes]
    assert max(depths) >= 3
    ours = loss_and_gradient(engine, fast(engine), examples)
    theirs = loss_and_gradient(engine, plainly(engine), examples)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert (ours[1] - theirs[1]).norm() / theirs[1].norm() < 1e-5


def test_with_dropout_or_without_a_tree_it_is_the_usual_attention(tiny):
    batch, tree = forest()
    size = batch.input_ids.size
    query, key, value = (torch.randn(1, 4, size, 8) for _ in range(3))
    plain, _ = tree_attention._attend(torch.nn.Module(), query, key, value, tree.mask)
    ours, _ = tree_attention._attend(torch.nn.Module(), query, key, value, tree.as_mask())
    torch.testing.assert_close(plain, ours, rtol=1e-5, atol=1e-5)
    torch.manual_seed(0)
    dropped, _ = tree_attention._attend(torch.nn.Module(), query, key, value, tree.as_mask(), dropout=0.5)
    assert not torch.allclose(dropped, ours)


def test_generation_and_padding_go_on_as_before(tiny):
    plain, ours = load(tiny).eval(), load(tiny).eval()
    engine_of(ours)
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 4]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    expected = plain.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(ours.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False), expected)


def test_a_model_that_drops_the_mask_fails_loudly_not_silently(tiny):
    """What carries a tree has no columns: whoever uses it as a mask gets an error."""
    _, tree = forest()
    size = tree.size
    query = torch.randn(1, 4, size, 8)
    with pytest.raises(RuntimeError):
        functional.scaled_dot_product_attention(query, query, query, attn_mask=tree.as_mask())


def test_a_saved_model_knows_nothing_of_it(tiny, tmp_path):
    engine = engine_of(load(tiny))
    engine.model.save_pretrained(tmp_path / "saved")
    assert tree_attention.NAME not in "".join(p.read_text() for p in (tmp_path / "saved").glob("*.json"))


def test_without_the_kernel_a_dense_mask_does_it(monkeypatch):
    _, tree = forest()
    query, key, value = (torch.randn(1, 4, tree.size, 8) for _ in range(3))
    ours, _ = tree_attention._attend(torch.nn.Module(), query, key, value, tree.as_mask())
    monkeypatch.setattr(tree_attention, "_KERNEL", "gone")
    tree = Tree(tree.nodes, tree.device)
    assert tree.way == "dense"
    dense, _ = tree_attention._attend(torch.nn.Module(), query, key, value, tree.as_mask())
    assert not torch.equal(ours, dense)
    torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-5)
