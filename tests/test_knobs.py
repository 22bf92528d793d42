"""Label smoothing, NEFTune, averaged parameters, the plateau schedule, gradual unfreezing, the search for a rate."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import fast, make_model, plainly
from safetensors.torch import load_file
from test_classify import labelled, make_encoder
from test_engine import CASES, engine_of, load, loss_and_gradient
from test_training import SHORT, assert_same, losses, stop_and_resume
from torch.nn import functional

import tune_magic
from tune_magic.errors import CheckpointError, RecipeError, RunFailed, Stopped
from tune_magic.executors import local
from tune_magic.methods.full import Full, FullOptions
from tune_magic.methods.lora import Lora, LoraOptions
from tune_magic.methods.unfreeze import Unfreeze, UnfreezeOptions
from tune_magic.objectives.classify import Classify, ClassifyOptions
from tune_magic.objectives.sft import SFT
from tune_magic.recipe import build_recipe
from tune_magic.recipe.build import build_launch
from tune_magic.recipe.schema import Optimizer
from tune_magic.storage.control import Control, StopRequested
from tune_magic.training import checkpoint, noise, packing, target_states
from tune_magic.training.average import Average
from tune_magic.training.loop import Loop
from tune_magic.training.optimizer import Plateau, held_bytes, learning_rate
from tune_magic.training.rate_search import rates_of, smooth
from tune_magic.training.rows import RowStates
from tune_magic.training.tuned import load_tuned

PLAIN = {"dtype": "float32"}


# --- label smoothing -------------------------------------------------------------------------------------------------


def reference_loss(model, examples, smoothing):
    """Sum of torch's smoothed cross-entropy over the trained tokens, each row alone through the whole model."""
    total = torch.zeros(())
    for example in examples:
        for path in packing._paths(example):
            logits = model(input_ids=torch.from_numpy(path.tokens.astype(np.int64))[None]).logits[0, :-1]
            each = functional.cross_entropy(
                logits, torch.from_numpy(path.tokens[1:].astype(np.int64)), reduction="none", label_smoothing=smoothing
            )
            total = total + (each * torch.from_numpy(path.weights[1:])).sum()
    return total


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_smoothed_losses_and_gradients_are_those_of_torch(method, tied, tmp_path, monkeypatch):
    """A frozen head, a trained one, and the padded way with every logit; in one chunk and in many."""
    model = load(make_model(tmp_path / "m", tie_word_embeddings=tied))
    made = Full(FullOptions()) if method == "full" else Lora(LoraOptions(r=4, init_lora_weights="gaussian"))
    engine = engine_of(model, made)
    engine.regularise(label_smoothing=0.1, noise_alpha=0.0)
    with torch.no_grad():  # LoRA begins as nothing
        for name, parameter in engine.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    engine.model.train()
    examples = CASES["branches"] + CASES["nothing shared"]
    engine.model.zero_grad()
    expected = reference_loss(engine.model, examples, 0.1)
    expected.backward()
    gradient = torch.cat([p.grad.flatten() for p in engine.model.parameters() if p.grad is not None])
    for chunk in (2**22, 64):
        monkeypatch.setitem(target_states._CHUNK_LOGITS, "cpu", chunk)
        monkeypatch.setattr(target_states, "_LEAST_CHUNK", 2)
        for way in (fast(engine), plainly(engine)):
            found = loss_and_gradient(engine, way, examples)
            torch.testing.assert_close(found[0], expected.detach(), rtol=1e-5, atol=1e-5)
            assert (found[1] - gradient).norm() / gradient.norm() < 1e-4


def test_only_the_loss_in_training_is_smoothed(tiny):
    engine = engine_of(load(tiny))
    engine.regularise(label_smoothing=0.2, noise_alpha=0.0)
    examples = CASES["nothing shared"]
    engine.model.train()
    states = engine.states(examples)
    torch.testing.assert_close(states.losses(), -states.log_probs() * 0.8 + 0.2 * mean_over_vocabulary(states))
    engine.model.eval()
    states = engine.states(examples)
    assert torch.equal(states.losses(), -states.log_probs())


def mean_over_vocabulary(states):
    return -torch.log_softmax(states.head(states.states), -1).mean(-1)


@pytest.mark.parametrize("options", [{}, {"focal_gamma": 2.0}, {"class_weights": "balanced"}])
def test_a_classifiers_smoothed_loss_is_that_of_torch(options):
    logits = torch.randn(6, 3, requires_grad=True)
    targets, weights = torch.tensor([0, 1, 2, 2, 1, 0]), [0.5, 2.0, 1.0]
    objective = Classify(
        ClassifyOptions(**options), classes=["a", "b", "c"], weights=weights if "class_weights" in options else ()
    )
    found = objective.loss_sum(RowStates(logits, targets, 0.1))
    each = functional.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)
    if "focal_gamma" in options:
        each = each * (1 - torch.softmax(logits, -1)[torch.arange(6), targets]) ** 2
    if "class_weights" in options:
        each = each * torch.tensor(weights)[targets]
    torch.testing.assert_close(found, each.sum())
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (found, each.sum())]
    torch.testing.assert_close(*gradients)


def test_held_out_loss_stays_plain_whatever_the_smoothing(train):
    plain, smoothed = (train(max_steps=1, label_smoothing_factor=e, **PLAIN) for e in (0.0, 0.3))
    for run in (plain, smoothed):
        run.raise_for_state()
    assert losses(smoothed)[1][0] == losses(plain)[1][0]
    assert losses(smoothed)[0][1] != losses(plain)[0][1]


def test_an_objective_whose_loss_has_no_labels_refuses_it(train, monkeypatch):
    monkeypatch.setattr(SFT, "smooths", False)
    with pytest.raises(RunFailed, match="means nothing to this objective"):
        train(label_smoothing_factor=0.1).raise_for_state()


# --- NEFTune ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["_packed", "_padded"])
def test_noise_is_even_up_to_alpha_by_the_root_of_a_rows_own_numbers(tiny, way):
    engine = engine_of(load(tiny), share_prefixes=False)
    examples = [*CASES["nothing shared"], *CASES["shared prefix"]]
    batch = getattr(engine, way)(examples)
    embeddings = engine.inner.get_input_embeddings()
    ids = engine.tensor(batch.input_ids)
    torch.manual_seed(3)
    with torch.no_grad(), noise.on_embeddings(embeddings, batch, 5.0):
        drawn = torch.stack([embeddings(ids) for _ in range(400)]) - embeddings.weight[ids]
    drawn, width = drawn.flatten(1, -2), drawn.shape[-1]
    for places, example in zip(batch.places, examples, strict=True):
        own, bound = drawn[:, torch.from_numpy(places)], 5.0 / math.sqrt(len(example) * width)
        assert bound * 0.999 < float(own.abs().max()) <= bound * 1.0001
        assert float(own.mean()) == pytest.approx(0, abs=0.01 * bound)
        assert float(own.std()) == pytest.approx(bound / math.sqrt(3), rel=0.01)  # of an even distribution
    if way == "_padded":
        padding = ~torch.from_numpy(batch.attention).flatten()
        assert float(drawn[:, padding].abs().max()) == 0.0


def test_noise_is_as_transformers_draws_it(tiny):
    from transformers.integrations.neftune import neftune_post_forward_hook

    engine = engine_of(load(tiny), share_prefixes=False)
    batch = engine._padded(CASES["one row"])
    embeddings, ids = engine.inner.get_input_embeddings().train(), engine.tensor(batch.input_ids)
    torch.manual_seed(5)
    with noise.on_embeddings(embeddings, batch, 7.0):
        ours = embeddings(ids)
    torch.manual_seed(5)
    settings = SimpleNamespace(training=True, neftune_noise_alpha=7.0)
    torch.testing.assert_close(ours, neftune_post_forward_hook(settings, None, embeddings(ids)))


def test_noise_is_drawn_in_training_alone_and_packed_rows_get_that_of_padded_ones(tiny):
    engine, examples = engine_of(load(tiny)), CASES["shared prefix"]
    plain = SFT().loss_sum(engine.states(examples)).detach()
    engine.regularise(label_smoothing=0.0, noise_alpha=10.0)
    engine.model.eval()
    assert engine.shares
    assert torch.equal(SFT().loss_sum(engine.states(examples)), plain)
    engine.model.train()
    assert engine.packed
    assert not engine.shares
    found = []
    for way in (engine.states, plainly(engine)):
        torch.manual_seed(1)
        found.append(loss_and_gradient(engine, way, examples))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    assert (found[0][1] - found[1][1]).norm() / found[1][1].norm() < 1e-4
    assert abs(float(found[0][0] - plain)) > 1e-3


def test_a_step_with_noise_does_not_depend_on_microbatches(train):
    reference = losses(train(neftune_noise_alpha=5, **PLAIN))[0]
    assert reference != losses(train(**PLAIN))[0]
    for changes in ({"microbatch_tokens": 80}, {"microbatch_tokens": 16}):
        found = losses(train(neftune_noise_alpha=5, **changes, **PLAIN))[0]
        assert found == pytest.approx(reference, abs=1e-5)


def test_rows_behind_learned_tokens_get_noise_too(train):
    settings = {"method": {"name": "prompt", "num_virtual_tokens": 4}, "max_steps": 2, **PLAIN}
    plain, noisy = train(**settings), train(neftune_noise_alpha=20, **settings)
    noisy.raise_for_state()
    assert losses(plain)[0] != losses(noisy)[0]


def test_a_frozen_trunk_is_not_kept_beside_noise(train, tmp_path):
    settings = classifier(tmp_path) | {"method": "freeze", "max_steps": 20}
    kept, noisy = train(**settings), train(neftune_noise_alpha=5, **settings)
    assert kept.summary().plan["kept_layers"] > 0
    assert noisy.summary().plan["kept_layers"] == 0
    assert losses(kept)[0] != losses(noisy)[0]


# --- everything resumes exactly and learns ---------------------------------------------------------------------------


def classifier(tmp_path):
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in labelled()))
    model = make_encoder(tmp_path / "bert", num_key_value_heads=4)
    return {"model": str(model), "data": {"train": str(path), "held_out": 0.25}, "batch_size": 8, **PLAIN}


KNOBS = {
    "label smoothing": {"label_smoothing_factor": 0.1},
    "noise": {"neftune_noise_alpha": 5.0},
    "average": {"ema_decay": 0.6},
    "average and plateau": {"ema_decay": 0.9, "lr_scheduler_type": "reduce_lr_on_plateau"},
    "plateau": {
        "lr_scheduler_type": "reduce_lr_on_plateau", "learning_rate": 0.2,
        "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5}, "eval": {"steps": 2, "samples": 0},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", KNOBS)
@pytest.mark.sampled(6)
def test_every_knob_resumes_exactly_and_learns(name, train, make_run, monkeypatch):
    changes = {**SHORT, **PLAIN, "learning_rate": 2e-2, **KNOBS[name]}
    whole = train(**changes)
    whole.raise_for_state()
    evaluations = losses(whole)[1]
    assert min(evaluations[step] for step in evaluations if step) < evaluations[0]
    run = make_run(**changes)
    stop_and_resume(run, monkeypatch, 55 if name == "noise" else 33)  # rows with noise share nothing: more microbatches
    assert any(event.get("from_step", 0) > 5 for event in run.events("state"))  # an evaluation lies before it
    assert_same(run, whole)


# --- averaged parameters ---------------------------------------------------------------------------------------------


def test_the_average_is_that_of_torch():
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    ours = Average(model, 0.9)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(model)  # its first call copies
    for step in range(1, 200):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ours.update(step)
        theirs.multi_avg_fn = get_ema_multi_avg_fn(min(0.9, (1 + step) / (10 + step)))
        theirs.update_parameters(model)
        for name, parameter in theirs.module.named_parameters():
            assert torch.equal(ours.tensors[name], parameter)
    raw = {name: p.detach().clone() for name, p in model.named_parameters()}
    places = [p.data_ptr() for p in model.parameters()]
    with ours.shown():
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), theirs.module.parameters(), strict=True))
    assert all(torch.equal(raw[name], p) for name, p in model.named_parameters())
    assert [p.data_ptr() for p in model.parameters()] == places


def test_training_goes_on_with_the_raw_ones_and_all_else_sees_the_average(train, monkeypatch):
    seen = {}
    real = Loop._note_memory

    def note(loop):
        seen[loop.progress.step] = {
            n: p.detach().clone() for n, p in loop.session.model.named_parameters() if p.requires_grad
        }
        real(loop)

    plain = train(**SHORT, **PLAIN)
    monkeypatch.setattr(Loop, "_note_memory", note)
    run = train(ema_decay=0.5, **SHORT, **PLAIN)
    run.raise_for_state()
    assert losses(run)[0] == losses(plain)[0]  # the same steps, to the bit
    assert losses(run)[1][12] != losses(plain)[1][12]
    folder = run.checkpoints[12]
    raw = {
        k.removeprefix("raw/"): v
        for k, v in load_file(folder / "optimizer.safetensors").items()
        if k.startswith("raw/")
    }
    averaged = load_file(folder / "trainable.safetensors")
    assert raw.keys() == averaged.keys() == seen[12].keys()
    assert all(torch.equal(raw[name], seen[12][name]) for name in raw)
    expected = None
    for step in range(1, 13):
        d = min(0.5, (1 + step) / (10 + step))
        before = {n: t.double() for n, t in seen[step].items()} if expected is None else expected
        if step > 1:
            expected = {n: d * before[n] + (1 - d) * seen[step][n].double() for n in before}
        else:  # LoRA's second matrices begin as zeros
            start = {n: torch.zeros_like(t) for n, t in before.items() if "lora_B" in n}
            expected = {n: d * start[n] + (1 - d) * before[n] for n in start}
        expected = {n: t for n, t in expected.items() if "lora_B" in n}
    for name, tensor in expected.items():
        torch.testing.assert_close(averaged[name].double(), tensor, rtol=1e-4, atol=1e-6)
    loaded = dict(load_tuned(run).model.named_parameters())
    best = load_file(run.best_checkpoint / "trainable.safetensors")
    assert all(torch.equal(loaded[name], best[name]) for name in best)


def test_the_held_out_loss_is_that_of_the_model_that_is_loaded(train):
    run = train(ema_decay=0.8, max_steps=6, eval={"steps": 6, "samples": 0}, **PLAIN)
    report = run.evaluate()
    assert report.comparisons["loss"].tuned == pytest.approx(losses(run)[1][6], rel=1e-5)


def test_memory_for_the_average_is_planned(recipe):
    model = torch.nn.Linear(8, 4)
    size = sum(parameter.nbytes for parameter in model.parameters())
    for optim, states in (("adamw", 2), ("sgd", 1), ("adafactor", 0)):
        assert held_bytes(build_recipe(recipe | {"optim": optim}), model) == states * size
        assert held_bytes(build_recipe(recipe | {"optim": optim, "ema_decay": 0.99}), model) == (states + 1) * size


def test_a_checkpoint_without_an_average_is_refused_by_a_run_that_keeps_one(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = checkpoint.save(tmp_path, model, optimizer, checkpoint.Progress(step=1), checkpoint.random_state())
    assert "plateau" in json.loads((path / "state.json").read_text())
    with pytest.raises(CheckpointError, match="holds no average"):
        checkpoint.restore(path, model, optimizer, Average(model, 0.9))


def test_a_stop_while_the_average_is_scored_leaves_the_raw_ones_in_place(train, make_run, monkeypatch):
    changes = {"ema_decay": 0.6, **SHORT, **PLAIN}
    whole, run, real = train(**changes), make_run(**changes), Loop._try_held_out

    def stop(loop, *rows):
        if loop.progress.step == 5:
            raise StopRequested
        return real(loop, *rows)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_try_held_out", stop)
        local.start(run.path, "inline")
    assert run.status == "stopped"
    run.resume("inline")
    assert_same(run, whole)


# --- the plateau -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_rates_fall_when_those_of_torch_fall(recipe, patience):
    options = {"factor": 0.3, "patience": patience, "min_lr_rate": 0.02}
    built = build_recipe(
        recipe | {"learning_rate": 0.5, "lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": options, "warmup_steps": 0}
    )  # fmt: skip
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=patience, min_lr=0.01)
    draw, plateau = np.random.default_rng(patience), Plateau()
    for step in range(1, 60):
        loss = float("nan") if step in (1, 20) else 2 / step + float(draw.normal(0, 0.1)) * (step % 3)
        theirs.step(loss)
        plateau.note(loss, patience)
        assert learning_rate(step, 60, built, plateau.reductions) == pytest.approx(optimizer.param_groups[0]["lr"])
    assert plateau.reductions > 0
    json.dumps(vars(plateau), allow_nan=False)


def test_the_rate_of_a_run_falls_after_evaluations_without_gain(train):
    run = train(**PLAIN, **KNOBS["plateau"], warmup_steps=0)
    run.raise_for_state()
    plateau, rates = Plateau(), {}
    for step in range(1, 13):
        rates[step] = 0.2 * 0.5**plateau.reductions
        if step % 2 == 0:
            plateau.note(losses(run)[1][step], 0)
    assert {step: event["learning_rate"] for step, event in run.summary().steps.items()} == pytest.approx(rates)
    assert plateau.reductions > 0


def evaluate_between(run, monkeypatch):
    """Train a run that is stopped after step 5 with an evaluation that was not due, as by a budget, and goes on."""
    real = Loop._evaluate_if_due

    def stop(loop):
        real(loop)
        if loop.progress.step == 5:
            loop._evaluate_all()
            raise StopRequested

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_evaluate_if_due", stop)
        local.start(run.path, "inline")
    run.resume("inline")


def test_an_evaluation_that_a_budget_brought_changes_no_rate(train, make_run, monkeypatch):
    changes = PLAIN | KNOBS["plateau"] | {"warmup_steps": 0}
    whole, run = train(**changes), make_run(**changes)

    evaluate_between(run, monkeypatch)
    rates = [[event["learning_rate"] for event in found.summary().steps.values()] for found in (run, whole)]
    assert rates[0] == rates[1]
    assert losses(run)[0] == losses(whole)[0]
    assert 5 in losses(run)[1]


def test_an_evaluation_that_a_budget_brought_ends_no_run_early(train, make_run, monkeypatch):
    changes = PLAIN | {
        "learning_rate": 1.0,
        "max_steps": 40,
        "eval": {"steps": 2, "early_stopping_patience": 3, "early_stopping_threshold": 9.0, "samples": 0},
    }
    whole, run = train(**changes), make_run(**changes)
    assert max(losses(whole)[0]) == 8

    evaluate_between(run, monkeypatch)
    assert losses(run)[0] == losses(whole)[0]
    assert 5 in losses(run)[1]


def test_the_plateau_needs_held_out_rows(train, data_file):
    with pytest.raises(RunFailed, match="no held-out rows"):
        train(lr_scheduler_type="reduce_lr_on_plateau", data={"train": str(data_file), "held_out": 0}).raise_for_state()


# --- gradual unfreezing ----------------------------------------------------------------------------------------------


def test_one_layer_more_is_trained_after_another(train, tmp_path, monkeypatch):
    tensors, states, real = [], [], Loop._note_memory

    def note(loop):
        names = {id(p): name for name, p in loop.session.model.named_parameters()}
        tensors.append({name: p.detach().clone() for name, p in loop.session.model.named_parameters()})
        states.append({names[id(p)] for p in loop.optimizer.state})
        real(loop)

    def depth(name):
        if "encoder.layer" in name:
            return 2 - int(name.split("encoder.layer.")[1].split(".")[0])
        return 3 if "embeddings" in name else 0

    monkeypatch.setattr(Loop, "_note_memory", note)
    settings = {"method": {"name": "unfreeze", "steps_per_layer": 3}, "max_steps": 12, "learning_rate": 1e-2}
    run = train(**classifier(tmp_path), **settings, eval={"steps": 12})
    run.raise_for_state()
    assert {depth(name) for name in tensors[0]} == {0, 1, 2, 3}
    for step in range(2, 13):
        before, now, opened = tensors[step - 2], tensors[step - 1], (step - 1) // 3
        assert {depth(name) for name in now if not torch.equal(now[name], before[name])} == set(range(opened + 1)), step
        assert {depth(name) for name in states[step - 1]} == set(range(opened + 1)), step
    assert load_file(run.checkpoints[12] / "trainable.safetensors").keys() == tensors[0].keys()


def test_by_default_all_are_trained_from_the_middle_on(tmp_path):
    for tied, first in ((True, 1), (False, 0)):  # an output matrix of its own is the head
        method = Unfreeze(UnfreezeOptions())
        model = method.apply(load(make_model(tmp_path / str(tied), tie_word_embeddings=tied)), "CAUSAL_LM")
        depths = [method.depth_at(step, 100) for step in range(1, 101)]
        assert depths[0] == first
        assert depths == sorted(depths)
        assert depths[50] == max(depths) == 3
        assert depths[40] < 3 or tied
        with method.at_step(model, 1, 100):
            names = {name for name, p in model.named_parameters() if p.requires_grad}
            assert not any("layers.0" in name or "embed" in name for name in names)
            assert any("layers.1" in name for name in names) == tied
        assert all(p.requires_grad for p in model.parameters())


def test_layers_that_are_still_frozen_have_no_optimizer_state_after_a_resume(make_run, monkeypatch):
    changes = {"method": {"name": "unfreeze", "steps_per_layer": 100}, **SHORT, **PLAIN}
    run = make_run(**changes)
    stop_and_resume(run, monkeypatch, 14)
    states = load_file(run.checkpoints[12] / "optimizer.safetensors")
    assert not any("layers.0" in name for name in states)
    assert any("norm" in name for name in states)


# --- the search for a learning rate ----------------------------------------------------------------------------------


@pytest.fixture
def find(recipe):
    def search(**changes):
        return tune_magic.finetune(recipe | PLAIN | changes, name="bot", find_lr=True, executor="inline")

    return search


def test_the_rate_that_is_found_trains_and_a_hundredth_of_it_hardly_does(
    slow, find, train, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    found = find()
    rate = found.metrics["learning_rate"]
    assert not (tmp_path / "tune_runs").exists()
    assert not found.path.exists()
    assert f"learning_rate: {rate:.1e}".replace("e-0", "e-") in capsys.readouterr().out
    good, low = (train(learning_rate=value, max_steps=30, **PLAIN) for value in (rate, rate / 100))
    for run in (good, low):
        run.raise_for_state()
    fall = [run.metrics["base_held_out_loss"] - run.metrics["held_out_loss"] for run in (good, low)]
    assert fall[0] > 0.1
    assert fall[0] > 3 * fall[1]


def test_there_are_rates_to_try_for_every_optimizer():
    for optim in get_args(Optimizer):
        rates = rates_of(optim)
        assert 0 < rates[0] < rates[-1], optim
    assert rates_of("lion_8bit")[-1] < rates_of("paged_adamw_8bit")[-1] == rates_of("adamw")[-1]


@pytest.mark.parametrize(
    "settings", [{"method": "full"}, {"optim": "sgd"}, {"optim": "lion_8bit"}, {"method": "unfreeze"}]
)
@pytest.mark.sampled(2)
def test_a_rate_is_found_for_other_methods_and_optimizers(find, settings):
    low, high = {"sgd": (1e-5, 10.0), "lion_8bit": (1e-8, 0.1)}.get(settings.get("optim"), (1e-7, 1.0))
    result = find(**settings).summary().result
    rates = rates_of(settings.get("optim", "adamw"))
    assert (rates[0], rates[-1]) == (pytest.approx(low), pytest.approx(high))
    assert low < result["learning_rate"] < high
    assert result["learning_rate"] == pytest.approx(result["lowest"] / 10, rel=0.06)
    assert result["steepest"] <= result["lowest"]
    lowest = int(np.argmin(result["smoothed"]))
    assert result["rates"][lowest] == result["lowest"]


def test_a_loss_that_leaves_all_bounds_ends_the_search(find, monkeypatch):
    from tune_magic.training import rate_search

    monkeypatch.setitem(rate_search._BOUNDS, "adamw", (1e-3, 1e5))
    monkeypatch.setattr(rate_search, "_DIVERGED", 1.5)
    found = find(method="full")
    result, history = found.summary().result, found.history
    assert result["diverged"]
    assert len(result["rates"]) == len(history) < 60
    assert result["smoothed"][-1] > 1.5 * min(result["smoothed"])
    assert all(value <= 1.5 * min(result["smoothed"][: i + 1]) for i, value in enumerate(result["smoothed"][:-1]))
    assert history["learning_rate"].tolist() == result["rates"]


def test_the_average_has_no_pull_of_its_start():
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    weights = [[0.8 ** (i - j) for j in range(i + 1)] for i in range(5)]
    expected = [float(np.average(values[: i + 1], weights=row)) for i, row in enumerate(weights)]
    assert smooth(values) == pytest.approx(expected)


def test_the_card_has_the_curve_and_the_line_to_paste(find):
    found = find()
    card = found.card()
    assert '<img style="width:100%' in card["text/html"]
    assert "data:image/svg+xml;base64," in card["text/html"]
    line = f"learning_rate: {found.metrics['learning_rate']:.1e}".replace("e-0", "e-")
    assert line in card["text/html"]
    assert line in card["text/plain"]
    assert "nothing was kept" in card["text/plain"]
    assert len(card["text/html"]) < 100_000
    assert found.plot().axes[0].get_xscale() == "log"


def test_where_the_loss_falls_at_no_rate_it_says_so(find, monkeypatch):
    monkeypatch.setattr("tune_magic.training.rate_search._LEAST_FALL", 2.0)
    found = find()
    assert "learning_rate" not in found.metrics
    assert "fell at no rate" in found.card()["text/plain"]
    assert "<img" in found.card()["text/html"]


def test_a_first_loss_that_is_no_number_is_a_card_without_curve(find, monkeypatch):
    real = SFT.loss_sum
    monkeypatch.setattr(SFT, "loss_sum", lambda self, states: real(self, states) * float("nan"))
    found = find()
    assert found.summary().result["diverged"]
    assert "fell at no rate" in found.card()["text/plain"]
    assert "<img" not in found.card()["text/html"]
    assert found.plot().axes


def test_a_stop_ends_the_search(find, monkeypatch):
    real, looks = Control.check, []

    def check(control, done=0, total=0):
        looks.append(done)
        if len(looks) > 40:
            raise StopRequested
        real(control, done, total)

    monkeypatch.setattr(Control, "check", check)
    with pytest.raises(Stopped):
        find()


def test_two_trials_at_once_are_a_fault():
    assert build_launch({"find_lr": True}).trial == "find_lr"
    assert build_launch({"dry_run": True}).trial == "plan"
    assert build_launch({}).trial is None
    with pytest.raises(RecipeError, match="two trials"):
        build_launch({"dry_run": True, "find_lr": True})


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"label_smoothing_factor": 1.0}, "less than 1"),
        ({"ema_decay": 1}, "less than 1"),
        ({"neftune_noise_alpha": 0}, "greater than 0"),
        ({"lr_scheduler_kwargs": {"factor": 1}}, "less than 1"),
        ({"lr_scheduler_kwargs": {"patience": -1}}, "at least 0"),
    ],
)
def test_bounds_of_the_knobs(recipe, keys, says):
    with pytest.raises(RecipeError, match=says):
        build_recipe(recipe | keys)


def test_knobs_that_are_not_touched_change_nothing(recipe):
    built = build_recipe(recipe)
    assert (built.label_smoothing_factor, built.neftune_noise_alpha, built.ema_decay) == (0.0, None, None)
    old = checkpoint.Progress(
        **json.loads((Path(__file__).parent / "formats/1/checkpoints/step-2/state.json").read_text())
    )
    assert old.plateau == {}
