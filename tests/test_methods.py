"""Every method of the menu trains, saves, resumes exactly, answers, and is what PEFT makes of it."""

import json

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file
from test_classify import labelled, make_encoder
from test_engine import load
from test_objectives import make_seq2seq
from test_training import SHORT, assert_same, stop_and_resume
from transformers import AutoModelForSeq2SeqLM

from tune_magic.errors import RunFailed, TuneError
from tune_magic.executors import local
from tune_magic.exporters.parity import TorchReader
from tune_magic.methods.bottleneck import Bottleneck, BottleneckOptions
from tune_magic.methods.freeze import Freeze, FreezeOptions
from tune_magic.methods.full import Full, FullOptions
from tune_magic.methods.lora import Lora, LoraOptions
from tune_magic.methods.prompts import Prefix, PrefixOptions
from tune_magic.models.generate import generate
from tune_magic.models.layers import depths_of, stacks_of
from tune_magic.recipe import build_recipe
from tune_magic.training.optimizer import make_optimizer, set_learning_rate
from tune_magic.training.tuned import load_tuned

METHODS = {
    "dora": {"name": "lora", "r": 4, "use_dora": True},
    "pissa": {"name": "lora", "r": 4, "init_lora_weights": "pissa"},
    "olora": {"name": "lora", "r": 4, "init_lora_weights": "olora"},
    "gaussian": {"name": "lora", "r": 4, "init_lora_weights": "gaussian", "loraplus_lr_ratio": 4},
    "ia3": {"name": "ia3"},
    "vera": {"name": "vera", "r": 16},
    "oft": {"name": "oft", "oft_block_size": 8},
    "ln_tuning": {"name": "ln_tuning"},
    "pfeiffer": {"name": "bottleneck", "bottleneck_size": 8},
    "houlsby": {"name": "bottleneck", "bottleneck_size": 8, "placement": "houlsby", "activation": "relu"},
    "decayed": {"name": "full", "layer_lr_decay": 0.5},
    "unfreeze": {"name": "unfreeze", "layer_lr_decay": 0.5},
    "prompt": {"name": "prompt", "num_virtual_tokens": 6},
    "p_tuning": {"name": "p_tuning", "num_virtual_tokens": 6},
    "prefix": {"name": "prefix", "num_virtual_tokens": 6},
    "prefix by a network": {"name": "prefix", "num_virtual_tokens": 6, "prefix_projection": True},
}
PROMPTS = ("prompt", "p_tuning", "prefix", "prefix by a network")


@pytest.fixture
def inline(monkeypatch):
    """Export and evaluate in this process."""
    start = local.start
    monkeypatch.setattr(local, "start", lambda folder, executor="inline": start(folder, "inline"))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.sampled(5)
def test_a_language_model_learns_resumes_and_answers_by_every_method(name, train, make_run, monkeypatch, inline):
    whole = train(method=METHODS[name], learning_rate=2e-2, **SHORT)
    whole.raise_for_state()
    evaluations, plan = whole.summary().evaluations, whole.summary().plan
    assert min(evaluations[step]["loss"] for step in evaluations if step) < evaluations[0]["loss"]
    assert 0 < plan["trainable_parameters"] <= plan["parameters"]
    assert plan["packed"] == (name not in PROMPTS)
    run = make_run(method=METHODS[name], learning_rate=2e-2, **SHORT)
    stop_and_resume(run, monkeypatch, 14)
    assert_same(run, whole)
    report = whole.evaluate(limit=3, max_new_tokens=4)
    assert report.comparisons["loss"].tuned < report.comparisons["loss"].base
    assert isinstance(whole.generate("item 1 is red", max_new_tokens=3)[0], str)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.sampled(5)
def test_the_base_is_the_base_whatever_the_method(name, train, tiny):
    """Held-out rows are scored by the model as it came, not by what the method makes of it before it has learned."""
    reference = train(max_steps=1, eval={"steps": 1, "samples": 0}).summary().evaluations[0]["loss"]
    found = train(method=METHODS[name], max_steps=1, eval={"steps": 1, "samples": 0}).summary().evaluations[0]["loss"]
    assert found == pytest.approx(reference, rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.sampled(4)
def test_a_classifier_learns_by_every_method(name, train, tmp_path):
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in labelled()))
    run = train(
        method=METHODS[name], model=str(make_encoder(tmp_path / "bert", num_key_value_heads=4)), data={"train": str(path), "held_out": 0.25},
        learning_rate=5e-3 if METHODS[name]["name"] == "lora" else 3e-2, max_steps=40, batch_size=8, eval={"steps": 20},
    )  # fmt: skip
    run.raise_for_state()
    evaluations = run.summary().evaluations
    assert evaluations[40]["loss"] < evaluations[0]["loss"] - 0.1
    assert load_tuned(run).model is not None


@pytest.mark.sampled(8)
@pytest.mark.parametrize("kind", ["language model", "classifier"])
@pytest.mark.parametrize("name", METHODS)
def test_in_bfloat16_what_is_trained_is_kept_in_float32(name, kind, train, inline, tmp_path):
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in labelled()))
    encoder = {"data": {"train": str(path), "held_out": 0.25}}
    if kind == "classifier":
        encoder["model"] = str(make_encoder(tmp_path / "bert", num_key_value_heads=4))
    run = train(method=METHODS[name], dtype="bfloat16", max_steps=4, **encoder if kind == "classifier" else {})
    run.raise_for_state()
    tuned = load_tuned(run, dtype=torch.bfloat16)
    assert {p.dtype for p in tuned.model.parameters() if p.requires_grad} == {torch.float32}
    saved = load_file(run.best_checkpoint / "trainable.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    if tuned.method.merges:
        assert run.export("merged", rows=2).ok is True


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.sampled(6)
def test_an_export_is_the_model_or_is_refused(name, train, inline, tmp_path):
    run = train(method=METHODS[name], learning_rate=2e-2, max_steps=6)
    if name in ("pissa", "olora", "pfeiffer", "houlsby", "decayed", "unfreeze"):
        with pytest.raises(RunFailed, match="no adapter that PEFT could put on the base"):
            run.export("adapter", rows=3)
    else:
        assert run.export("adapter", rows=3).ok is True
    if load_tuned(run).method.merges:
        assert run.export("merged", rows=3).ok is True
    else:
        with pytest.raises(RunFailed, match="cannot be folded into the model"):
            run.export("merged", rows=3)


def test_prompts_leave_fewer_positions(train, tmp_path, write):
    path = write("long.jsonl", (json.dumps({"prompt": "p " * 20, "completion": "blue"}) + "\n") * 20)
    model = str(make_model(tmp_path / "m", max_position_embeddings=64))
    data = {"train": str(path), "chat_template": False}
    for name, room in (("lora", 64), ("prompt", 58)):  # of 64
        method = METHODS.get(name, {"name": "lora"})
        run = train(model=model, data=data, method=method, max_steps=1)
        run.raise_for_state()
        assert run.summary().plan["max_length"] == room


LAYERS, WIDTH, KEYS, INNER = 2, 32, 16, 64  # of the tiny model, with two heads of keys and values for four of queries
LINEAR = [(WIDTH, WIDTH), (WIDTH, KEYS), (WIDTH, KEYS), (WIDTH, WIDTH), *2 * [(WIDTH, INNER)], (INNER, WIDTH)]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dora", LAYERS * sum(4 * (inputs + outputs) + outputs for inputs, outputs in LINEAR)),
        ("pfeiffer", LAYERS * (2 * 8 * WIDTH + 8 + WIDTH)),
        ("houlsby", LAYERS * 2 * (2 * 8 * WIDTH + 8 + WIDTH)),
        ("ia3", LAYERS * (2 * KEYS + INNER)),
        ("vera", LAYERS * (2 * 16 + WIDTH + KEYS)),
        ("ln_tuning", LAYERS * 2 * WIDTH + WIDTH),
        ("prompt", 6 * WIDTH),
        ("prefix", 6 * LAYERS * 2 * KEYS),
    ],
)
def test_as_many_parameters_are_trained_as_the_papers_count(name, expected, train):
    assert train(method=METHODS[name], max_steps=1).summary().plan["trainable_parameters"] == expected


def test_lora_plus_gives_the_second_matrix_a_rate_of_its_own(tiny):
    method = Lora(LoraOptions(r=4, loraplus_lr_ratio=16))
    model = method.apply(load(tiny), "CAUSAL_LM")
    recipe = build_recipe({"model": "m", "data": "rows.jsonl", "weight_decay": 0.1})
    optimizer = make_optimizer(model, recipe, method)
    set_learning_rate(optimizer, 1e-3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {
        names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    assert len(rates) == 2 * 7 * LAYERS
    for name, (rate, decay) in rates.items():
        assert rate == pytest.approx(16e-3 if "lora_B" in name else 1e-3)
        assert decay == 0.1


def test_pissa_starts_as_the_model_and_trains_its_principal_part(tiny):
    plain, method = load(tiny), Lora(LoraOptions(r=4, init_lora_weights="pissa"))
    model = method.apply(load(tiny), "CAUSAL_LM")
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    weight = plain.model.layers[0].mlp.up_proj.weight.detach()
    layer = method.inner(model).model.layers[0].mlp.up_proj
    update = layer.get_delta_weight("default").detach()
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(update, u[:, :4] @ torch.diag(s[:4]) @ v[:4], rtol=1e-3, atol=1e-4)
    assert method.adds is False


def test_a_method_that_does_not_know_the_model_says_so(train, tmp_path):
    model = str(make_model(tmp_path / "m", "stablelm"))
    with pytest.raises(RunFailed, match=r"`ia3` cannot be put on this model(?s:.)*target_modules"):
        train(model=model, method="ia3").raise_for_state()
    named = {"name": "ia3", "target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}
    train(model=model, method=named, max_steps=2).raise_for_state()


def test_what_reads_learned_keys_is_not_computed_twice(train):
    with pytest.raises(RunFailed, match=r"cannot be trained with `gradient_checkpointing`"):
        train(method=METHODS["prefix"], gradient_checkpointing=True).raise_for_state()


def test_a_bottleneck_is_the_formula_and_starts_as_the_model(tiny):
    plain, method = load(tiny), Bottleneck(BottleneckOptions(bottleneck_size=4, placement="houlsby", activation="silu"))
    model = method.apply(load(tiny), "CAUSAL_LM")
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
        adapter = model.model.layers[1].mlp.down_proj
        adapter.up.weight.normal_()
        x = torch.randn(3, INNER)
        y = plain.model.layers[1].mlp.down_proj(x)
        h = y @ adapter.down.weight.T + adapter.down.bias
        torch.testing.assert_close(adapter(x), y + (h * h.sigmoid()) @ adapter.up.weight.T, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(ids).logits, plain(ids).logits)
        with method.without(model):
            assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_and_a_decoder_are_two_stacks(family, tmp_path):
    def model():
        return AutoModelForSeq2SeqLM.from_pretrained(folder)

    folder = make_seq2seq(tmp_path / family, family)
    assert [len(stack) for stack in stacks_of(model())] == [2, 2]
    for placement, each in (("pfeiffer", (1, 1)), ("houlsby", (2, 3))):  # a decoder has two attention blocks
        options = BottleneckOptions(bottleneck_size=4, placement=placement)
        made = Bottleneck(options).apply(model(), "SEQ_2_SEQ_LM")
        trained = [name for name, p in made.named_parameters() if p.requires_grad and name.endswith("up.weight")]
        counts = tuple(sum(f"{side}." in name for name in trained) for side in ("encoder", "decoder"))
        assert counts == (2 * each[0], 2 * each[1])
        assert sum(count > 0 for count in counts) == 2

    depths = depths_of(model(), "SEQ_2_SEQ_LM")
    block = "block" if family == "t5" else "layers"
    found = {
        (side, number): {depth for name, depth in depths.items() if f"{side}.{block}.{number}." in name}
        for side in ("encoder", "decoder")
        for number in (0, 1)
    }
    assert found == {("decoder", 1): {1}, ("decoder", 0): {2}, ("encoder", 1): {3}, ("encoder", 0): {4}}
    assert {depth for name, depth in depths.items() if "shared" in name or "embed" in name} == {5}
    if family == "t5":
        assert (depths["decoder.final_layer_norm.weight"], depths["encoder.final_layer_norm.weight"]) == (0, 3)
    with pytest.raises(TuneError, match="has an encoder and a decoder"):
        Freeze(FreezeOptions(trainable_layers=1)).apply(model(), "SEQ_2_SEQ_LM")


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gpt_neox", "phi"])
@pytest.mark.sampled(2)
def test_bottlenecks_find_their_place_in_other_families(family, train, tmp_path):
    sizes = {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4}, "qwen3": {"head_dim": 8}}.get(family, {})
    run = train(model=str(make_model(tmp_path / family, family, **sizes)), method=METHODS["houlsby"], max_steps=3)
    run.raise_for_state()
    assert run.summary().plan["trainable_parameters"] == LAYERS * 2 * (2 * 8 * WIDTH + 8 + WIDTH)


def test_lower_layers_learn_more_slowly(tiny):
    method = Full(FullOptions(layer_lr_decay=0.5))
    model = method.apply(load(tiny), "CAUSAL_LM")
    factors = {name: method.learning_rate_factor(name) for name, _ in model.named_parameters()}
    for start, factor in (("model.embed", 0.125), ("model.layers.0", 0.25), ("model.layers.1", 0.5), ("model.norm", 1)):
        assert {value for name, value in factors.items() if name.startswith(start)} == {factor}


def test_a_prefix_starts_as_tokens_of_the_model_itself(tiny):
    """What it sees after the prefix is what it would see after those tokens."""
    plain = load(tiny)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Prefix(PrefixOptions(num_virtual_tokens=6)).apply(load(tiny), "CAUSAL_LM")
        torch.manual_seed(3)
        drawn = torch.randint(plain.config.vocab_size, (1, 6))
    drawn[0, 0] = plain.config.bos_token_id
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        expected = plain(torch.cat([drawn, ids], 1)).logits[:, 6:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_a_decoder_that_classifies_is_not_told_by_its_neighbours(name, train, tmp_path):
    """Rows of one length go together: padding is never what the head reads."""
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in labelled()))
    run = train(
        method=METHODS[name], objective="classify", data={"train": str(path), "held_out": 0.25}, learning_rate=3e-2,
        max_steps=20, batch_size=8, eval={"steps": 20},
    )  # fmt: skip
    run.raise_for_state()
    texts = ["red thing", "a blue thing that is longer", "green"]
    together = run.predict(texts)
    alone = [run.predict([text]) for text in texts]
    for number, one in enumerate(alone):
        assert together.iloc[number].tolist()[-3:] == pytest.approx(one.iloc[0].tolist()[-3:], abs=1e-5)


def test_the_receipt_of_a_prefix_is_of_the_answers_people_get(train, inline):
    run = train(method=METHODS["prefix"], learning_rate=2e-2, max_steps=30)
    tuned = load_tuned(run)
    reader, prompts = TorchReader(tuned.model, tuned), [example.prompt for example in tuned.rows().held_out()[:4]]
    found = [tuned.tokenizer.decode(reader.generate(prompt, 8), skip_special_tokens=True) for prompt in prompts]
    assert found == generate(tuned.model, tuned.tokenizer, prompts, max_new_tokens=8)
    logits = reader.logits(prompts[0])
    assert len(logits) == len(prompts[0])


def test_a_head_of_its_own_is_the_top(tmp_path):
    method = Full(FullOptions(layer_lr_decay=0.5))
    method.apply(load(make_model(tmp_path / "m", tie_word_embeddings=False)), "CAUSAL_LM")
    assert method.learning_rate_factor("lm_head.weight") == 1.0
    assert method.learning_rate_factor("model.embed_tokens.weight") == 0.125
