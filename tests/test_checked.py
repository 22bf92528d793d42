"""The self-check's verdict is kept, and only for exactly what was checked."""

import json
from types import SimpleNamespace

import pytest
import torch
from test_training import losses

from tune_magic.methods.lora import Lora
from tune_magic.storage import places
from tune_magic.training import checked, memory
from tune_magic.training.engine import Engine


@pytest.fixture
def checks(monkeypatch):
    """Count the self-checks."""
    done = []
    plain = Engine.self_check

    def counted(self, *given):
        done.append(self)
        return plain(self, *given)

    monkeypatch.setattr(Engine, "self_check", counted)
    return done


def verdicts():
    return list((places.cache_folder() / "checks").glob("*.json"))


def test_a_second_run_is_told_what_the_first_found(train, checks):
    first, second = train(), train()
    assert len(checks) == 1
    assert losses(first) == losses(second)
    plans = [run.summary().plan for run in (first, second)]
    assert plans[0]["packed"]
    for key in ("packed", "attention", "engine_note"):
        assert plans[0][key] == plans[1][key]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "changes",
    [{"method": {"name": "lora", "r": 8}}, {"method": "full"}, {"share_prefixes": False}, {"dtype": "bfloat16"}],
)
def test_whatever_it_depends_on_is_checked_again(train, checks, changes):
    train(max_steps=1)
    train(max_steps=1, **changes)
    assert len(checks) == 2


def test_another_model_or_version_is_checked_again(train, checks, tmp_path, monkeypatch):
    from conftest import make_model

    train(max_steps=1)
    train(max_steps=1, model=str(make_model(tmp_path / "other", seed=1)))
    assert len(checks) == 2
    monkeypatch.setattr(checked.fingerprint, "versions", lambda: {"torch": "another"})
    train(max_steps=1)
    assert len(checks) == 3


def test_a_failed_check_is_done_again_since_its_cause_may_have_gone(train, checks, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_why_not_right", lambda *_: "out of memory")
        assert train(max_steps=1).summary().plan["engine_note"] == "out of memory"
    assert verdicts() == []
    plan = train(max_steps=1).summary().plan
    assert len(checks) == 2
    assert (plan["packed"], plan["engine_note"]) == (True, None)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("content", ["", "[]", "{}", '{"packed": true}'])
def test_a_damaged_verdict_is_no_verdict(train, checks, content):
    train(max_steps=1)
    (path,) = verdicts()
    path.write_text(content)
    assert train(max_steps=1).summary().plan["packed"]
    assert len(checks) == 2
    assert "packed" in json.loads(path.read_text())


def test_a_plug_ins_code_has_no_version_and_is_always_checked(train, checks, monkeypatch):
    monkeypatch.setattr(Lora, "__module__", "somebody.elses")
    train(max_steps=1)
    train(max_steps=1)
    assert len(checks) == 2
    assert verdicts() == []


def test_a_cache_that_cannot_be_written_costs_time_only(train, checks, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "no")

    monkeypatch.setattr(checked, "files", SimpleNamespace(make_folder=refuse))
    assert train(max_steps=1).status == "finished"


def test_a_peak_can_be_forgotten():
    cpu = torch.device("cpu")
    before = torch.ones(60_000_000)
    high = memory.peak(cpu)
    del before
    memory.give_back()
    memory.forget_peak(cpu)
    assert memory.peak(cpu) < high - 200e6


def test_what_was_freed_goes_back_to_the_system():
    """Blocks below the size that malloc maps stay with the process until they are given back."""
    cpu = torch.device("cpu")
    many = [torch.ones(15_000) for _ in range(3000)]
    last = torch.ones(15_000)  # keeps the heap's end in use
    del many
    before = memory.level(cpu)
    memory.give_back()
    assert memory.level(cpu) < before - 50e6
    assert last.sum() == 15_000
