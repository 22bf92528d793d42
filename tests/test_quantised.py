"""Bases in 4 and 8 bits by bitsandbytes, LoftQ, and optimizers with 8-bit states."""

import json

import pytest
import torch
from conftest import make_model
from test_classify import labelled, make_encoder
from test_training import SHORT, assert_same, stop_and_resume

from tune_magic.errors import RecipeError, RunFailed
from tune_magic.executors import local
from tune_magic.methods.lora import Lora, LoraOptions
from tune_magic.models.load import load_causal_lm
from tune_magic.models.quantise import (
    dequantise,
    footprint,
    num_parameters,
    quantise,
    rounded_layers,
    workspace_bytes,
)
from tune_magic.recipe import build_recipe
from tune_magic.recipe.build import load_recipe
from tune_magic.recipe.schema import QuantizationOptions
from tune_magic.training.lion import Lion
from tune_magic.training.optimizer import (
    load_state_tensors,
    make_optimizer,
    set_learning_rate,
    state_sizes,
    state_tensors,
)
from tune_magic.training.tuned import load_tuned
from tune_magic.view.export import usage
from tune_magic.view.plan import plan_facts

CPU = torch.device("cpu")
FLOAT = {"dtype": "float32"}  # auto is bfloat16 on some processors
KINDS = {
    "nf4": {"kind": "nf4"},
    "nf4, plain scales": {"kind": "nf4", "double_quant": False},
    "fp4": {"kind": "fp4"},
    "int8": {"kind": "int8"},
}
IDS = torch.arange(5, 45)[None]


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    """A decoder whose matrices are whole blocks, and whose adapters have more than 4096 numbers."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    return make_model(folder, hidden_size=64, intermediate_size=1280)


@pytest.fixture
def inline(monkeypatch):
    """Export and evaluate in this process."""
    start = local.start
    monkeypatch.setattr(local, "start", lambda folder, executor="inline": start(folder, "inline"))


def quantised(folder, **options):
    return quantise(load_causal_lm(folder, torch.float32), QuantizationOptions(**options), torch.float32, CPU).eval()


def by_transformers(folder, kind, double_quant=True):
    """The same by Transformers' own loader, in training mode, in which bitsandbytes rounds no activations on a CPU."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if kind == "int8"
        else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=torch.float32,
        )
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", quantization_config=config
    ).train()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("name", KINDS)
def test_the_weights_and_the_logits_are_those_of_transformers_and_bitsandbytes(name, wide):
    import bitsandbytes.functional as bnb

    ours, theirs, plain = (
        quantised(wide, **KINDS[name]),
        by_transformers(wide, **KINDS[name]),
        load_causal_lm(wide, torch.float32),
    )
    layers = dict(rounded_layers(ours))
    assert set(layers) == {path for path, m in theirs.named_modules() if "bitsandbytes" in type(m).__module__}
    for path, layer in layers.items():
        assert torch.equal(layer.weight.data, theirs.get_submodule(path).weight.data)
        matrix = plain.get_submodule(path).weight.detach()
        if name == "int8":
            packed, scales, _ = bnb.int8_vectorwise_quant(matrix.half())
            expected = bnb.int8_vectorwise_dequant(packed, scales)
        else:
            double = KINDS[name].get("double_quant", True)
            packed, state = bnb.quantize_4bit(matrix, quant_type=KINDS[name]["kind"], compress_statistics=double)
            expected = bnb.dequantize_4bit(packed, state)
        torch.testing.assert_close(layer.dense(torch.float32), expected, rtol=1e-6, atol=1e-8)
        assert 0 < (expected - matrix).abs().max() < 0.5 * matrix.abs().max()
    assert torch.equal(logits(ours), logits(theirs))
    assert torch.equal(logits(dequantise(ours)), logits(theirs))
    assert rounded_layers(ours) == []


def test_gpt2s_matrices_lie_on_their_side(tmp_path):
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    folder = make_model(tmp_path / "gpt2", "gpt2", n_embd=64, n_head=4, n_layer=2, **quiet)
    for kind in ("nf4", "int8"):
        assert torch.equal(logits(quantised(folder, kind=kind)), logits(by_transformers(folder, kind)))
        assert len(rounded_layers(quantised(folder, kind=kind))) == 8


@pytest.mark.parametrize("name", KINDS)
def test_a_rows_result_does_not_depend_on_its_company_nor_on_the_mode(name, wide):
    model = quantised(wide, **KINDS[name])
    both = torch.cat([IDS, IDS.flip(1)])
    torch.testing.assert_close(logits(model, both)[:1], logits(model), rtol=1e-5, atol=1e-6)
    evaluated = logits(model)
    assert torch.equal(logits(model.train()), evaluated)


@pytest.mark.parametrize("name", KINDS)
def test_lora_over_a_rounded_layer_is_lora_over_the_same_numbers(name, wide):
    """Gradients too: against PEFT over plain layers that hold the rounded matrices."""
    found = []
    for unpacked in (False, True):
        base = quantised(wide, **KINDS[name])
        base = dequantise(base) if unpacked else base
        torch.manual_seed(3)
        model = Lora(LoraOptions(r=4)).apply(base, "CAUSAL_LM")
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.02)
        model.train()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_what_the_weights_take(wide):
    plain = load_causal_lm(wide, torch.float32)
    count = num_parameters(plain)
    sizes = {}
    for name, options in KINDS.items():
        model = quantised(wide, **options).requires_grad_(False)
        found = footprint(model)
        assert num_parameters(model) == count
        assert found["float32_bytes"] == 4 * count
        inside = sum(layer.in_features * layer.out_features for _, layer in rounded_layers(model))
        sizes[name] = (found["bytes"] - 4 * (count - inside)) * 8 / inside  # bits a weight
        assert workspace_bytes(model, torch.float32) == 4 * 64 * 1280
    assert sizes["nf4, plain scales"] == pytest.approx(4.5, abs=0.01)
    assert sizes["nf4"] == sizes["fp4"] == pytest.approx(4.127, abs=0.05)
    assert sizes["int8"] == pytest.approx(8.3, abs=0.4)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.sampled(4)
def test_a_run_learns_resumes_to_the_bit_and_keeps_its_base(name, train, make_run, monkeypatch, wide):
    options = {"model": str(wide), "quantization": KINDS[name], **FLOAT, **SHORT}
    whole = train(**options)
    whole.raise_for_state()
    evaluations, plan = whole.summary().evaluations, whole.summary().plan
    assert evaluations[12]["loss"] < evaluations[0]["loss"] - 0.3
    assert (plan["packed"], plan["shares_prefixes"], plan["engine_note"]) == (True, True, None)
    assert plan["quantization"]["bytes"] < 0.6 * plan["quantization"]["float32_bytes"]
    run = make_run(**options)
    stop_and_resume(run, monkeypatch, 14)
    assert_same(run, whole)
    tuned = load_tuned(whole)
    with tuned.without_tuning() as base:
        assert torch.equal(logits(base.model), logits(by_transformers(wide, **KINDS[name])))


def test_the_base_is_scored_as_transformers_would_score_it(train, wide):
    """The mean over the answers' tokens, by Transformers' own loss, row by row."""
    run = train(model=str(wide), quantization="nf4", max_steps=1, eval={"steps": 1, "samples": 0}, **FLOAT)
    examples, model = load_tuned(run).rows().held_out()[:], by_transformers(wide, "nf4")
    total = weight = 0.0
    for example in examples:
        ids = torch.from_numpy(example.trunk.tokens.astype("int64"))[None]
        labels = ids.masked_fill(torch.from_numpy(example.trunk.weights)[None] == 0, -100)
        count = int((labels != -100).sum())
        with torch.no_grad():
            total += count * float(model(input_ids=ids, labels=labels).loss)
        weight += count
    assert run.summary().evaluations[0]["loss"] == pytest.approx(total / weight, rel=1e-5)


def test_without_quantisation_nothing_is_another(recipe):
    built = build_recipe(recipe)
    assert built.normalised()["quantization"] == {"kind": "none", "double_quant": None}
    assert "quantization" not in built.given()
    assert build_recipe(recipe | {"quantization": "none"}).normalised() == built.normalised()


METHODS = {
    "dora": {"name": "lora", "r": 4, "use_dora": True},
    "lora with dropout": {"name": "lora", "r": 4, "lora_dropout": 0.1},
    "ia3": {"name": "ia3"},
    "vera": {"name": "vera", "r": 16},
    "oft": {"name": "oft", "oft_block_size": 8},
    "ln_tuning": {"name": "ln_tuning"},
    "bottleneck": {"name": "bottleneck", "bottleneck_size": 8},
    "prompt": {"name": "prompt", "num_virtual_tokens": 6},
    "p_tuning": {"name": "p_tuning", "num_virtual_tokens": 6},
    "prefix": {"name": "prefix", "num_virtual_tokens": 6},
}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.sampled(5)
def test_methods_that_leave_the_base_alone_learn_on_it(name, kind, train, wide):
    run = train(model=str(wide), quantization=kind, method=METHODS[name], learning_rate=2e-2, **FLOAT, **SHORT)
    run.raise_for_state()
    evaluations = run.summary().evaluations
    assert min(evaluations[step]["loss"] for step in evaluations if step) < evaluations[0]["loss"]
    with load_tuned(run).without_tuning() as base:
        torch.testing.assert_close(logits(base.model), logits(by_transformers(wide, kind)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("full", "it changes the base itself, and rounded weights cannot take small steps"),
        ({"name": "freeze", "trainable_layers": 1}, "it changes the base itself"),
        ({"name": "lora", "init_lora_weights": "pissa"}, "`init_lora_weights: pissa` takes its start out of"),
        ({"name": "lora", "init_lora_weights": "olora"}, "`init_lora_weights: olora` takes its start out of"),
    ],
)
def test_methods_that_change_the_base_are_refused(method, why, recipe):
    with pytest.raises(RecipeError, match="does not go with `method:") as caught:
        build_recipe(recipe | {"quantization": "nf4", "method": method})
    assert why in str(caught.value)
    assert "quantization" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("quantization: nf4", ("nf4", True)),
        ("quantization: {kind: fp4, double_quant: false}", ("fp4", False)),
        ("quantization: int8", ("int8", False)),
        ("load_in_4bit: true", ("nf4", True)),
        ("load_in_8bit: true", ("int8", False)),
        ("load_in_8bit: false", ("none", False)),
        ("load_in_4bit: true\nbnb_4bit_quant_type: fp4\nbnb_4bit_use_double_quant: false", ("fp4", False)),
    ],
)
def test_what_people_write(text, expected):
    found = load_recipe(f"model: m\ndata: rows.jsonl\n{text}").quantization
    assert (found.kind, found.quantizes_scales) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("quantization: {kind: int8, double_quant: true}", "`double_quant` is for nf4 and fp4"),
        ("quantization: {double_quant: true}", "`kind` is none"),
        ("quantization: nf3", "Did you mean `nf4`"),
        ("load_in_4bit: 4", "must be true or false, got 4"),
        ("load_in_4bit: true\nload_in_8bit: true", "says the same as `load_in_4bit`"),
        ("quantization: nf4\nload_in_8bit: true", "says the same as `quantization.kind`"),
        ("quantization: nf4\nmethod: full", "does not go with `method: full`"),
        ("quantization: 4", "nf4, fp4, int8, none or a mapping"),
        ("method: {name: lora, init_lora_weights: loftq}", "so it needs `quantization: nf4` or `fp4`"),
        ("quantization: int8\nmethod: {name: lora, init_lora_weights: loftq}", "needs `quantization: nf4`"),
    ],
)
def test_what_cannot_be_is_said(text, said):
    with pytest.raises(RecipeError) as caught:
        load_recipe(f"model: m\ndata: rows.jsonl\n{text}")
    assert said in str(caught.value)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("to", ["merged", "adapter"])
@pytest.mark.sampled(4)
def test_an_export_is_the_tuning_on_a_base_of_full_precision(kind, to, train, inline, wide):
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    run = train(model=str(wide), quantization=kind, **FLOAT)
    exported = run.export(to, rows=4)
    found = exported.receipt["parity"]
    assert exported.ok is True
    assert found["logit_difference"] <= 1e-3 * found["largest_logit"]
    apart = found["on_quantized"]
    assert 1e-4 < apart["logit_difference"] < 0.3 * apart["largest_logit"]
    assert apart["logit_difference"] > 20 * found["logit_difference"]
    text = exported.card()["text/plain"]
    assert f"the tuning on the base in full precision; it was trained on {kind} weights, within tolerance" in text
    assert "than on quantised weights: " in text
    assert "quantization_config" not in usage(exported.receipt, "p")
    # apart from this package: PEFT over a plain base, the numbers as the run holds them
    expected = Lora(LoraOptions(r=4)).apply(load_causal_lm(wide, torch.float32), "CAUSAL_LM")
    trained = {name: p for name, p in load_tuned(run).model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(trained[name])
    reference = logits(expected.merge_and_unload().eval())
    loaded = AutoModelForCausalLM.from_pretrained(exported.path if to == "merged" else wide, dtype=torch.float32)
    if to == "adapter":
        loaded = PeftModel.from_pretrained(loaded, exported.path)
        assert len(get_peft_model_state_dict(loaded)) == 2 * 7 * 2
        assert json.loads((exported.path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(wide)
    torch.testing.assert_close(logits(loaded.eval()), reference, rtol=1e-4, atol=1e-5)
    assert (reference - logits(load_tuned(run).model)).abs().max() > 1e-4


def test_an_onnx_export_of_a_quantised_run(slow, train, inline, wide):
    exported = train(model=str(wide), quantization="nf4", max_steps=4, **FLOAT).export("onnx", rows=2)
    assert exported.ok is True
    assert exported.receipt["parity"]["on_quantized"]["logit_difference"] > 1e-4


def test_what_cannot_be_merged_says_so_as_ever(train, inline, wide):
    run = train(model=str(wide), quantization="nf4", method="prompt", max_steps=2, **FLOAT)
    with pytest.raises(RunFailed, match="cannot be folded into the model"):
        run.export("merged", rows=2)
    assert run.export("adapter", rows=2).ok is True


def test_evaluate_and_generate_use_the_model_as_it_was_trained(train, inline, wide):
    run = train(model=str(wide), quantization="nf4", **FLOAT)
    report = run.evaluate(limit=3, max_new_tokens=4)
    assert report.comparisons["loss"].tuned < report.comparisons["loss"].base
    assert isinstance(run.generate("item 1 is red", max_new_tokens=3)[0], str)
    assert rounded_layers(run.load()[0])


@pytest.mark.parametrize("method", ["lora", "freeze"])
@pytest.mark.sampled(2)
def test_a_classifier_learns_on_a_quantised_base(method, train, inline, tmp_path):
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in labelled()))
    run = train(
        model=str(make_encoder(tmp_path / "bert")), data={"train": str(path), "held_out": 0.25}, quantization="nf4",
        method={"name": "lora", "r": 4} if method == "lora" else method, learning_rate=2e-2, max_steps=40, batch_size=8,
        eval={"steps": 20}, **FLOAT,
    )  # fmt: skip
    run.raise_for_state()
    evaluations = run.summary().evaluations
    assert evaluations[40]["loss"] < evaluations[0]["loss"] - 0.1
    assert run.summary().plan["kept_layers"] == (2 if method == "freeze" else 0)
    assert run.export("merged").ok is True
    assert run.evaluate(limit=8).comparisons["loss"].tuned < run.evaluate(limit=8).comparisons["loss"].base


def test_new_words_are_trained_beside_a_quantised_base(train, inline, wide):
    run = train(model=str(wide), quantization="nf4", vocabulary={"tokens": ["colour", "green"]}, **FLOAT)
    run.raise_for_state()
    assert run.summary().evaluations[12]["loss"] < run.summary().evaluations[0]["loss"]
    assert run.export("merged", rows=3).ok is True


def test_activations_computed_twice_give_the_same(train, wide):
    options = {"model": str(wide), "max_steps": 4, **FLOAT, **SHORT}
    for kind in ("nf4", "int8"):
        once = train(quantization=kind, **options).summary().steps
        twice = train(quantization=kind, gradient_checkpointing=True, **options).summary().steps
        assert [s["loss"] for s in twice.values()] == pytest.approx([s["loss"] for s in once.values()], rel=1e-5)


def test_the_precision_of_the_rest_is_the_runs(train, wide):
    """In bfloat16 the matrices are still rounded from float32: the same base whoever loads it."""
    run = train(model=str(wide), quantization="nf4", dtype="bfloat16")
    run.raise_for_state()
    assert run.summary().evaluations[12]["loss"] < run.summary().evaluations[0]["loss"]
    reference = quantised(wide, kind="nf4")
    model = quantise(load_causal_lm(wide, torch.float32), QuantizationOptions(kind="nf4"), torch.bfloat16, CPU)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    for (_, ours), (_, theirs) in zip(rounded_layers(model), rounded_layers(reference), strict=True):
        assert torch.equal(ours.weight.data, theirs.weight.data)
        assert ours.dense(torch.bfloat16).dtype == torch.bfloat16


def test_the_plan_says_what_the_base_takes(make_run, wide):
    run = make_run("plan", model=str(wide), quantization="nf4", **FLOAT)
    local.start(run.path, "inline")
    plan, result = run.summary().plan, run.summary().result
    facts = dict(plan_facts(plan, result))
    assert facts["frozen base"].startswith("nf4, scales in 8 bits: ")
    assert "on a CPU" in facts
    assert "frozen base" not in dict(plan_facts({**plan, "quantization": None}, result))
    assert plan["memory"]["peak_bytes"] > 0


# LoftQ


@pytest.mark.parametrize("alpha", [4, 32])
def test_loftq_starts_nearer_to_the_model_than_rounding_alone(alpha, wide):
    options = QuantizationOptions(kind="nf4")
    plain = load_causal_lm(wide, torch.float32).eval()
    method = Lora(LoraOptions(r=16, lora_alpha=alpha, init_lora_weights="loftq"))
    base = quantise(load_causal_lm(wide, torch.float32), options, torch.float32, CPU, keep_originals=True)
    model = method.apply(base, "CAUSAL_LM").eval()
    with method.without(model):
        rounded = logits(model)
    assert torch.equal(rounded, logits(quantised(wide, kind="nf4")))
    assert (logits(model) - logits(plain)).norm() < 0.8 * (rounded - logits(plain)).norm()
    for path, layer in rounded_layers(model):
        assert layer.original is None
        lora = model.get_submodule(path.removesuffix(".base_layer"))
        matrix = plain.get_submodule(path.removeprefix("base_model.model.").removesuffix(".base_layer")).weight.detach()
        lost = matrix - layer.dense(torch.float32)
        u, s, v = torch.linalg.svd(lost, full_matrices=False)
        best = u[:, :16] @ torch.diag(s[:16]) @ v[:16]  # Eckart and Young
        torch.testing.assert_close(lora.get_delta_weight("default").detach(), best, rtol=1e-3, atol=1e-5)


def test_a_run_by_loftq_and_what_is_written_of_it(slow, train, make_run, monkeypatch, inline, wide):
    method = {"name": "lora", "r": 8, "init_lora_weights": "loftq"}
    options = {"model": str(wide), "quantization": "nf4", "method": method, **FLOAT, **SHORT}
    whole = train(**options)
    assert whole.summary().evaluations[12]["loss"] < whole.summary().evaluations[0]["loss"]
    run = make_run(**options)
    stop_and_resume(run, monkeypatch, 14)
    assert_same(run, whole)
    for to in ("merged", "adapter"):
        exported = whole.export(to, rows=3)
        assert exported.ok is True
        apart = exported.receipt["parity"]["on_quantized"]
        assert apart["logit_difference"] < 1e-4 * apart["largest_logit"]  # it holds the same rounded matrices
        assert "its nf4 weights unpacked" in exported.card()["text/plain"]
    assert "bnb_4bit_quant_type='nf4'" in usage(exported.receipt, "p")


# Optimizers


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(96, 96), torch.nn.Linear(96, 8))


def gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 0.1


def recipe_with(**changes):
    return build_recipe({"model": "m", "data": "rows.jsonl", "weight_decay": 0.1, **changes})


def theirs(name, model):
    from bitsandbytes import optim

    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    if "lion" in name:
        return (optim.Lion8bit if "8bit" in name else optim.Lion32bit)(groups, lr=1e-3, betas=(0.9, 0.99))
    return optim.AdamW8bit(groups, lr=1e-3, betas=(0.9, 0.99), eps=1e-8)


NEW = ("lion", "lion_8bit", "adamw_8bit", "paged_adamw_8bit")


@pytest.mark.parametrize("name", NEW)
def test_an_optimizer_is_bitsandbytes_own(name):
    ours, other = small_model(), small_model()
    recipe = recipe_with(optim=name, learning_rate=1e-3, adam_beta2=0.99)
    optimizer, reference = make_optimizer(ours, recipe, Lora(LoraOptions())), theirs(name, other)
    for step in range(6):
        gradients(ours, step)
        gradients(other, step)
        set_learning_rate(optimizer, 1e-3)
        optimizer.step()
        reference.step()
    for mine, their in zip(ours.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-7)
    assert not torch.equal(ours[0].weight, small_model()[0].weight)


def test_lion_is_the_papers_formula():
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = Lion([parameter], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    value, momentum = parameter.detach().clone(), torch.zeros(3)
    for gradient in (torch.tensor([1.0, -1.0, 0.0]), torch.tensor([-0.05, 3.0, 2.0]), torch.tensor([-9.0, 0.1, -0.1])):
        parameter.grad = gradient.clone()
        optimizer.step()
        value = value - 0.1 * (torch.sign(0.9 * momentum + 0.1 * gradient) + 0.5 * value)
        momentum = 0.99 * momentum + 0.01 * gradient
        torch.testing.assert_close(parameter.detach(), value)


@pytest.mark.parametrize("name", ["adamw", "sgd", *NEW])
def test_states_are_as_large_as_forecast_and_come_back_to_the_bit(name):
    model, recipe = small_model(), recipe_with(optim=name, learning_rate=1e-3)
    optimizer = make_optimizer(model, recipe, Lora(LoraOptions()))
    gradients(model, 0)
    optimizer.step()
    names = {id(p): path for path, p in model.named_parameters()}
    held = state_tensors(optimizer, names)
    counted = {path: tensor for path, tensor in held.items() if not path.startswith("step/")}
    assert sum(tensor.nbytes for tensor in counted.values()) == sum(state_sizes(recipe, model))
    if name.endswith("_8bit"):
        assert held["state1/0.weight"].dtype == torch.uint8
        assert held["state1/1.weight"].dtype == torch.float32  # too small for 8 bits
    again = small_model()
    again.load_state_dict(model.state_dict())
    resumed = make_optimizer(again, recipe, Lora(LoraOptions()))
    load_state_tensors(resumed, again, {path: tensor.clone() for path, tensor in held.items()})
    for step in (1, 2):
        for one, by in ((model, optimizer), (again, resumed)):
            gradients(one, step)
            by.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name", NEW)
@pytest.mark.sampled(4)
def test_a_run_learns_by_it_and_resumes_to_the_bit(name, train, make_run, monkeypatch, wide):
    rate = 1e-3 if "lion" in name else 1e-2
    options = {"model": str(wide), "optim": name, "learning_rate": rate, **FLOAT, **SHORT}
    whole = train(**options)
    whole.raise_for_state()
    evaluations = whole.summary().evaluations
    assert evaluations[12]["loss"] < evaluations[0]["loss"] - 0.05
    run = make_run(**options)
    stop_and_resume(run, monkeypatch, 14)
    assert_same(run, whole)
    if name != "lion":
        from safetensors.torch import load_file

        saved = load_file(whole.checkpoints[max(whole.checkpoints)] / "optimizer.safetensors")
        assert any(tensor.dtype == torch.uint8 for tensor in saved.values())
