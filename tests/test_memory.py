"""Out of memory: the same step in smaller microbatches, never another batch (fault matrix F21, F22)."""

import pytest
import torch
from test_training import assert_same, losses, weights

from tune_magic.errors import RunFailed
from tune_magic.executors import local
from tune_magic.storage.control import StopRequested
from tune_magic.training.engine import TokenEngine
from tune_magic.training.loop import Loop

LIMIT = 150  # tokens; a row has about 60
ROOMY = {
    "microbatch_tokens": 2048,
    "max_steps": 12,
    "learning_rate": 2e-3,
    "eval": {"steps": 6, "samples": 0},
    "save_steps": 3,
}


class LittleMemory:
    """Refuses microbatches of more than `limit` tokens, from the n-th pass on, in training or in evaluation."""

    def __init__(self, monkeypatch, limit, *, where="forward", first=1, training=True):
        self.refused, self.passes, real = [], 0, TokenEngine.states

        def allocate(*_):
            torch.empty(2**62, dtype=torch.uint8)  # a real refusal of the allocator

        def states(engine, examples):
            found = real(engine, examples)
            if engine.model.training is not training:
                return found
            self.passes += 1
            tokens = sum(map(len, examples))
            if tokens > limit and self.passes >= first:
                self.refused.append(tokens)
                if where == "forward":
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
                found.states.register_hook(allocate)
            return found

        monkeypatch.setattr(TokenEngine, "states", states)


@pytest.fixture
def roomy(train):
    return train(**ROOMY)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("first", [1, 8])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_f21_the_step_is_done_again_in_halves_and_nothing_else_changes(train, roomy, monkeypatch, where, first):
    memory = LittleMemory(monkeypatch, LIMIT, where=where, first=first)
    run = train(**ROOMY)
    assert run.status == "finished"
    assert memory.refused
    warnings = list(run.events("warning"))
    assert {(event["kind"], event["step"]) for event in warnings} == {("microbatch_changed", first)}
    assert 2048 > warnings[-1]["microbatch_tokens"] > 1
    assert "at once" in run.card()["text/plain"]
    for ours, theirs in zip(losses(run), losses(roomy), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    events, expected = run.summary().steps, roomy.summary().steps
    for step in expected:
        assert [events[step][key] for key in ("examples", "tokens", "targets")] == [
            expected[step][key] for key in ("examples", "tokens", "targets")
        ]
        assert events[step]["grad_norm"] == pytest.approx(expected[step]["grad_norm"], rel=1e-5)
    for name, tensor in weights(roomy).items():
        torch.testing.assert_close(weights(run)[name], tensor, rtol=1e-3, atol=1e-6)


def test_f21_dropout_draws_what_it_would_have_drawn(train, monkeypatch):
    """A step that had to be repeated is the step that smaller microbatches would have made at once."""
    method = {"name": "lora", "r": 4, "lora_dropout": 0.3}
    with monkeypatch.context() as patch:
        LittleMemory(patch, LIMIT)
        repeated = train(**ROOMY | {"method": method})
    tokens = list(repeated.events("warning"))[-1]["microbatch_tokens"]
    at_once = train(**ROOMY | {"method": method, "microbatch_tokens": tokens})
    assert not list(at_once.events("warning"))
    assert losses(repeated)[0] == losses(at_once)[0]


def test_f21_a_resumed_run_starts_with_what_fitted(make_run, train, monkeypatch):
    with monkeypatch.context() as patch:
        LittleMemory(patch, LIMIT)
        whole = train(**ROOMY)
    run, real = make_run(**ROOMY), Loop._obey

    def stop(self):
        real(self)
        if self.progress.step == 5:
            raise StopRequested

    with monkeypatch.context() as patch:
        LittleMemory(patch, LIMIT)
        patch.setattr(Loop, "_obey", stop)
        local.start(run.path, "inline")
    assert run.status == "stopped"
    memory, count = LittleMemory(monkeypatch, LIMIT), len(list(run.events("warning")))
    run.resume("inline")
    assert run.status == "finished"
    assert memory.refused == []
    assert len(list(run.events("warning"))) == count
    assert_same(run, whole)


def test_f22_one_row_at_a_time_that_does_not_fit_is_an_error_with_the_ways_out(make_run, monkeypatch):
    LittleMemory(monkeypatch, 0, first=3)
    run = make_run(**ROOMY)
    local.start(run.path, "inline")
    assert run.status == "failed"
    assert run.summary().step == 2
    with pytest.raises(RunFailed, match=r"(?s)one row at a time.*max_length.*smaller model.*lora"):
        run.raise_for_state()


def test_f22_an_evaluation_that_does_not_fit_leaves_training_as_it_was(train, roomy, monkeypatch):
    memory = LittleMemory(monkeypatch, LIMIT, training=False)
    run = train(**ROOMY)
    assert run.status == "finished"
    assert memory.refused
    assert not list(run.events("warning"))
    assert losses(run)[0] == losses(roomy)[0]
    assert losses(run)[1] == pytest.approx(losses(roomy)[1], rel=1e-6)


def test_f22_another_error_is_not_swallowed(make_run, monkeypatch):
    def states(engine, examples):
        raise RuntimeError("shape mismatch")

    run = make_run(**ROOMY)
    monkeypatch.setattr(TokenEngine, "self_check", lambda *_: None)
    monkeypatch.setattr(TokenEngine, "states", states)
    local.start(run.path, "inline")
    assert run.status == "failed"
    with pytest.raises(RunFailed, match="shape mismatch"):
        run.raise_for_state()
    assert not list(run.events("warning"))
