"""Models made smaller before training, and trained again: what goes, what stays, who sees which model."""

import json

import pytest
import torch
from conftest import make_model, rows
from safetensors.torch import load_file
from test_classify import labelled, make_encoder
from test_training import SHORT, StopAt, assert_same, stop_and_resume
from transformers import AutoModelForCausalLM

from tune_magic.errors import RecipeError, RunFailed, TuneError
from tune_magic.executors import local
from tune_magic.exporters.merged import MergedExporter
from tune_magic.handles import Run
from tune_magic.models import bound
from tune_magic.models.layers import layers_of
from tune_magic.models.load import load_causal_lm, load_tokenizer
from tune_magic.models.quantise import linear_layers
from tune_magic.models.shrink import shrink
from tune_magic.recipe import build_recipe
from tune_magic.recipe.build import load_recipe
from tune_magic.recipe.schema import MethodOptions
from tune_magic.recipe.topics import find
from tune_magic.storage import folder
from tune_magic.training.alike import differences
from tune_magic.training.beside import AsLoaded
from tune_magic.training.prepare import make_engine
from tune_magic.training.tuned import load_tuned
from tune_magic.view.card import card

IDS = torch.arange(5, 45)[None]
FULL = {"method": {"name": "full"}, "learning_rate": 1e-3}
KINDS = {
    "layers": {"drop_layers": 0.25},
    "neurons": {"prune_neurons": 0.25},
    "heads": {"prune_heads": 0.5},
    "all three": {"drop_layers": [1], "prune_neurons": "50%", "prune_heads": 0.5},
    "weights": {"prune_weights": 0.5},
    "weights by Wanda": {"prune_weights": 0.5, "prune_by": "wanda"},
    "two of four": {"prune_weights": "2:4"},
    "int4": {"quantize_aware": "int4"},
    "int8": {"quantize_aware": "int8"},
    "values": {"share_weights": 16},
    "tied": {"tie_layers": 2},
    "zeros and values": {"prune_weights": 0.5, "share_weights": 8},
    "zeros and int4": {"prune_weights": 0.5, "quantize_aware": "int4"},
    "fewer, tied, zeros": {"drop_layers": 2, "tie_layers": 2, "prune_weights": 0.25},
}


@pytest.fixture(scope="session")
def deep(tmp_path_factory):
    """A decoder of four layers."""
    return make_model(tmp_path_factory.mktemp("models") / "deep", num_hidden_layers=4)


def keys(folder, compress, **changes):
    """Return what differs from the usual recipe of tests."""
    return {"model": str(folder), "compress": compress, "max_steps": 6, **FULL, **SHORT, **changes}


@pytest.fixture
def compressed(train, deep):
    """Train a compressed model for a few steps; returns the run."""

    def start(compress, **changes):
        return train(**keys(deep, compress, **changes))

    return start


@pytest.fixture(scope="session")
def trained(deep, tmp_path_factory):
    """Return a run of each kind, trained once for all tests."""
    home, found = tmp_path_factory.mktemp("kinds"), {}
    data = home / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    usual = {"data": {"train": str(data), "held_out": 0.25}, "batch_size": 4, "max_length": 128, "dtype": "float32"}

    def start(kind):
        if kind not in found:
            recipe = build_recipe(usual | keys(deep, KINDS[kind])).given()
            found[kind] = Run(folder.create(home / "tune_runs", "finetune", {"name": "kind", "recipe": recipe}))
            local.start(found[kind].path, "inline")
        return found[kind]

    return start


@pytest.fixture
def inline(monkeypatch):
    """Export and evaluate in this process."""
    start = local.start
    monkeypatch.setattr(local, "start", lambda folder, executor="inline": start(folder, "inline"))


def matrices(model):
    return {path: layer.weight.detach() for path, layer in linear_layers(model)}


def zeros(model):
    return sum(int((matrix == 0).sum()) for matrix in matrices(model).values())


def loss_of(tuned, model=None):
    """Return the held-out loss of a run's rows, by a model."""
    examples = tuned.rows().held_out()
    bare = AsLoaded(MethodOptions(name="none"))
    engine = make_engine(
        tuned.recipe, model or tuned.model, bare if model else tuned.method, tuned.objective, torch.float32
    )
    with torch.no_grad():
        total = sum(float(tuned.objective.score_sum(engine.states([row]))) for row in examples)
    return total / sum(row.weight for row in examples)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


# --- every kind: trained, stopped, gone on with, loaded, exported -----------------------------------------------------


@pytest.mark.sampled(5)
@pytest.mark.parametrize("kind", ["all three", "weights by Wanda", "zeros and int4", "zeros and values", "tied"])
def test_a_stopped_run_ends_as_if_unbroken(compressed, make_run, monkeypatch, deep, kind):
    with monkeypatch.context() as patch:
        looks = StopAt(patch, n=-1)
        whole = compressed(KINDS[kind])
    run = make_run(**keys(deep, KINDS[kind]))
    stop_and_resume(run, monkeypatch, 2 * looks.count // 3)
    assert_same(run, whole)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", KINDS)
def test_it_recovers_and_whoever_loads_it_has_the_same_model(trained, kind):
    run = trained(kind)
    evaluations = {step: event["loss"] for step, event in run.summary().evaluations.items()}
    assert min(evaluations.values()) < evaluations[0]
    tuned = load_tuned(run)
    assert loss_of(tuned) == pytest.approx(float(run.summary().best["loss"]), rel=1e-5)
    assert {type(layer) for _, layer in linear_layers(tuned.model)} == {torch.nn.Linear}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_it_is_read_by_transformers_alone(trained, tmp_path, kind):
    tuned = load_tuned(trained(kind))
    ours, empty = logits(tuned.model), zeros(tuned.model)
    MergedExporter().write(tmp_path, tuned, None)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(plain), ours)
    assert zeros(plain) == empty


@pytest.mark.parametrize("kind", ["all three", "zeros and int4"])
def test_receipts_find_the_same_model(trained, inline, kind):
    parity = trained(kind).export("merged").receipt["parity"]
    assert parity["ok"] is True
    assert parity["logit_difference"] == 0


# --- what each kind leaves ---------------------------------------------------------------------------------------------


def test_layers_that_change_little_go(compressed, deep):
    """Layer 2 of this model gives what it is given: it is the one that goes."""
    model = load_causal_lm(deep, torch.float32)
    idle = layers_of(model)[2]
    with torch.no_grad():
        idle.self_attn.o_proj.weight.zero_()
        idle.mlp.down_proj.weight.zero_()
    path = saved(model, deep, "idle")
    run = compressed({"drop_layers": 1}, model=str(path))
    assert json.loads((run.path / "compression.json").read_text())["kept"] == {"layers": [0, 1, 3]}
    first = run.summary().evaluations[0]["loss"]
    whole = compressed({}, model=str(path))
    assert first == pytest.approx(whole.summary().evaluations[0]["loss"], rel=1e-5)  # nothing was lost


def saved(model, like, name):
    path = like.parent / name
    model.save_pretrained(path)
    load_tokenizer(like).save_pretrained(path)
    return path


def test_neurons_and_heads_that_give_nothing_go(compressed, deep):
    model = load_causal_lm(deep, torch.float32)
    with torch.no_grad():
        for layer in layers_of(model):
            layer.mlp.down_proj.weight[:, 8:24] = 0
            layer.self_attn.v_proj.weight[:8] = 0  # the first key-value head's values
    path = saved(model, deep, "silent")
    run = compressed({"prune_neurons": 0.25, "prune_heads": 0.5}, model=str(path))
    kept = json.loads((run.path / "compression.json").read_text())["kept"]
    assert kept["heads"] == [[1]] * 4
    assert all(neurons == [*range(8), *range(24, 64)] for neurons in kept["neurons"])
    whole = compressed({}, model=str(path))
    assert run.summary().evaluations[0]["loss"] == pytest.approx(whole.summary().evaluations[0]["loss"], rel=1e-5)
    config = load_tuned(run).model.config
    assert (config.intermediate_size, config.num_attention_heads, config.num_key_value_heads) == (48, 2, 1)
    assert config.head_dim == 8


@pytest.mark.sampled(2)
@pytest.mark.parametrize("changes", [
    {"weight_decay": 0.1, "ema_decay": 0.9, "retain": {"l2_sp": 0.1}}, {"optim": "sgd"}, {"optim": "adafactor"},
    {"optim": "lion"}, {"optim": "adamw_8bit"}, {"method": {"name": "freeze", "trainable_layers": 2}},
], ids=str)  # fmt: skip
def test_zeros_stay_zero_whatever_trains(compressed, changes):
    run = compressed({"prune_weights": 0.5}, **changes)
    saved = load_file(run.best_checkpoint / "trainable.safetensors")
    model = load_tuned(run).model
    for path, matrix in matrices(model).items():
        assert float((matrix == 0).float().mean()) == 0.5, path
        if f"{path}.weight" in saved:
            assert int((saved[f"{path}.weight"] == 0).sum()) == matrix.numel() // 2
    assert run.summary().plan["compress"]["after"]["zeros"] == zeros(model)


def test_two_of_four_and_rows_of_wanda(trained):
    for matrix in matrices(load_tuned(trained("two of four")).model).values():
        assert ((matrix.view(-1, 4) == 0).sum(1) == 2).all()
    for matrix in matrices(load_tuned(trained("weights by Wanda")).model).values():
        assert ((matrix == 0).float().mean(1) == 0.5).all()


def test_shared_values_are_few_and_trained(trained):
    run = trained("values")
    start = load_file(run.path / "compression.safetensors")
    for path, matrix in matrices(load_tuned(run).model).items():
        assert len(matrix.unique()) <= 16
        assert not torch.equal(matrix.unique(), start[f"values/{path}"].unique())
    with_zero = load_tuned(trained("zeros and values")).model
    for matrix in matrices(with_zero).values():
        assert len(matrix.unique()) <= 8
        assert float((matrix == 0).float().mean()) == 0.5


def test_tied_layers_are_one(trained):
    run = trained("tied")
    layers = layers_of(load_tuned(run).model)
    for first, second in ((0, 1), (2, 3)):
        pairs = zip(layers[first].parameters(), layers[second].parameters(), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert not torch.equal(layers[0].mlp.up_proj.weight, layers[2].mlp.up_proj.weight)
    after = run.summary().plan["compress"]["after"]
    assert after["distinct"] < after["parameters"]


# --- the arithmetic ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_the_grid_is_that_of_onnx_runtime(tmp_path, bits):
    import numpy as np
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    inputs, outputs = 72, 5  # the last block is not whole
    matrix = np.random.default_rng(0).normal(size=(inputs, outputs)).astype(np.float32)
    shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name, size in
              (("x", inputs), ("y", outputs))]  # fmt: skip
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    graph = helper.make_graph([node], "g", shapes[:1], shapes[1:], [numpy_helper.from_array(matrix, "w")])
    whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    quantizer = MatMulNBitsQuantizer(whole, bits=bits, block_size=bound.BLOCK, is_symmetric=True, accuracy_level=0)
    quantizer.process()
    onnx.save(quantizer.model.model, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    theirs = session.run(None, {"x": np.eye(inputs, dtype=np.float32)})[0]
    ours = bound.on_grid(torch.from_numpy(matrix.T.copy()), bits)
    assert np.abs(ours.numpy().T - theirs).max() < 1e-6
    assert torch.allclose(bound.on_grid(ours, bits), ours, atol=1e-7)  # rounding again changes nothing


def test_gradients_of_bound_layers_are_those_of_the_formula():
    torch.manual_seed(0)
    x, plain = torch.randn(3, 5, 40, requires_grad=True), torch.nn.Linear(40, 6)
    rounded = bound.round_in_training(plain, 4)
    rounded(x).square().sum().backward()
    ours = [x.grad.clone(), plain.weight.grad.clone(), plain.bias.grad.clone()]
    x.grad = plain.weight.grad = plain.bias.grad = None
    passed = plain.weight + (bound.on_grid(plain.weight, 4) - plain.weight).detach()
    torch.nn.functional.linear(x, passed, plain.bias).square().sum().backward()
    for found, wanted in zip(ours, [x.grad, plain.weight.grad, plain.bias.grad], strict=True):
        assert torch.allclose(found, wanted, atol=1e-4)

    values, places = bound.k_means(plain.weight.detach(), 5)
    shared = bound.SharedValues(values, places.to(torch.uint8), None, has_zero=False)
    shared(x).square().sum().backward()
    values = values.clone().requires_grad_()
    torch.nn.functional.linear(x, values[places]).square().sum().backward()
    assert torch.allclose(shared.codebook.grad, values.grad, rtol=1e-4)


def test_k_means_is_lloyds():
    torch.manual_seed(0)
    numbers = torch.cat([torch.randn(50) * 0.1 + centre for centre in (-3.0, 0.0, 2.0)])
    means, places = bound.k_means(numbers, 3)
    assert torch.equal(places, torch.repeat_interleave(torch.arange(3), 50))
    assert torch.allclose(means, numbers.view(3, 50).mean(1))


def test_rounding_costs_less_after_training_for_it(slow, compressed, tmp_path):
    """A model whose matrices matter, trained as it is and for four bits, and both rounded."""
    sharp = make_model(tmp_path / "sharp", num_hidden_layers=4, initializer_range=0.4)
    ways = {"model": str(sharp), "learning_rate": 3e-3, "max_steps": 60, "eval": {"steps": 60, "samples": 0}}
    plain, aware = (load_tuned(compressed(compress, **ways)) for compress in ({}, {"quantize_aware": "int4"}))
    unrounded = loss_of(plain)
    for tuned in (plain, aware):
        with torch.no_grad():
            for _, layer in linear_layers(tuned.model):
                layer.weight.copy_(bound.on_grid(layer.weight, 4))
    assert unrounded < loss_of(aware) < 0.5 * loss_of(plain)


def test_a_graph_in_8_bits_has_the_weights_that_were_trained(slow, compressed, tmp_path, inline):
    """Fewer layers, neurons and heads, and rounded: what ONNX Runtime's tools make of the weights changes none."""
    import onnx
    from onnx import numpy_helper

    wide = make_model(tmp_path / "wide", hidden_size=64, intermediate_size=128, num_hidden_layers=3)
    smaller = {"drop_layers": 1, "prune_neurons": 0.25, "prune_heads": 0.5, "quantize_aware": "int8"}
    run = compressed(smaller, model=str(wide))
    exported = run.export("onnx", quantize="int8")
    assert exported.receipt["parity"]["ok"] is True
    graph = onnx.load(exported.path / "model.onnx").graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    rows = []
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            packed, scales = tensors[node.input[1]], tensors[node.input[2]]
            blocks = (packed.astype("float32") - 128) * scales.reshape(*packed.shape[:2], 1)
            rows += list(torch.from_numpy(blocks.reshape(len(packed), -1)))
    for path, matrix in matrices(load_tuned(run).model).items():
        theirs = torch.stack([row for row in rows if len(row) == matrix.shape[1]])
        assert (
            float(torch.cdist(matrix, theirs, compute_mode="donot_use_mm_for_euclid_dist").min(1).values.max()) < 1e-5
        ), path


# --- who sees which model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_evaluation_compares_with_the_whole_base(compressed, inline, method, deep):
    run = compressed({"drop_layers": 2, "prune_neurons": 0.25}, method={"name": method})
    tuned = load_tuned(run)
    whole = loss_of(tuned, load_causal_lm(deep, torch.float32))
    assert run.evaluate(metrics="loss").base["loss"] == pytest.approx(whole, rel=1e-4)
    first = run.summary().evaluations[0]["loss"]
    assert first != pytest.approx(whole, rel=1e-4)
    if method == "lora":
        with tuned.method.without(tuned.model):
            assert first == pytest.approx(loss_of(tuned), rel=1e-4)


def test_kept_near_the_base_means_the_whole_base(compressed):
    run = compressed({"drop_layers": 1}, method={"name": "lora", "r": 4}, retain={"kl_base": 1.0})
    assert run.summary().steps[1]["kl_base"] > 1e-6  # of the compressed model itself it would be nothing


def test_a_smaller_base_may_be_quantised(compressed):
    run = compressed({"drop_layers": 1, "prune_neurons": 0.5}, method={"name": "lora", "r": 4}, quantization="nf4")
    tuned = load_tuned(run).unquantised()
    assert len(layers_of(tuned.method.inner(tuned.model))) == 3


def test_sizes_are_counted_without_weights(deep, trained):
    from transformers import AutoConfig

    from tune_magic.training.sizes import size

    recipe = build_recipe({"data": "rows.jsonl", **keys(deep, KINDS["all three"])})
    counted = size(recipe, AutoConfig.from_pretrained(deep))
    assert counted["parameters"] == trained("all three").summary().plan["parameters"]


def test_cards_say_what_went_and_what_it_saves(trained):
    text = card(trained("fewer, tied, zeros"))["text/plain"]
    assert "layers 4 → 2" in text
    assert "zero for good" in text
    assert "files hold every weight" in text
    assert "compressed 5" in text


def test_what_was_chosen_is_checked(compressed):
    run = compressed({"prune_weights": 0.5})
    path = run.path / "compression.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0\0")
    with pytest.raises(TuneError, match="What was compressed in this run cannot be read"):
        load_tuned(run)
    path.unlink()
    with pytest.raises(TuneError, match="--fresh"):
        load_tuned(run)


# --- families ----------------------------------------------------------------------------------------------------------

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "smollm3", "phi", "phi3", "stablelm", "olmo2", "gpt_neox", "gpt2"]
REFUSED = {  # what of it a configuration cannot say
    ("phi3", "prune_neurons"), ("phi3", "prune_heads"), ("olmo2", "prune_heads"), ("gpt_neox", "prune_heads"),
    ("gpt2", "prune_heads"), ("stablelm", "prune_heads"),
}  # fmt: skip


@pytest.mark.sampled(3)
@pytest.mark.parametrize("key", ["drop_layers", "prune_neurons", "prune_heads"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_say_their_new_shapes(tmp_path, family, key):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128} if family == "gpt2" else {}
    model = load_causal_lm(make_model(tmp_path / "whole", family, **sizes), torch.float32)
    groups = getattr(model.config, "num_key_value_heads", None) or 4
    neurons = 128 if family == "gpt2" else 64
    kept = {
        "drop_layers": {"layers": [1]},
        "prune_neurons": {"neurons": [list(range(0, neurons, 2))] * 2},
        "prune_heads": {"heads": [list(range(0, groups, 2))] * 2},
    }[key]
    if (family, key) in REFUSED:
        with pytest.raises(TuneError, match=r"`prune_|cannot say"):
            shrink(model, kept)
        return
    shrink(model, kept)
    model.save_pretrained(tmp_path / "smaller")
    again = load_causal_lm(tmp_path / "smaller", torch.float32)
    assert torch.allclose(logits(again), logits(model), atol=1e-6)
    with torch.no_grad():  # the cache counts layers anew
        cached = model(input_ids=IDS[:, :8], use_cache=True).past_key_values
        step = model(input_ids=IDS[:, 8:9], past_key_values=cached).logits[0, -1]
    assert torch.allclose(step, logits(model)[0, 8], atol=1e-4)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("compress", [
    {"drop_layers": 1, "prune_neurons": 0.5}, {"prune_weights": 0.5}, {"share_weights": 16}, {"quantize_aware": "int8"},
], ids=str)  # fmt: skip
def test_encoders(train, tmp_path, compress):
    encoder = make_encoder(tmp_path / "encoder")
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps(row) + "\n" for row in labelled(60)))
    data = {"train": str(labels), "held_out": 0.25}
    run = train(model=str(encoder), data=data, compress=compress, max_length=64, max_steps=6, **FULL)
    assert run.status == "finished", run.summary().outcome
    tuned = load_tuned(run)
    assert loss_of(tuned) == pytest.approx(float(run.summary().best["loss"]), rel=1e-5)
    MergedExporter().write(tmp_path / "merged", tuned, None)
    assert loss_of(tuned, tuned.objective.load(tmp_path / "merged", torch.float32)) == pytest.approx(loss_of(tuned))


def test_heads_of_an_encoder_are_refused(train, tmp_path):
    encoder = make_encoder(tmp_path / "encoder")
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps(row) + "\n" for row in labelled(60)))
    with pytest.raises(RunFailed, match="does not know the attention"):
        train(
            model=str(encoder), data=str(labels), compress={"prune_heads": 0.5}, max_length=64, **FULL
        ).raise_for_state()


# --- what is refused ---------------------------------------------------------------------------------------------------

WRONG = [
    ("compress: {drop_layers: 1.5}", "as a share must be at least 0 and below 1, got 1.5"),
    ("compress: {drop_layers: [1, 1]}", "must be different numbers of layers"),
    ("compress: {prune_weights: 3:4}", "must be a share such as 0.5, or 2:4"),
    ("compress: {prune_neurons: 1}", "must be less than 1"),
    ("compress: {share_weights: 1}", "must be at least 2"),
    ("compress: {quantize_aware: int3}", "must be 'none', 'int8' or 'int4'"),
    ("compress: {share_weights: 8, quantize_aware: int4}\nmethod: full", "both decide which values"),
    ("compress: {prune_by: wanda}", "`prune_by` is used by `prune_weights` alone"),
    ("compress: {prune_weights: 0.5}", "`method: lora` trains others beside them"),
    ("compress: {tie_layers: 2}\nquantization: nf4", "`method: lora` trains others beside them"),
    ("compress: small", "must be a mapping such as {drop_layers: 0.2}"),
    ("drop_layers: 2", "belongs under `compress:`"),
]


@pytest.mark.parametrize("text, problem", WRONG, ids=[text for text, _ in WRONG])
def test_recipes_that_cannot_be(text, problem):
    with pytest.raises(RecipeError) as caught:
        load_recipe(f"model: tiny\ndata: rows.jsonl\n{text}")
    assert problem in str(caught.value)


@pytest.mark.parametrize("compress, problem", [
    ({"drop_layers": 4}, "leaves none of the model's 4 layers"),
    ({"drop_layers": [4]}, "names layer 4, and the model has layers 0 to 3"),
    ({"drop_layers": 0.1}, "less than half a layer"),
    ({"prune_neurons": 0.01}, "leaves all 64 neurons"),
    ({"prune_heads": 0.1}, "leaves all 2 key-value heads"),
], ids=str)  # fmt: skip
def test_too_much_and_too_little(compressed, compress, problem):
    with pytest.raises(RunFailed, match=problem):
        compressed(compress).raise_for_state()


def test_adapters_on_a_smaller_base_are_not_written_alone(compressed, inline):
    run = compressed({"drop_layers": 1}, method={"name": "lora", "r": 4})
    with pytest.raises(RunFailed, match="--to merged"):
        run.export("adapter")
    other = compressed({}, method={"name": "lora", "r": 4})
    assert "which no other run has" in "".join(differences({"smaller": run, "whole": other}))


def test_it_explains_itself():
    assert "ShortGPT" in find("drop_layers").summary
    assert find("compress.share_weights").line == ""
    recipe = build_recipe({"model": "m", "data": "d", "compress": {"drop_layers": 2, "prune_neurons": "25%"}})
    assert recipe.short()["compress"] == {"drop_layers": 2, "prune_neurons": 0.25}
    assert isinstance(recipe.compress.drop_layers, int)
