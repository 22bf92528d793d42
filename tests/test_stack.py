"""Several adapters on one base: each is what its run alone is, mixed or switched; what is combined is what it is called."""

import json
import math
import shutil

import pytest
import torch
from conftest import make_model, rows

import tune_magic
from tune_magic.chatting import Chat
from tune_magic.errors import RunFailed, TuneError
from tune_magic.evaluation import chat as chat_job
from tune_magic.executors import local
from tune_magic.handles import Run
from tune_magic.recipe import build_recipe
from tune_magic.recipe.combination import Combination, merged_recipe
from tune_magic.storage import folder, places
from tune_magic.storage.control import Control
from tune_magic.storage.events import EventLog
from tune_magic.training.alike import check_combinable, differences
from tune_magic.training.stack import BASE, Stack
from tune_magic.training.tuned import load_tuned

PROMPTS = ["item 3 is", "item 12 is", "and", "what is item 7 of the whole list"]
TOKENS = torch.tensor([[1, 40, 90, 17, 200, 33], [1, 41, 91, 18, 201, 34], [1, 5, 6, 7, 8, 9]])


METHODS = {
    "first": {"max_steps": 8, "method": {"name": "lora", "r": 4, "lora_alpha": 16}},
    "second": {
        "max_steps": 5, "seed": 7, "learning_rate": 2e-2,
        "method": {"name": "lora", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """Two runs on one base that learned different things: other layers, another scale, another seed."""
    home = tmp_path_factory.mktemp("trained")
    data = home / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    shared = {
        "model": str(tiny), "data": {"train": str(data), "held_out": 0.25}, "learning_rate": 1e-2, "batch_size": 4,
        "max_length": 128, "eval": {"steps": 4, "samples": 0},
    }  # fmt: skip
    for name, own in METHODS.items():
        content = {"name": name, "recipe": build_recipe(shared | own).given()}
        path = folder.create(home / "tune_runs", "finetune", content)
        local.start(path, "inline")
        Run(path).raise_for_state()
    return home / "tune_runs"


@pytest.fixture
def runs(trained, tmp_path):
    """Copies of the two runs in the test's own folder, by name."""
    shutil.copytree(trained, tmp_path / "tune_runs", dirs_exist_ok=True)
    found = {run.name: run for run in (Run(path) for path in places.folders([tmp_path / "tune_runs"]))}
    return {name: found[name] for name in METHODS}


@torch.no_grad()
def logits(model, tokens=TOKENS, **options):
    return model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options).logits


def alone(run):
    return logits(load_tuned(run).model)


def base_logits(run):
    from transformers import AutoModelForCausalLM

    return logits(AutoModelForCausalLM.from_pretrained(run.recipe["model"], dtype=torch.float32).eval())


def test_switching_gives_what_each_run_gives_and_off_is_the_base(runs):
    stack = Stack(runs)
    assert stack.names == ["first", "second"]
    for name in ("second", "first", "second"):
        stack.switch(name)
        assert torch.equal(logits(stack.model), alone(runs[name]))
    stack.off()
    assert torch.equal(logits(stack.model), base_logits(runs["first"]))
    stack.switch("first")
    assert torch.equal(logits(stack.model), alone(runs["first"]))
    assert not torch.equal(alone(runs["first"]), alone(runs["second"]))
    with pytest.raises(TuneError, match=r"no adapter called third here. There are first, second, base"):
        stack.switch("third")


def test_a_mixed_batch_gives_what_each_row_gives_alone(runs):
    stack = Stack(runs)
    assert stack.mixes
    names = ["second", BASE, "first"]
    mixed = logits(stack.model, adapter_names=stack.peft_names(names))
    wanted = {**{name: alone(run) for name, run in runs.items()}, BASE: base_logits(runs["first"])}
    for row, name in enumerate(names):
        assert torch.allclose(mixed[row], wanted[name][row], atol=1e-5, rtol=0)
    assert (wanted["first"] - wanted["second"]).abs().max() > 1e-2

    asked = [*PROMPTS, *PROMPTS, *PROMPTS]
    by = [["first", "second", BASE][(place + place // 4) % 3] for place in range(len(asked))]
    single = {name: run.generate(PROMPTS, max_new_tokens=6) for name, run in runs.items()}
    stack.off()
    single[BASE] = stack.generate(PROMPTS, [BASE] * 4, max_new_tokens=6)
    found = stack.generate(asked, by, max_new_tokens=6)
    assert found == [single[name][place % 4] for place, name in enumerate(by)]
    assert stack.active == BASE  # as it was before
    assert torch.equal(logits(stack.model), base_logits(runs["first"]))
    assert stack.generate(PROMPTS, ["first"] * 4, max_new_tokens=6) == single["first"]


def test_a_batch_that_is_broken_off_leaves_nothing_behind(runs, monkeypatch):
    stack = Stack(runs)
    wanted = logits(stack.model)
    forward = stack.model.base_model.model.forward

    def breaking(*args, **kwargs):
        forward(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stack.model.base_model.model, "forward", breaking)
        with pytest.raises(KeyboardInterrupt):
            stack.generate(PROMPTS[:2], ["first", "second"], max_new_tokens=2)
    assert torch.equal(logits(stack.model), wanted)
    assert all(not module._forward_pre_hooks for module in stack.model.modules())


@pytest.mark.parametrize("method", [
    {"name": "lora", "r": 4, "use_dora": True}, {"name": "lora", "r": 4, "use_rslora": True}, {"name": "ia3"},
    {"name": "vera", "r": 8}, {"name": "oft", "oft_block_size": 8}, {"name": "ln_tuning"},
    {"name": "prompt", "num_virtual_tokens": 4}, {"name": "p_tuning", "num_virtual_tokens": 4},
    {"name": "prefix", "num_virtual_tokens": 4},
], ids=lambda method: "-".join(map(str, method.values())))  # fmt: skip
@pytest.mark.sampled(9)
def test_every_method_that_adds_can_be_stacked(method, train):
    pair = {
        name: train(method=method, max_steps=3, seed=seed, learning_rate=2e-2) for name, seed in (("a", 1), ("b", 2))
    }
    stack = Stack(pair)
    single = {}
    for name, run in pair.items():
        tuned = load_tuned(run)
        single[name] = logits(tuned.model)
        assert torch.allclose(logits(stack.switch(name).model), single[name], atol=1e-6, rtol=0)
    assert not torch.equal(single["a"], single["b"])
    stack.off()
    assert torch.allclose(logits(stack.model), base_logits(pair["a"]), atol=1e-6, rtol=0)
    wanted = {name: run.generate(PROMPTS[:2], max_new_tokens=4) for name, run in pair.items()}
    found = stack.generate([*PROMPTS[:2], *PROMPTS[:2]], ["a", "b", "b", "a"], max_new_tokens=4)
    assert found == [wanted["a"][0], wanted["b"][1], wanted["b"][0], wanted["a"][1]]


def test_runs_with_the_same_new_tokens_can_be_stacked_but_not_combined(train, write):
    corpus = write("corpus.txt", "kaleidoscope telescope microscope\n" * 20)
    made = {"vocabulary": {"corpus": str(corpus), "size": 3, "min_count": 2}}
    pair = {name: train(max_steps=3, seed=seed, **made) for name, seed in (("a", 1), ("b", 2))}
    for run in pair.values():
        run.raise_for_state()
    stack = Stack(pair)
    assert not stack.mixes
    tokens = torch.tensor([[1, 40, 259, 260, 17, 261]])
    for name, run in pair.items():
        stack.switch(name)
        assert torch.equal(logits(stack.model, tokens), logits(load_tuned(run).model, tokens))
    bare = stack.off()
    assert torch.allclose(logits(stack.model)[..., :259], base_logits(pair["a"])[..., :259], atol=1e-6, rtol=0)
    assert len(bare.tokenizer) == 259
    with pytest.raises(TuneError, match="a has embeddings of new tokens"):
        check_combinable(pair)


# --- combining -------------------------------------------------------------------------------------------------------


def updates(stack, name):
    """Return what an adapter adds to each layer's weights, by the layer's name, and A, B and their scale."""
    from peft.tuners.lora import LoraLayer

    own = stack._adapters[name]
    return {
        key: (m.lora_A[own].weight.detach(), m.lora_B[own].weight.detach(), m.scaling[own])
        for key, m in stack.model.named_modules()
        if isinstance(m, LoraLayer) and own in m.lora_A
    }


def delta(parts):
    down, up, scale = parts
    return scale * (up.double() @ down.double())


def ties(tensors, weights, density):
    """TIES by the paper's algorithm, entry by entry: trim, elect the sign by total mass, average those that agree."""
    trimmed = []
    for tensor in tensors:
        flat = tensor.flatten()
        kept = sorted(range(len(flat)), key=lambda i: -abs(float(flat[i])))[: int(density * len(flat))]
        trimmed.append([float(flat[i]) if i in set(kept) else 0.0 for i in range(len(flat))])
    merged = []
    for values in zip(*trimmed, strict=True):
        sign = 1 if sum(values) >= 0 else -1
        agreeing = [w * v for w, v in zip(weights, values, strict=True) if v * sign > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(merged, dtype=torch.float64).reshape(tensors[0].shape)


def roots(weights, scales):
    return [math.sqrt(abs(w * s)) for w, s in zip(weights, scales, strict=True)]


@pytest.fixture
def stack(runs):
    return Stack(runs)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -0.5)])
def test_cat_is_exactly_the_sum_and_svd_its_best_approximation(stack, weights):
    chosen = dict(zip(("first", "second"), weights, strict=True))
    facts = stack.combine("sum", Combination(chosen, "cat"))
    small = stack.combine("small", Combination(chosen, "svd", rank=3))
    first, second, cat, svd = (updates(stack, name) for name in ("first", "second", "sum", "small"))
    assert cat.keys() == first.keys() | second.keys() == svd.keys()
    missed = total = 0.0
    for layer in cat:
        exact = sum(w * delta(part[layer]) for w, part in zip(weights, (first, second), strict=True) if layer in part)
        assert cat[layer][0].shape[0] == 8
        assert torch.allclose(delta(cat[layer]), exact, atol=1e-7)
        u, s, vh = torch.linalg.svd(exact)
        assert torch.allclose(delta(svd[layer]), u[:, :3] @ torch.diag(s[:3]) @ vh[:3], atol=1e-6)
        missed += float(s[3:].square().sum())
        total += float(exact.square().sum())
    assert facts["from_sum"] == pytest.approx(0, abs=1e-4)
    assert small["from_sum"] == pytest.approx(math.sqrt(missed / total), rel=1e-4)

    # the model computes with it: W + w1 s1 B1 A1 + w2 s2 B2 A2
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(stack.tuned("first").base, dtype=torch.float32).eval()
    for layer in cat:
        weight = plain.get_submodule(layer.removeprefix("base_model.model.")).weight
        weight.data += sum(
            w * delta(p[layer]) for w, p in zip(weights, (first, second), strict=True) if layer in p
        ).float()
    assert torch.allclose(logits(stack.switch("sum").model), logits(plain), atol=1e-5)


@pytest.mark.parametrize("how", ["svd", "dare_linear_svd"])
def test_a_rank_beyond_a_layers_smaller_side_is_filled_up_with_zeros(stack, how):
    stack.combine("sum", Combination({"first": 0.7, "second": 0.3}, "cat"))
    stack.combine(
        "large", Combination({"first": 0.7, "second": 0.3}, how, density=None if how == "svd" else 1.0, rank=40)
    )
    whole, large = updates(stack, "sum"), updates(stack, "large")
    assert any(min(parts[0].shape[1], len(parts[1])) < 40 for parts in large.values())
    for layer, (down, up, scale) in large.items():
        assert (len(down), up.shape[1], scale) == (40, 40, 1.0)
        assert torch.allclose(delta(large[layer]), delta(whole[layer]), atol=1e-6)


def test_linear_is_the_product_of_sums_and_says_how_far_that_is_from_the_sum(stack):
    weights = (0.6, 0.4)
    facts = stack.combine("both", Combination(dict(zip(("first", "second"), weights, strict=True))))
    first, second, both = (updates(stack, name) for name in ("first", "second", "both"))
    apart = size = 0.0
    for layer, made in both.items():
        parts = [(w, part[layer]) for w, part in zip(weights, (first, second), strict=True) if layer in part]
        factors = [math.sqrt(w * part[2]) for w, part in parts]
        down = sum(f * part[0] for f, (_, part) in zip(factors, parts, strict=True))
        up = sum(f * part[1] for f, (_, part) in zip(factors, parts, strict=True))
        assert torch.allclose(delta(made), (up @ down).double(), atol=1e-6)
        exact = sum(w * delta(part) for w, part in parts)
        apart += float((delta(made) - exact).square().sum())
        size += float(exact.square().sum())
    assert facts["from_sum"] == pytest.approx(math.sqrt(apart / size), rel=1e-4)
    assert facts["from_sum"] > 0.05  # it is not the sum

    # the facts, from whole matrices
    def flat(part):
        whole = {layer: delta(part[layer]) if layer in part else torch.zeros_like(delta(both[layer])) for layer in both}
        return torch.cat([whole[layer].flatten() for layer in both])

    mine, one, other = map(flat, (both, first, second))
    assert facts["size"] == pytest.approx(float(mine.norm()), rel=1e-5)
    about = facts["sources"]["second"]
    assert about["cosine"] == pytest.approx(float(mine @ other / mine.norm() / other.norm()), abs=1e-5)
    assert about["distance"] == pytest.approx(float((mine - other).norm() / other.norm()), rel=1e-4)
    assert facts["between"] == [
        ["first", "second", pytest.approx(float(one @ other / one.norm() / other.norm()), abs=1e-5)]
    ]


@pytest.mark.parametrize("density", [0.3, 0.8])
def test_ties_is_the_papers(stack, density):
    weights = (1.5, 0.5)
    chosen = dict(zip(("first", "second"), weights, strict=True))
    stack.combine("factors", Combination(chosen, "ties", density))
    stack.combine("whole", Combination(chosen, "ties_svd", density, rank=32))
    first, second, factors, whole = (updates(stack, name) for name in ("first", "second", "factors", "whole"))
    for layer in [layer for layer in factors if layer in first and layer in second][:3]:
        pair = [first[layer], second[layer]]
        by = roots(weights, [part[2] for part in pair])
        for place in (0, 1):
            found = factors[layer][place].double()
            assert torch.allclose(found, ties([part[place] for part in pair], by, density), atol=1e-6)
        exact = ties([delta(part) for part in pair], weights, density)
        u, s, vh = torch.linalg.svd(exact, full_matrices=False)
        assert torch.allclose(delta(whole[layer]), (u[:, :32] * s[:32]) @ vh[:32], atol=1e-6)


def test_pruning_by_magnitude_keeps_the_largest(stack):
    stack.combine("pruned", Combination({"first": 1.0, "second": 1.0}, "magnitude_prune", 0.25))
    first, second, pruned = (updates(stack, name) for name in ("first", "second", "pruned"))
    layer = next(layer for layer in pruned if layer in first and layer in second)
    for place in (0, 1):
        wanted = 0
        for part in (first[layer], second[layer]):
            bound = part[place].abs().flatten().sort(descending=True).values[int(0.25 * part[place].numel()) - 1]
            wanted = wanted + math.sqrt(part[2]) * part[place] * (part[place].abs() >= bound)
        assert torch.allclose(pruned[layer][place], wanted, atol=1e-6)


def test_dare_is_seeded_and_unbiased(slow, stack):
    chosen, before = {"first": 0.5, "second": 0.5}, torch.get_rng_state()
    for number, seed in enumerate((3, 3, 4)):
        stack.combine(f"drawn{number}", Combination(chosen, "dare_linear", 0.4, seed=seed))
    assert torch.equal(torch.get_rng_state(), before)
    drawn = [updates(stack, f"drawn{number}") for number in range(3)]
    layer = next(iter(drawn[0]))
    assert all(torch.equal(drawn[0][key][0], drawn[1][key][0]) for key in drawn[0])
    assert not torch.equal(drawn[0][layer][0], drawn[2][layer][0])

    # what is kept is scaled up, so that the mean over draws is the matrix itself
    first, second = updates(stack, "first")[layer], updates(stack, "second").get(layer)
    parts = [part for part in (first, second) if part is not None]
    wanted = sum(math.sqrt(0.5 * part[2]) * part[0] for part in parts)
    total, draws = torch.zeros_like(wanted), 60
    for seed in range(draws):
        stack.combine(f"of{seed}", Combination(chosen, "dare_linear", 0.5, seed=seed))
        total += updates(stack, f"of{seed}")[layer][0]
    spread = math.sqrt(sum(float((0.5 * part[2]) * part[0].square().sum()) for part in parts) / draws)
    assert float((total / draws - wanted).norm()) < 1.5 * spread  # the standard error at density 0.5 is 1.0 of it
    assert float(wanted.norm()) > 3 * spread


def test_a_density_of_1_leaves_nothing_out(stack):
    chosen = {"first": 0.5, "second": 0.5}
    stack.combine("plain", Combination(chosen))
    for how in ("magnitude_prune", "dare_linear"):
        stack.combine(how, Combination(chosen, how, 1.0))
        for layer, parts in updates(stack, "plain").items():
            assert torch.allclose(delta(updates(stack, how)[layer]), delta(parts), atol=1e-7)


def test_the_scale_of_rslora_is_counted_once(train):
    method = {"name": "lora", "r": 4, "lora_alpha": 8, "use_rslora": True}
    pair = {name: train(method=method, max_steps=4, seed=seed) for name, seed in (("a", 1), ("b", 2))}
    stack = Stack(pair)
    stack.combine("sum", Combination({"a": 0.5, "b": 0.5}, "cat"))
    for layer, parts in updates(stack, "sum").items():
        exact = 0.5 * delta(updates(stack, "a")[layer]) + 0.5 * delta(updates(stack, "b")[layer])
        assert parts[2] == 1.0
        assert torch.allclose(delta(parts), exact, atol=1e-7)
        assert updates(stack, "a")[layer][2] == 4.0  # 8 / sqrt(4)


def test_unequal_ranks_go_by_cat_and_svd_alone(train):
    pair = {
        name: train(method={"name": "lora", "r": r}, max_steps=3) for name, r in (("small", 2), ("large", 6))
    }  # fmt: skip
    stack = Stack(pair)
    chosen = {"small": 1.0, "large": 1.0}
    for how in ("linear", "ties", "dare_linear", "magnitude_prune"):
        with pytest.raises(
            TuneError, match=rf"`{how}` needs one rank in all, got r=2 in small, r=6 in large; `cat` and `svd`"
        ):
            stack.combine("no", Combination(chosen, how))
    for how, rank in (("cat", 8), ("svd", 6), ("ties_svd", 6), ("dare_linear_svd", 6)):
        stack.combine(how, Combination(chosen, how))
        assert {parts[0].shape[0] for parts in updates(stack, how).values()} == {rank}
        assert stack.tuned(how).recipe.method.r == rank
    stack.combine("more", Combination({"cat": 1.0, "small": -1.0}, "cat"))  # what was combined can be again
    for layer, parts in updates(stack, "more").items():
        assert torch.allclose(delta(parts), delta(updates(stack, "large")[layer]), atol=1e-6)


@pytest.mark.parametrize(("chosen", "says"), [
    (Combination({"a": 0.5, "b": 0.5}, "tie"), "no way called `tie`, did you mean ties"),
    (Combination({"a": 0.5, "b": 0.5}, "zzz"), "there are linear, cat, svd"),
    (Combination({"a": 0.5}, "svd"), "`svd` takes 2 or more, got 1"),
    (Combination({"a": 0.5, "b": 0.0}), "weight of b must be a number other than 0, got 0.0"),
    (Combination({"a": 0.5, "b": math.nan}), "weight of b must be a number other than 0, got nan"),
    (Combination({"a": 1, "b": 1}, "linear", 0.5), "`linear` leaves nothing out, so it has no density"),
    (Combination({"a": 1, "b": 1}, "ties", 0.0), "density must be above 0 and at most 1, got 0"),
    (Combination({"a": 1, "b": 1}, "ties", 1.5), "density must be above 0 and at most 1, got 1.5"),
    (Combination({"a": 1, "b": 1}, "cat", rank=4), "the rank of `cat` follows from the adapters'"),
    (Combination({"a": 1, "b": 1}, "svd", rank=0), "rank must be at least 1, got 0"),
    (Combination({"a": 1, "c": 1}, "ties"), "needs one rank in all, got r=4 in a, r=8 in c"),
    (Combination({"a": 0, "c": 1}, "linear", 2), "weight of a.*; .*no density; .*one rank"),
])  # fmt: skip
def test_what_cannot_be_combined_is_refused_with_every_reason(chosen, says):
    with pytest.raises(TuneError, match=rf"These adapters cannot be combined: .*{says}"):
        chosen.check({"a": 4, "b": 4, "c": 8})


@pytest.mark.parametrize(("layers", "joined"), [
    (["all-linear", "all-linear"], "all-linear"), (["all-linear", ["q_proj"]], "all-linear"),
    ([["v_proj"], ["q_proj", "v_proj"]], ["q_proj", "v_proj"]), ([".*q_proj", ".*v_proj"], "(.*q_proj)|(.*v_proj)"),
    ([".*q_proj", ["v_proj"]], None),
])  # fmt: skip
def test_the_layers_of_what_comes_out_are_those_of_all(layers, joined):
    recipes = {
        name: build_recipe({"model": "m", "data": "d.jsonl", "method": {"name": "lora", "r": 3, "target_modules": own}})
        for name, own in zip("ab", layers, strict=True)
    }
    chosen = Combination({"a": 1.0, "b": 1.0}, "cat")
    if joined is None:
        with pytest.raises(TuneError, match="one names its layers by a pattern, another by a list"):
            merged_recipe(recipes, chosen)
        return
    method = merged_recipe(recipes, chosen).method
    assert (method.target_modules, method.r, method.lora_alpha) == (joined, 6, 6)


def test_runs_that_cannot_share_a_base_are_refused_with_what_differs(runs, train, make_run, tmp_path):
    lora = runs["first"]
    other = train(model=str(make_model(tmp_path / "other", seed=5)), max_steps=1)
    assert any(
        "base model of lora is tiny" in text and "that of other other (" in text
        for text in differences({"lora": lora, "other": other})
    )
    full = train(method={"name": "full"}, max_steps=1)
    pissa = train(method={"name": "lora", "r": 4, "init_lora_weights": "pissa"}, max_steps=1)
    ia3 = train(method={"name": "ia3"}, max_steps=1)
    for run, says in (
        (other, "the base model of first is tiny"), (full, "run was trained by `full`, which leaves no adapter"),
        (pissa, "run was trained by `lora`, which leaves no adapter beside an unchanged base"),
        (ia3, "the method of first is `lora`, that of run `ia3`"),
    ):  # fmt: skip
        with pytest.raises(TuneError, match=f"cannot share one base model: .*{says}"):
            tune_magic.stack(lora, run=run)
    with pytest.raises(TuneError, match="no checkpoint"):
        tune_magic.stack(lora, run=make_run())
    with pytest.raises(TuneError, match="Which runs"):
        tune_magic.stack()
    with pytest.raises(TuneError, match="b has the method `ia3`"):
        check_combinable({"b": ia3})
    dora = train(method={"name": "lora", "r": 4, "use_dora": True}, max_steps=1)
    with pytest.raises(TuneError, match="has lengths of columns beside"):
        tune_magic.merge_adapters({lora: 1.0, dora: 1.0}, name="no")


@pytest.fixture
def planned(make_run, monkeypatch):
    """Return a function that makes a run that looks trained: it has a plan and, it seems, a checkpoint."""
    monkeypatch.setattr(folder.RunFolder, "best_checkpoint", property(lambda run: run.path))

    def make(objective=None, facts=None, **changes):
        run = make_run(**({"objective": objective} if objective else {}), **changes)
        with EventLog(run.path / "events.jsonl", attempt=1) as log:
            about = {"name": objective or "sft", **(facts or {})}
            log.append("plan", fingerprints={"model": "0" * 64}, objective=about)
        return run

    return make


def test_bases_that_are_rounded_otherwise_are_not_one(planned):
    lora = {"name": "lora", "r": 4}
    kinds = {
        "plain": {}, "nf4": {"quantization": "nf4"}, "int8": {"quantization": "int8"},
        "once": {"quantization": {"kind": "nf4", "double_quant": False}},
    }  # fmt: skip
    made = {name: planned(method=lora, **keys) for name, keys in kinds.items()}
    for one in kinds:
        for other in kinds:
            assert bool(differences({"one": made[one], "other": made[other]})) == (one != other)
    says = "the quantisation of plain is none, that of nf4 nf4 with its scales in 8 bits"
    assert differences({"plain": made["plain"], "nf4": made["nf4"]}) == [says]
    assert differences({"a": made["nf4"], "b": planned(quantization={"kind": "nf4", "double_quant": True})}) == []
    assert check_combinable({"a": made["nf4"], "b": made["nf4"]}) == {"a": 4, "b": 4}
    loftq = planned(method=lora | {"init_lora_weights": "loftq"}, quantization="nf4")
    assert differences({"loftq": loftq, "nf4": made["nf4"]}) == []
    with pytest.raises(TuneError, match=r"loftq has a start that made up for what rounding took from its base"):
        check_combinable({"loftq": loftq, "nf4": made["nf4"]})


LEARNED = {
    "sft": {}, "tag": {"tags": ["O", "B-x"]}, "regression": {"mean": 1.0, "deviation": 2.0},
    "extractive_qa": {}, "embed": {}, "multi_label": {"classes": ["a", "b"]}, "classify": {"classes": ["a", "b"]},
    "multi_task": {"tasks": {"kind": {"classes": ["a", "b"]}, "length": {"mean": 1.0, "deviation": 2.0}}},
    "domain_adversarial": {"classes": ["a", "b"], "domains": ["c", "d"]}, "seq2seq": {},
}  # fmt: skip


def test_runs_that_do_other_things_share_no_base_and_only_language_models_are_combined(planned):
    made = {name: planned(name, facts) for name, facts in LEARNED.items()}
    for one, run in made.items():
        for other, another in made.items():
            assert bool(differences({one: run, "again": another})) == (one != other), (one, other)
        if one != "sft":
            told = "a head of classes" if one == "classify" else f"the objective `{one}`, which trains no causal"
            with pytest.raises(TuneError, match=f"x has {told}"):
                check_combinable({"x": run, "y": run})
    assert differences({"a": made["tag"], "b": made["regression"]}) == [
        "the task of a is `tag` of 2 names, O, B-x, that of b `regression`"
    ]
    # what is learned with does not matter where the model is the same, nor do numbers that each run has for itself
    assert differences({"a": made["sft"], "b": planned("lm")}) == []
    assert differences({"a": made["regression"], "b": planned("regression", {"mean": 5.0, "deviation": 1.0})}) == []
    weighed = planned("classify", {"classes": ["a", "b"], "weights": [1.0, 2.0]})
    assert differences({"a": made["classify"], "b": weighed}) == []
    tasks = {"kind": {"classes": ["a", "c"]}, "length": {"mean": 1.0, "deviation": 2.0}}
    assert differences({"a": made["multi_task"], "b": planned("multi_task", {"tasks": tasks})})
    assert differences({"a": made["tag"], "b": planned("tag", {"tags": ["O", "B-y"]})})


def test_a_base_that_was_changed_is_refused(recipe, train, tmp_path):
    folder = make_model(tmp_path / "mine")
    pair = {name: train(model=str(folder), max_steps=1, seed=seed) for name, seed in (("a", 1), ("b", 2))}
    make_model(folder, seed=9)
    with pytest.raises(TuneError, match="The model of tiny_run has changed"):
        Stack(pair)


# --- what users hold -------------------------------------------------------------------------------------------------


def test_a_stack_answers_combines_and_forgets(runs):
    held = tune_magic.stack(*runs.values(), also=runs["second"])
    assert held.names == ["first", "second", "also"]
    assert "not loaded" in repr(held)
    wanted = {name: run.generate(PROMPTS[:2], max_new_tokens=5) for name, run in runs.items()}
    assert held.generate(PROMPTS[:2], max_new_tokens=5) == wanted["first"]
    assert held.generate(PROMPTS[0], "second", max_new_tokens=5) == wanted["second"][:1]
    mixed = held.generate([PROMPTS[0], PROMPTS[1], PROMPTS[0]], adapters=["also", "first", "base"], max_new_tokens=5)
    assert mixed[:2] == [wanted["second"][0], wanted["first"][1]]
    assert held.off().active == "base"
    assert mixed[2] == held.generate(PROMPTS[0], max_new_tokens=5)[0]
    facts = held.combine("both", {"first": 0.7, "second": 0.3}, how="cat")
    assert facts["sources"]["first"]["weight"] == 0.7
    model, _ = held.switch("both").load()
    before = logits(model)
    held.unload()
    assert "not loaded" in repr(held)
    model, tokenizer = held.switch("both").load()
    assert torch.equal(logits(model), before)
    assert len(tokenizer) == 259
    for call, says in (
        (lambda: held.generate("a", "third"), "no adapter called third"),
        (lambda: held.generate(["a", "b"], adapters=["first"]), "one name for each of the 2 prompts"),
        (lambda: held.generate("a", "first", adapters=["first"]), "give one of the two"),
        (lambda: held.combine("both", {"first": 1.0}), "called both already"),
        (lambda: held.combine("base", {"first": 1.0}), "called base already"),
        (lambda: held.combine("x", {"base": 1.0}), "no adapter called base here"),
        (lambda: held.predict("a"), "These runs answer texts"),
        (lambda: held.keep("first"), "is not combined from runs"),
    ):  # fmt: skip
        with pytest.raises(TuneError, match=says):
            call()


def test_classifiers_are_switched_and_not_combined(train, write):
    lines = "".join(f"{'good' if i % 2 else 'bad'} text number {i},{'ab'[i % 2]}\n" for i in range(40))
    data = {"train": str(write("rows.csv", f"text,label\n{lines}"))}
    pair = {name: train(data=data, max_steps=6, seed=seed) for name, seed in (("a", 1), ("b", 2))}
    held = tune_magic.stack(**pair)
    for name, run in pair.items():
        assert held.predict(["good", "bad"], name).equals(run.predict(["good", "bad"]))
    with pytest.raises(TuneError, match="a has a head of classes; b has a head of classes"):
        held.combine("both", {"a": 1.0, "b": 1.0})
    with pytest.raises(TuneError, match="no trained head"):
        held.predict("good", "base")
    with pytest.raises(TuneError, match="These runs write no texts"):
        held.generate("good")
    lines = lines.replace(",a", ",c")
    other = train(data={"train": str(write("others.csv", f"text,label\n{lines}"))}, max_steps=2)
    with pytest.raises(
        TuneError,
        match="the task of a is telling 2 classes apart into a, b, that of other telling 2 classes apart into b, c",
    ):
        tune_magic.stack(a=pair["a"], other=other)


def test_runs_that_give_numbers_are_switched_and_write_nothing(train, write, runs):
    lines = "".join(f"{'good ' * (i % 4)}text,{i % 4 + 0.5}\n" for i in range(40))
    data = {"train": str(write("rows.csv", f"text,score\n{lines}"))}
    pair = {
        name: train(data=data, objective="regression", max_steps=3, seed=seed) for name, seed in (("a", 1), ("b", 2))
    }
    held = tune_magic.stack(**pair)
    for name, run in pair.items():
        found, wanted = held.predict(["good text", "text"], name), run.predict(["good text", "text"])
        assert list(found.index) == list(wanted.index)
        assert found["value"].tolist() == pytest.approx(wanted["value"].tolist(), rel=1e-5)
    with pytest.raises(TuneError, match="These runs write no texts"):
        held.generate("good")
    pair["a"].rename("a")
    with pytest.raises(TuneError, match="a finds something, first answers"):
        tune_magic.chat(pair["a"], runs["first"])


@pytest.fixture
def inline(monkeypatch):
    """Do jobs in this process."""
    start = local.start
    monkeypatch.setattr(local, "start", lambda folder, executor="inline": start(folder, "inline"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("how", "options"), [
    ("linear", {}), ("cat", {}), ("svd", {"rank": 3}), ("svd", {"rank": 20}), ("ties", {"density": 0.4}), ("dare_ties_svd", {"seed": 5}),
])  # fmt: skip
@pytest.mark.sampled(6)
def test_a_merged_run_is_a_run(runs, inline, here, how, options):
    merged = tune_magic.merge_adapters({"first": 0.7, "second": 0.3}, how, name="both", **options)
    assert merged.status == "finished"
    assert tune_magic.last is merged
    stack = Stack(runs)
    facts = stack.combine("both", Combination({"first": 0.7, "second": 0.3}, how, **options))
    model, _ = merged.load()
    assert torch.allclose(logits(model), logits(stack.switch("both").model), atol=1e-6)
    assert merged.recipe["method"]["r"] == options.get("rank", {"cat": 8}.get(how, 4))
    assert merged.recipe["method"]["lora_alpha"] == merged.recipe["method"]["r"]
    result = merged.summary().result
    assert result["from_sum"] == pytest.approx(facts["from_sum"], abs=1e-5)
    lineage = merged.info["merge"]["sources"]
    assert [source["id"] for source in lineage] == [run.id for run in runs.values()]
    text = merged.card()["text/plain"]
    assert f"both: merged · {how}" in text
    assert "0.7 first: cosine" in text
    assert ("away from the weighted sum" in text) == (facts["from_sum"] > 0.02)
    assert merged.card()["text/html"].count("<tr") == 3

    # it evaluates, answers, is exported and put beside others as any run
    report = merged.evaluate(limit=3, max_new_tokens=4)
    assert math.isfinite(report.metrics["loss"])
    assert report.about["step"] == "0"
    assert "held-out" in report.about["split"]
    exported = merged.export("adapter", rows=3)
    assert exported.ok is True
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(runs["first"].recipe["model"], dtype=torch.float32)
    assert torch.allclose(logits(PeftModel.from_pretrained(plain, exported.path).eval()), logits(model), atol=1e-6)
    assert merged.export("merged", rows=3).ok is True
    again = tune_magic.stack(merged, runs["first"])
    assert again.generate(PROMPTS[:1], max_new_tokens=3) == merged.generate(PROMPTS[:1], max_new_tokens=3)


def test_the_same_merge_is_found_again_and_its_code_makes_it(runs, inline, here, capsys):
    first, second = runs.values()
    merged = tune_magic.merge_adapters({first: 1.0, second: -0.5}, "cat", name="less")
    assert tune_magic.merge_adapters({first: 1.0, second: -0.5}, "cat", name="less").id == merged.id
    assert "merged so before" in capsys.readouterr().out
    assert tune_magic.merge_adapters({first: 1.0, second: -0.25}, "cat", name="less").id != merged.id
    names = {}
    exec(merged.code().replace(")", ", fresh=True)"), names)  # the call's only closing parenthesis
    made = names["less"]
    assert made.id != merged.id
    assert torch.equal(logits(made.load()[0]), logits(merged.load()[0]))
    assert first.status == "finished"
    assert tune_magic.load_run("less").kind == "merge"
    assert merged.metrics == {}
    assert len(merged.history) == 0
    assert "less" in tune_magic.compare(merged, first).card()["text/plain"]
    assert merged.plot() is not None
    twice = tune_magic.merge_adapters({made: 1.0, second: 0.5}, "cat")  # and what was taken away comes back
    assert twice.name == "less+second"
    assert torch.allclose(logits(twice.load()[0]), alone(first), atol=1e-5)
    with pytest.raises(TuneError, match="cannot be a run's name"):
        tune_magic.merge_adapters({first: 1.0}, name="a b")


def test_tables_given_as_objects_stay_with_a_merged_run(runs, make_run, inline, here, recipe):
    made = {}
    for seed in (1, 2):
        keys = recipe | {"data": {"train": rows(), "held_out": 0.25}, "seed": seed, "max_steps": 2}
        made[tune_magic.finetune(**keys, name=f"of_{seed}", executor="inline")] = 0.5
    merged = tune_magic.merge_adapters(made, name="of_both")
    assert merged.evaluate(limit=2, max_new_tokens=2).about["rows"] == 2


def test_a_merge_that_fails_says_why(runs, inline, here):
    (runs["second"].best_checkpoint / "trainable.safetensors").write_bytes(b"broken")
    with pytest.raises(RunFailed, match=r"trainable\.safetensors is not what was written"):
        tune_magic.merge_adapters({"first": 1.0, "second": 1.0}, name="no")
    text = tune_magic.load_run("no").card()["text/plain"]
    assert "no: failed · linear" in text
    assert "trainable.safetensors" in text


def test_the_command_merges_by_a_worker(slow, runs, here, capsys):
    from tune_magic import cli

    assert cli.main(["merge", "both", "first=0.7", "second=0.3", "--how", "ties", "--density", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "both: merged · ties, density 0.5, r=4" in out
    assert "next: %evaluate both · %tune chat both · %export both --to adapter" in out
    assert cli.main(["merge", "x", "first=many"]) == 2
    assert cli.main(["merge", "x", "first", "first=0.5"]) == 2
    assert cli.main(["merge", "x", "first", "second", "--density", "0.5"]) == 1
    err = capsys.readouterr().err
    assert "The weight of first must be a number, got 'many'." in err
    assert "first is there twice." in err
    assert "`linear` leaves nothing out" in err
    assert cli.main(["runs"]) == 0
    assert "both" in capsys.readouterr().out


def test_the_magic_binds_what_it_merged(runs, inline, here):
    from types import SimpleNamespace

    from tune_magic.magics import verbs

    shell = SimpleNamespace(user_ns={"mine": runs["first"]}, parent_header={})
    assert verbs.run(shell, "tune", "merge both mine=0.5 second=0.5 --how cat", None) is None
    assert shell.user_ns["both"].info["merge"]["combination"]["how"] == "cat"
    assert shell.user_ns["both"].status == "finished"


# --- talking to several ----------------------------------------------------------------------------------------------


def talk(chosen, monkeypatch):
    """Do a chat job here and return its answers by side."""
    with monkeypatch.context() as patched:
        patched.setattr(chat_job, "_IDLE_S", 0.3)
        patched.setattr(local, "start", lambda folder, executor="worker": None)
        chat = Chat(*chosen)
        said = {
            "turn": 1, "text": PROMPTS[0], "system": "", "max_new_tokens": 5, "temperature": 0.0, "top_p": 1.0, "seed": 0,
            "base": chat.has_base, "fresh": False,
        }  # fmt: skip
        chat.job.request("say", **said)
        with EventLog(chat.job.path / "events.jsonl", attempt=1) as log:
            chat_job.chat(chat.job, log, Control(chat.job.path, 1))
    return {event["side"]: event["text"] for event in chat.job.events("answer")}


def test_two_runs_and_their_base_answer_the_same_message(runs):
    with tune_magic.chat(*runs.values()) as chat:
        assert chat.name == "first, second"
        answers = chat.ask(PROMPTS[0], max_new_tokens=6)
        assert list(answers) == ["first", "second", "base"]
        for name, run in runs.items():
            assert answers[name] == run.generate(PROMPTS[0], max_new_tokens=6)[0]
        assert answers["base"] == tune_magic.stack(*runs.values()).generate(PROMPTS[0], "base", max_new_tokens=6)[0]
        more = chat.ask("and", max_new_tokens=4, base=False)
        history = [{"role": "user", "content": PROMPTS[0]}, {"role": "assistant", "content": answers["second"]},
                   {"role": "user", "content": "and"}]  # fmt: skip
        assert more == {name: more[name] for name in runs}
        assert more["second"] == runs["second"].generate([history], max_new_tokens=4)[0]
        text = chat.card()["text/plain"]
        assert text.startswith("first, second: chat · ")
        assert f"second: {' '.join(answers['second'].split())}" in text
    chat.job.wait(30)


def test_runs_that_cannot_share_a_base_answer_beside_each_other(runs, train, tmp_path, monkeypatch):
    full = train(method={"name": "full"}, max_steps=6)
    full.rename("whole")
    answers = talk([full, runs["first"]], monkeypatch)
    assert answers["whole"] == full.generate(PROMPTS[0], max_new_tokens=5)[0]
    assert answers["first"] == runs["first"].generate(PROMPTS[0], max_new_tokens=5)[0]
    assert answers["base"] == tune_magic.stack(runs["first"]).generate(PROMPTS[0], "base", max_new_tokens=5)[0]
    other = train(model=str(make_model(tmp_path / "other", seed=5)), max_steps=2)
    assert list(talk([other, runs["first"]], monkeypatch)) == ["tiny_run", "first"]  # two bases: which would answer?


def test_models_that_do_not_fit_beside_each_other_are_refused(runs, train, monkeypatch):
    from tune_magic.evaluation import speakers

    full = train(method={"name": "full"}, max_steps=1)
    monkeypatch.setattr(speakers.memory, "free", lambda device: 1 << 20)
    with pytest.raises(
        TuneError, match=r"These 2 models do not fit beside each other: 0\.3 GB are needed, 0\.0 GB are free"
    ):
        talk([full, runs["first"]], monkeypatch)
    assert set(talk(list(runs.values()), monkeypatch)) == {
        "first",
        "second",
        "base",
    }  # one base is no more than one run


def test_several_classifiers_answer_and_others_do_not_mix_with_them(runs, train, write, monkeypatch):
    lines = "".join(f"text number {i},{'ab'[i % 2]}\n" for i in range(40))
    data = {"train": str(write("rows.csv", f"text,label\n{lines}"))}
    pair = [train(data=data, max_steps=2, seed=seed) for seed in (1, 2)]
    for number, run in enumerate(pair):
        run.rename(f"kind{number}")
    answers = talk(pair, monkeypatch)
    assert list(answers) == ["kind0", "kind1"]
    for number, run in enumerate(pair):
        assert answers[f"kind{number}"].split("\n")[0].split()[1] == run.predict(PROMPTS[0]).iloc[0].idxmax()
    with pytest.raises(TuneError, match="kind0 classifies, first answers"):
        tune_magic.chat(pair[0], runs["first"])
    with pytest.raises(TuneError, match="A run cannot answer beside itself"):
        tune_magic.chat(runs["first"], runs["first"])


def test_the_panel_talks_to_several(runs, monkeypatch):
    from tune_magic.widgets import ChatPanel

    made = []

    class Fake:
        turns, is_answering, has_ended, state = (), False, False, "listening"

        def __init__(self, *runs, base):
            made.append((runs, base))

        def usual_system(self):
            return ""

        def close(self):
            pass

    monkeypatch.setattr("tune_magic.widgets.chat_panel.Chat", Fake)
    panel = ChatPanel(*runs.values())
    panel.act()
    assert made == [(tuple(runs.values()), True)]
    assert panel.bundle()["text/plain"].startswith("first, second: chat · listening")
    panel.close()
