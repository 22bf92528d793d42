"""The memory planner: counts, choices, and runs that are the same however they are computed."""

import pytest
import torch
from test_training import StopAt, assert_same, losses

from tune_magic.executors import local
from tune_magic.recipe import build_recipe
from tune_magic.training import memory
from tune_magic.training.planner import Planner
from tune_magic.training.prepare import Session, prepare
from tune_magic.view.frame import memory_words

MB = 2**20
WIDE = {"microbatch_tokens": 2048, "batch_size": 12, "max_steps": 6, "eval": {"steps": 3, "samples": 0}}


def test_saved_tensors_are_counted_once_and_parameters_are_not():
    layer = torch.nn.Linear(16, 16, bias=False)
    x = torch.randn(10, 16)
    with memory.count_saved(layer) as saved:
        y = layer(x).exp()  # the product saves x, exp its own result
        y.mul(y).sum()  # once more what is saved already
    assert saved.total_bytes == 2 * 10 * 16 * 4


def test_the_room_is_what_machine_and_container_leave(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    free = memory.free(cpu)
    assert 0 < free < 2**45
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5000000\n")
    assert memory.free(cpu) > 100 * MB
    (tmp_path / "memory.max").write_text("9000000\n")
    assert memory.free(cpu) == 4_000_000
    assert memory.level(cpu) <= memory.peak(cpu)


@pytest.fixture
def session(make_run, monkeypatch):
    """Return a function that prepares a session, and the planner it used."""
    from tune_magic.storage.control import Control
    from tune_magic.storage.events import EventLog

    def make(**changes):
        run = make_run(**WIDE | changes)
        planners = []
        real = Planner.__init__

        def note(planner, *arguments):
            real(planner, *arguments)
            planners.append(planner)

        with monkeypatch.context() as patch, EventLog(run.path / "events.jsonl") as log:
            patch.setattr(Planner, "__init__", note)
            memory.give_back()  # what earlier tests freed
            found = prepare(build_recipe(run.info["recipe"]), run.path, log, Control(run.path, 1))
        return found, planners[0]

    return make


def test_the_first_way_is_taken_where_there_is_room(session):
    found, planner = session()
    assert isinstance(found, Session)
    assert (found.plan["microbatch_tokens"], found.plan["gradient_checkpointing"]) == (2048, False)
    assert found.plan["memory"]["fits"]
    assert found.plan["memory"]["peak_bytes"] > found.plan["memory"]["at_start"] > 0
    assert planner.options()[0] == planner.choose()


def test_options_trade_memory_for_time(session):
    _, planner = session()
    options = planner.options()
    assert [option.slowdown for option in options] == sorted(option.slowdown for option in options)
    kept = [option for option in options if not option.gradient_checkpointing]
    twice = {option.microbatch_tokens: option for option in options if option.gradient_checkpointing}
    assert [option.microbatch_tokens for option in kept] == sorted((o.microbatch_tokens for o in kept), reverse=True)
    peaks = [option.peak_bytes for option in kept]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > peaks[-1]
    for option in kept:
        assert twice[option.microbatch_tokens].peak_bytes < option.peak_bytes
        assert twice[option.microbatch_tokens].slowdown > 1.3 * option.slowdown * 0.99
    longest = max(len(example) for step in planner.steps for example in step)
    assert kept[-1].microbatch_tokens == longest


def room_for(planner, option):
    """Leave just enough for an option."""
    planner.free = round((option.peak_bytes - planner.level) / 0.9) + 1


def test_the_fastest_way_that_fits_is_taken(session):
    _, planner = session()
    for option in planner.options():
        room_for(planner, option)
        chosen = planner.choose()
        assert planner.fits(chosen)
        assert chosen.slowdown <= option.slowdown
    planner.free = 0
    smallest = planner.choose()
    assert smallest == min(planner.options(), key=lambda option: option.peak_bytes)
    facts = planner.facts(smallest)
    assert not facts["fits"]
    assert facts["cheapest"] is None
    words = memory_words({"memory": facts, "recipe": planner.recipe.normalised()})
    assert "lower `max_length`" in words[-1]


def test_what_the_recipe_pins_is_kept_and_the_way_out_is_named(session):
    _, planner = session(gradient_checkpointing=False)
    room_for(planner, min(planner.options(), key=lambda option: option.peak_bytes))
    chosen = planner.choose()
    assert not chosen.gradient_checkpointing
    facts = planner.facts(chosen)
    assert not facts["fits"]
    (_, words) = memory_words({"memory": facts, "recipe": planner.recipe.normalised()})
    assert "`gradient_checkpointing: true`" in words
    assert "% slower" in words


def test_dry_steps_correct_the_forecast_and_change_nothing(session, monkeypatch):
    found, planner = session(method={"name": "lora", "r": 4, "lora_dropout": 0.2})
    before = {name: p.clone() for name, p in found.model.named_parameters()}
    torch.manual_seed(3)
    option = planner.choose()
    trained = planner._trained_bytes()
    monkeypatch.setattr(memory, "peak", lambda device: planner.level + 700 * MB)
    looks = []
    planner.measure(option, found.objective.loss_sum, lambda: looks.append(1))
    assert len(looks) == 2
    assert planner.choose().peak_bytes == pytest.approx(planner.level + 700 * MB + 2 * trained, rel=1e-6)
    assert all(torch.equal(p, before[name]) for name, p in found.model.named_parameters())
    assert not any(p.grad is not None for p in found.model.parameters())
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))


def test_dry_steps_that_do_not_fit_are_no_error(session, monkeypatch):
    found, planner = session()

    def refuse(examples):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(found.engine, "states", refuse)
    first = planner.choose()
    planner.measure(first, found.objective.loss_sum, lambda: None)
    assert not planner.fits(planner.choose()) or planner.choose() != first


@pytest.fixture
def little_room(monkeypatch):
    """Let every option but those that compute activations twice be too large; returns the measurements made."""
    real, real_measure, calls = Planner.__init__, Planner.measure, []

    def measure(planner, *arguments):
        calls.append(real_measure(planner, *arguments))
        planner._correction = 1.0  # this process was larger before, so its peak says nothing about these steps

    def init(planner, *arguments):
        real(planner, *arguments)
        twice = planner.options(checkpointing=True)
        room_for(planner, max(twice, key=lambda option: option.peak_bytes))

    monkeypatch.setattr(Planner, "__init__", init)
    monkeypatch.setattr(Planner, "measure", measure)
    return calls


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activations_computed_twice_give_the_same_run(train, make_run, little_room, monkeypatch, dropout):
    method = {"name": "lora", "r": 4, "lora_dropout": dropout}
    twice = train(**WIDE, method=method)
    assert twice.status == "finished"
    assert len(little_room) == 1  # tight: the forecast was measured
    plan = twice.summary().plan
    assert plan["gradient_checkpointing"] or plan["microbatch_tokens"] < 2048
    assert "to fit" in twice.card()["text/html"]
    with monkeypatch.context() as patch:
        patch.setattr(Planner, "fits", lambda *_: True)
        patch.setattr(Planner, "is_tight", lambda *_: False)
        roomy = train(**WIDE | {"microbatch_tokens": plan["microbatch_tokens"]}, method=method)
    assert not roomy.summary().plan["gradient_checkpointing"]
    for ours, theirs in zip(losses(twice), losses(roomy), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_resumed_run_is_computed_as_it_was(train, make_run, little_room, monkeypatch):
    whole = train(**WIDE)
    run = make_run(**WIDE)
    with monkeypatch.context() as patch:
        StopAt(patch, 12)
        local.start(run.path, "inline")
    assert run.status == "stopped"
    monkeypatch.setattr(Planner, "fits", lambda *_: True)  # there is room now; the sums would come in another order
    run.resume("inline")
    first, second = (event for event in run.events("plan"))
    assert (first["microbatch_tokens"], first["gradient_checkpointing"]) == (
        second["microbatch_tokens"],
        second["gradient_checkpointing"],
    )
    assert_same(run, whole)
