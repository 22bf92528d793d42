"""Continual learning: penalties are their formulas, a stop changes nothing, and the earlier task is forgotten less."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from test_classify import labelled, make_encoder
from test_engine import CASES, engine_of, example, load
from test_training import assert_same, losses, stop_and_resume
from torch.nn import functional

from tune_magic.errors import RecipeError, RunFailed
from tune_magic.executors import local
from tune_magic.methods.full import Full, FullOptions
from tune_magic.methods.lora import Lora, LoraOptions
from tune_magic.methods.unfreeze import Unfreeze, UnfreezeOptions
from tune_magic.objectives.sft import SFT
from tune_magic.recipe import build_recipe
from tune_magic.recipe.schema import RetainOptions
from tune_magic.training.beside import AddedOff, Loaded
from tune_magic.training.fisher import draw, fisher
from tune_magic.training.loop import Loop
from tune_magic.training.retention import Retention

CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Norway": "Oslo", "Cuba": "Havana", "Peru": "Lima"}


def file_of(write, name, pairs):
    return str(write(name, "".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs)))


@pytest.fixture
def old_rows(write):
    return file_of(write, "old.jsonl", [(f"Capital of {c}?", city) for c, city in CAPITALS.items()] * 3)


@pytest.fixture
def new_rows(write):
    return file_of(write, "new.jsonl", [(f"Add {i} and {i + 1}.", str(2 * i + 1)) for i in range(24)])


def moved(engine, std=0.05):
    """Put trained weights somewhere else than where they started."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in engine.model.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn_like(parameter))


def gradients_of(engine):
    return {name: p.grad for name, p in engine.model.named_parameters() if p.requires_grad}


# --- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Full(FullOptions()), Lora(LoraOptions(r=2))])
def test_fisher_is_the_mean_of_squared_gradients_row_by_row(method, tiny):
    engine = engine_of(load(tiny), method)
    examples = [*CASES["shared prefix"], example(9)]
    found = fisher(engine, SFT(), examples, lambda: None)
    trained = {name: p for name, p in engine.model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in trained.items()}
    plain = load(tiny).eval() if isinstance(method, Full) else engine.model.eval()
    named = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    for one in examples:
        ids, weights = torch.from_numpy(one.trunk.tokens).long()[None], torch.from_numpy(one.trunk.weights)
        logits = plain(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
        loss = (functional.cross_entropy(logits, ids[0, 1:], reduction="none") * weights[1:]).sum()
        for (name, _), gradient in zip(named.items(), torch.autograd.grad(loss, list(named.values())), strict=True):
            sums[name] += gradient**2 / len(examples)
    assert found.keys() == sums.keys()
    assert any(values.any() for values in found.values())
    for name, values in sums.items():
        torch.testing.assert_close(found[name], values, rtol=1e-3, atol=1e-6 * float(values.max()) + 1e-12)
    assert all(p.grad is None for p in trained.values())


def test_l2_sp_and_ewc_have_the_gradients_of_their_formulas(tiny):
    engine = engine_of(load(tiny))
    start = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    torch.manual_seed(1)
    importance = {name: torch.rand_like(p) for name, p in start.items()}
    options = RetainOptions(l2_sp=0.3, ewc=2.0, ewc_data="x")
    retention = Retention(options, engine, "CAUSAL_LM", importance)
    assert retention.pull() == {"l2_sp": 0.0, "ewc": 0.0}
    moved(engine)
    engine.model.zero_grad(set_to_none=True)
    values = retention.pull()
    now = dict(engine.model.named_parameters())
    distance = {name: now[name].detach() - start[name] for name in start}
    for name, gradient in gradients_of(engine).items():
        torch.testing.assert_close(gradient, (0.3 + 2.0 * importance[name]) * distance[name], rtol=1e-4, atol=1e-7)
    assert values["l2_sp"] == pytest.approx(sum(float((d**2).sum()) for d in distance.values()) / 2, rel=1e-5)
    ewc = sum(float((importance[name] * d**2).sum()) for name, d in distance.items()) / 2
    assert values["ewc"] == pytest.approx(ewc, rel=1e-5)
    before = {name: gradient.clone() for name, gradient in gradients_of(engine).items()}
    retention.pull()  # adds to what is there
    torch.testing.assert_close(gradients_of(engine)["lm_head.weight"], 2 * before["lm_head.weight"])


def test_weights_that_a_step_does_not_train_are_not_pulled(tiny):
    """An optimizer would move what has a gradient, be it nothing, by its weight decay."""
    method = Unfreeze(UnfreezeOptions(steps_per_layer=1))
    engine = engine_of(load(tiny), method)
    importance = {name: torch.ones_like(p) for name, p in engine.model.named_parameters()}
    retention = Retention(RetainOptions(l2_sp=0.3, ewc=2.0, ewc_data="x"), engine, "CAUSAL_LM", importance)
    moved(engine)
    engine.model.zero_grad(set_to_none=True)
    with method.at_step(engine.model, 1, 10):
        values = retention.pull()
        trained = {name for name, p in engine.model.named_parameters() if p.requires_grad}
    assert 0 < len(trained) < len(importance)
    assert {name for name, p in engine.model.named_parameters() if p.grad is not None} == trained
    assert values == retention.pull()  # the distance is that of all weights


@pytest.mark.parametrize("options", [{}, {"init_lora_weights": "pissa"}, {"use_rslora": True}])
def test_l2_sp_of_lora_is_the_distance_of_the_layers_weights(options, tiny):
    """By dense products of the update, which the penalty never makes."""
    engine = engine_of(load(tiny), Lora(LoraOptions(r=3, lora_alpha=7, **options)))
    layers = [m for m in engine.model.modules() if "default" in getattr(m, "lora_A", ())]

    def update(layer):
        return layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight

    start = [update(layer).detach() for layer in layers]
    retention = Retention(RetainOptions(l2_sp=0.5), engine, "CAUSAL_LM")
    assert retention.pull()["l2_sp"] == pytest.approx(0, abs=1e-4)
    moved(engine)
    engine.model.zero_grad(set_to_none=True)
    value = retention.pull()["l2_sp"]
    ours = gradients_of(engine)
    wanted = (
        torch.stack([((update(layer) - was) ** 2).sum() for layer, was in zip(layers, start, strict=True)]).sum() / 2
    )
    trained = [p for p in engine.model.parameters() if p.requires_grad]
    theirs = torch.autograd.grad(0.5 * wanted, trained)
    assert value == pytest.approx(wanted.item(), rel=1e-4)
    for (name, gradient), reference in zip(ours.items(), theirs, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["shared prefix", "branches"])
def test_kl_to_the_base_is_that_of_full_logits(name, tiny):
    for method in (Full(FullOptions()), Lora(LoraOptions(r=4))):
        engine = engine_of(load(tiny), method)
        base = load(tiny).eval()
        engine.beside = {"base": AddedOff(engine) if method.adds else Loaded(engine_of(base))}
        retention = Retention(RetainOptions(kl_base=0.1), engine, "CAUSAL_LM")
        assert retention.terms(engine.states(CASES[name]))["kl_base"].item() == pytest.approx(0, abs=1e-5)
        moved(engine, 0.3)
        trained = [p for p in engine.model.parameters() if p.requires_grad]
        value = retention.terms(engine.states(CASES[name]))["kl_base"]
        ours = torch.autograd.grad(value, trained, allow_unused=True)
        from test_distill import paths_of

        wanted = torch.zeros(())
        for path in paths_of(CASES[name]):
            ids, weights = torch.from_numpy(path.tokens).long()[None], torch.from_numpy(path.weights)[1:]
            engine.model.eval()
            attention = torch.ones_like(ids)
            q = torch.log_softmax(engine.model(input_ids=ids, attention_mask=attention).logits[0, :-1], -1)
            p = torch.log_softmax(load(tiny).eval()(input_ids=ids).logits[0, :-1], -1).detach()
            wanted = wanted + (functional.kl_div(q, p, reduction="none", log_target=True).sum(-1) * weights).sum()
        assert value.item() == pytest.approx(wanted.item(), rel=1e-4)
        theirs = torch.autograd.grad(wanted, trained, allow_unused=True)
        apart = sum(float((a - b).norm()) ** 2 for a, b in zip(ours, theirs, strict=True) if b is not None) ** 0.5
        assert apart < 1e-3 * sum(float(b.norm()) ** 2 for b in theirs if b is not None) ** 0.5


def test_rows_of_the_earlier_task_are_drawn_by_the_seed():
    class Rows(list):
        def take(self, places):
            return [self[place] for place in places]

    rows = Rows(range(50))
    some = draw(rows, 10, 1)
    assert some == sorted(some) == draw(rows, 10, 1) != draw(rows, 10, 2)
    assert draw(rows, 99, 1) == list(range(50))


# --- in a run --------------------------------------------------------------------------------------------------------


def saved(run, step):
    from safetensors.torch import load_file

    return load_file(run.checkpoints[step] / "trainable.safetensors")


def test_a_penalty_is_added_once_a_step_and_the_loss_stays_the_objectives(train, tiny, monkeypatch):
    """By SGD without momentum the second step differs by exactly rate x factor x (w1 - w0)."""
    keys = {
        "method": {"name": "full"}, "optim": "sgd", "adam_beta1": 0.0, "max_grad_norm": 0, "max_steps": 2, "save_steps": 1,
        "lr_scheduler_type": "constant", "warmup_ratio": 0, "learning_rate": 0.1, "eval": {"steps": 50, "samples": 0},
        "dtype": "float32", "microbatch_tokens": 80, "batch_size": 6, "save_total_limit": 3,
    }  # fmt: skip
    monkeypatch.setattr(Loop, "_retain", lambda self, limit: None)  # every checkpoint is looked at
    plain, held = train(**keys), train(**keys, retain={"l2_sp": 0.5})
    start = {name: p.detach() for name, p in load(tiny).named_parameters()}
    first, second = saved(plain, 1), saved(plain, 2)
    ours = saved(held, 2)
    assert all(torch.equal(first[name], value) for name, value in saved(held, 1).items())
    for name, value in second.items():
        torch.testing.assert_close(ours[name] - value, -0.1 * 0.5 * (first[name] - start[name]), rtol=1e-3, atol=5e-7)
    steps = held.summary().steps
    assert [steps[step]["loss"] for step in (1, 2)] == [plain.summary().steps[step]["loss"] for step in (1, 2)]
    distance = sum(float(((first[name] - start[name]) ** 2).sum()) for name in first) / 2
    assert (steps[1]["l2_sp"], steps[2]["l2_sp"]) == (0, pytest.approx(distance, rel=1e-3))
    assert "l2_sp" not in plain.summary().steps[1]


ALL = {"l2_sp": 0.05, "ewc": 5.0, "ewc_rows": 4, "kl_base": 0.3}


@pytest.mark.parametrize("method", [
    {"name": "lora", "r": 4, "lora_dropout": 0.2}, {"name": "full"}, {"name": "lora", "r": 4, "init_lora_weights": "pissa"},
    {"name": "lora", "r": 4, "use_dora": True}, {"name": "bottleneck", "bottleneck_size": 4}, {"name": "prompt", "num_virtual_tokens": 4},
])  # fmt: skip
@pytest.mark.sampled(6)
def test_stopped_anywhere_all_penalties_go_on_as_if_unbroken(method, train, make_run, monkeypatch, old_rows, new_rows):
    keys = {
        "method": method, "data": {"train": new_rows, "held_out": 0.25}, "retain": ALL | {"ewc_data": old_rows},
        "microbatch_tokens": 100, "max_steps": 10, "eval": {"steps": 5, "samples": 0},
    }  # fmt: skip
    whole = train(**keys)
    whole.raise_for_state()
    steps, evaluations = whole.summary().steps, whole.summary().evaluations
    assert {"l2_sp", "ewc", "kl_base"} <= steps[10].keys()
    assert all(steps[10][name] > 0 for name in ("l2_sp", "ewc", "kl_base"))
    if "prompt" not in method["name"] and "init_lora_weights" not in method:
        assert steps[1]["kl_base"] == pytest.approx(0, abs=1e-3)
    assert evaluations[0]["kl_base"] == pytest.approx(0, abs=1e-3)
    assert whole.summary().plan["retain"] == {"l2_sp": 0.05, "ewc": 5.0, "kl_base": 0.3, "ewc_data": "old.jsonl"}
    assert (
        "kept near its start by: L2-SP × 0.05, KL to the base × 0.3, EWC on old.jsonl × 5" in whole.card()["text/plain"]
    )
    for n in (2, 26):  # while the Fisher information is computed, and in training
        run = make_run(**keys)
        stop_and_resume(run, monkeypatch, n)
        assert_same(run, whole)
        assert run.summary().steps[10]["ewc"] == steps[10]["ewc"]


def test_penalties_do_not_depend_on_microbatches(train, old_rows, new_rows):
    keys = {
        "data": {"train": new_rows, "held_out": 0.25}, "retain": ALL | {"ewc_data": old_rows}, "dtype": "float32",
        "method": {"name": "full"}, "learning_rate": 1e-3,
    }  # fmt: skip
    reference = train(**keys).summary().steps
    for changes in ({"microbatch_tokens": 40}, {"share_prefixes": False}, {"gradient_checkpointing": True}):
        found = train(**keys, **changes).summary().steps
        for step, event in reference.items():
            for name in ("loss", "l2_sp", "ewc", "kl_base", "grad_norm"):
                assert found[step][name] == pytest.approx(event[name], rel=2e-3, abs=2e-5), (name, step)


def test_the_fisher_information_is_kept_and_the_start_is_the_bases(make_run, old_rows, new_rows, monkeypatch):
    """A resumed run reads it; the start of the penalty is the base, not the checkpoint."""
    from test_training import StopAt

    keys = {
        "method": {"name": "full"}, "data": {"train": new_rows, "held_out": 0}, "max_steps": 8, "save_steps": 2,
        "retain": {"ewc": 5.0, "ewc_data": old_rows, "ewc_rows": 3, "l2_sp": 0.01},
    }  # fmt: skip
    run = make_run(**keys)
    with monkeypatch.context() as patch:
        StopAt(patch, 20)
        local.start(run.path, "inline")
    assert run.status == "stopped"
    distances = [event["l2_sp"] for event in run.events("step")]
    with monkeypatch.context() as patch:
        patch.setattr("tune_magic.training.fisher.fisher", None)
        run.resume("inline")
    assert run.status == "finished"
    resumed = [event["l2_sp"] for event in run.events("step") if event["attempt"] == 1 or event["attempt"] > 1]
    assert distances[0] == 0
    assert min(resumed[len(distances) :]) > 0.5 * max(distances)


def test_a_classifier_is_kept_near_too_its_head_left_free(train, tmp_path):
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in labelled()))
    keys = {
        "model": str(make_encoder(tmp_path / "bert", num_key_value_heads=4)), "data": {"train": str(path), "held_out": 0.25},
        "method": {"name": "full"}, "learning_rate": 1e-3, "max_steps": 30, "batch_size": 8, "eval": {"steps": 30, "samples": 0},
    }  # fmt: skip
    free = train(**keys, retain={"l2_sp": 1e-9})
    held = train(**keys, retain={"l2_sp": 3.0, "ewc": 10.0, "ewc_data": str(path), "ewc_rows": 8})
    held.raise_for_state()
    assert held.summary().steps[30]["l2_sp"] < 0.5 * free.summary().steps[30]["l2_sp"]
    assert held.summary().evaluations[30]["loss"] < held.summary().evaluations[0]["loss"]
    with pytest.raises(RunFailed, match="this objective predicts none"):
        train(**keys, retain={"kl_base": 0.1}).raise_for_state()


def test_without_penalties_a_run_is_the_same_to_the_bit_and_so_is_its_log(train):
    plain, empty = train(max_steps=4), train(max_steps=4, retain={})
    assert_same(plain, empty)
    assert plain.summary().steps[1].keys() == empty.summary().steps[1].keys()
    assert "retain" not in plain.summary().plan


@pytest.mark.parametrize(("retain", "says"), [
    ({"ewc": 1}, "`ewc` needs `ewc_data`"),
    ({"ewc_data": "x"}, "is used by `ewc` alone"),
    ({"l2_sp": -1}, "must be at least 0"),
    ({"l2sp": 1}, "Did you mean `l2_sp`?"),
    (3, "must be a mapping such as {kl_base: 0.1}"),
])  # fmt: skip
def test_what_is_wrong_is_told(retain, says):
    with pytest.raises(RecipeError) as caught:
        build_recipe({"model": "m", "data": "rows.jsonl", "retain": retain})
    assert says in str(caught.value)


def test_earlier_rows_are_part_of_what_a_run_is(tiny, old_rows, new_rows, train, make_run, tmp_path):
    from tune_magic.launching import _identity

    content = {"model": str(tiny), "data": new_rows, "retain": {"ewc": 1, "ewc_data": "$mine"}}
    rows = {
        name: (".jsonl", json.dumps({"prompt": name, "completion": "b"}).encode() + b"\n") for name in ("mine", "other")
    }
    first = _identity(build_recipe(content), {"mine": rows["mine"]}, tmp_path / "a", tmp_path)
    same = build_recipe({**content, "retain": {"ewc": 1, "ewc_data": "$yours"}})
    assert _identity(same, {"yours": rows["mine"]}, tmp_path / "b", tmp_path) == first
    assert _identity(same, {"yours": rows["other"]}, tmp_path / "c", tmp_path) != first


def test_new_words_have_no_base_to_be_kept_near(train):
    with pytest.raises(RunFailed, match="no embeddings of the new tokens"):
        train(vocabulary={"tokens": ["colour"]}, retain={"kl_base": 0.1}).raise_for_state()


# --- what it is for --------------------------------------------------------------------------------------------------


def test_the_earlier_task_is_forgotten_less(slow, train, tmp_path, old_rows, new_rows, monkeypatch):
    """Capitals first, then sums: the held-out rows are the capitals, so held-out loss says what was forgotten."""
    start = local.start
    monkeypatch.setattr(local, "start", lambda folder, executor="inline": start(folder, "inline"))
    model = make_model(tmp_path / "m", hidden_size=64, intermediate_size=128)
    first = train(
        model=str(model), data={"train": old_rows, "held_out": old_rows}, method={"name": "full"}, learning_rate=5e-3,
        max_steps=120, eval={"steps": 60, "samples": 0},
    )  # fmt: skip
    learned = first.export("merged", rows=3).path
    keys = {
        "model": str(learned), "method": {"name": "full"}, "learning_rate": 2e-3, "max_steps": 60, "batch_size": 8,
        "eval": {"steps": 60, "samples": 0},
    }  # fmt: skip
    ways = {
        "nothing": {},
        "l2_sp": {"retain": {"l2_sp": 0.05}},
        "ewc": {"retain": {"ewc": 10000, "ewc_data": old_rows, "ewc_rows": 18}},
        "kl_base": {"retain": {"kl_base": 0.3}},
        "replay": {},
    }
    old, new = {}, {}
    for name, changes in ways.items():
        data = {"train": new_rows, "held_out": old_rows}
        if name == "replay":
            data |= {"replay": old_rows, "replay_share": 0.3}
        run = train(**keys, data=data, **changes)
        run.raise_for_state()
        evaluations = run.summary().evaluations
        old[name] = evaluations[60]["loss"] - evaluations[0]["loss"]
        new[name] = sum(losses(run)[0][step] for step in range(51, 61)) / 10
    report = SimpleNamespace(old=old, new=new)
    assert old["nothing"] > 0.5, report
    for name in ways.keys() - {"nothing"}:
        assert old[name] < 0.8 * old["nothing"], report
        assert new[name] < 1.5, report  # and the new task is learned all the same
