"""What holds which memory, and giving it back."""

import sys
import types

import numpy as np
import pandas as pd
import pytest
import torch
from test_view import Page

from tune_magic import commands, holding
from tune_magic.commands import BadUsage
from tune_magic.magics import verbs

MB = 1_000_000


def held(variables):
    return {row.name: row for row in holding.look(variables).held}


def test_variables_are_named_with_their_bytes():
    layer = torch.nn.Linear(2000, 2000)
    found = held({
        "array": np.zeros(2 * MB), "table": pd.DataFrame({"a": np.zeros(3 * MB)}), "tensor": torch.zeros(5 * MB),
        "model": layer, "batches": [torch.zeros(2 * MB), {"x": (torch.zeros(1 * MB),)}], "small": np.zeros(10),
        "text": "x" * 100, "_hidden": np.zeros(9 * MB), "column": pd.Series(np.zeros(2 * MB)),
    })  # fmt: skip
    sizes = {name: row.num_bytes for name, row in found.items() if row.kind == "variable"}
    assert sizes == {
        "array": 16 * MB, "table": pytest.approx(24 * MB, rel=0.01), "tensor": 20 * MB, "batches": 12 * MB,
        "model": 4 * 2000 * 2001, "column": pytest.approx(16 * MB, rel=0.01),
    }  # fmt: skip
    assert found["model"].to_free == "del model"


def test_what_two_variables_share_is_counted_once():
    tensor = torch.zeros(5 * MB)
    found = held({"first": tensor, "view": tensor[10:], "again": {"x": tensor}})
    assert [name for name, row in found.items() if row.kind == "variable"] == ["first"]


def test_the_last_error_is_held_and_let_go(monkeypatch):
    """A failed cell's frames keep what it had made; on a GPU that is how memory leaks."""

    def cell():
        big = torch.ones(30 * MB)
        raise ValueError(len(big))

    try:
        cell()
    except ValueError as error:
        monkeypatch.setattr(sys, "last_traceback", error.__traceback__, raising=False)
        monkeypatch.setattr(sys, "last_value", error, raising=False)
        monkeypatch.setattr(sys, "last_exc", error, raising=False)
    found = held({})["the last error"]
    assert found.num_bytes == 120 * MB
    assert found.to_free == "%tune gpu --free"
    look = holding.look({}, free=True)
    assert look.freed_bytes > 100 * MB
    assert "the last error" not in {row.name for row in look.held}
    assert sys.last_traceback is None


def test_a_run_that_trains_is_named_with_how_to_stop_it(make_run, monkeypatch):
    from tune_magic.storage.folder import RunFolder
    from tune_magic.storage.lock import Holder

    run = make_run()
    chat = run.path / "chats" / "20260101-000000-aaaa"
    chat.mkdir(parents=True)
    holders = {run.path: Holder(1), chat: Holder(2)}
    monkeypatch.setattr(holding.places, "folders", lambda: [run.path])
    monkeypatch.setattr(RunFolder, "holder", lambda self: holders[self.path])
    monkeypatch.setattr(holding, "_resident_bytes", lambda pid: {1: 3 * MB, 2: 2 * MB}.get(pid, 1))
    monkeypatch.setattr(holding, "_gpu_bytes", lambda: {1: 7 * MB})
    found, talk = (row for row in holding.look({}).held if row.kind == "run")
    assert (talk.name, talk.num_bytes, talk.to_free) == ("tiny_run, chat", 2 * MB, "close the chat")
    assert (found.name, found.num_bytes, found.gpu_bytes, found.to_free) == (
        "tiny_run", 3 * MB, 7 * MB, "%tune stop tiny_run",
    )  # fmt: skip


def test_the_card_shows_everything_and_runs_nothing(monkeypatch):
    evil = "<script>alert(1)</script>"
    monkeypatch.setattr(holding, "_programs", lambda: [holding.Held(evil, "program", 300 * MB, 5 * MB)])
    card = holding.look({"array": np.zeros(2 * MB)}, free=True).card()
    text = Page(card["text/html"]).text
    for part in ("this kernel", "machine", "array", "del array", "16.0 MB", "5.0 MB", "were given back", "GPU"):
        assert part in text
    assert "<script>" not in card["text/html"]
    assert "variable array: 16.0 MB" in card["text/plain"]


def test_it_is_a_verb_of_kernel_and_terminal(capsys):
    shell = types.SimpleNamespace(user_ns={"array": np.zeros(2 * MB)})
    verbs.run(shell, "tune", "gpu --free", None)
    shown = capsys.readouterr().out
    assert "variable array" in shown
    assert "were given back" in shown
    command = commands.COMMANDS["tune gpu"]
    verbs.do_verb("gpu", commands.parse(command, ""), None)
    assert "machine: " in capsys.readouterr().out
    with pytest.raises(BadUsage, match="notebook"):
        verbs.do_verb("gpu", commands.parse(command, "--free"), None)


def test_programs_are_the_largest_and_not_ours():
    found = [row for row in holding.look({}).held if row.kind == "program"]
    assert len(found) <= 5
    assert not any(f"({holding.os.getpid()})" in row.name for row in found)


def test_containers_that_hold_themselves_are_counted_once():
    """`Out` does, once a cell has shown it."""
    out = {1: np.zeros(2 * MB)}
    out[2] = out
    ring = [out]
    ring.append(ring)
    found = held({"Out": out, "ring": ring})
    assert {name: row.num_bytes for name, row in found.items() if row.kind == "variable"} == {"Out": 16 * MB}


@pytest.mark.parametrize("ends", ["finished", "failed"])
def test_a_run_in_this_process_lets_its_model_go(train, monkeypatch, ends):
    import gc

    from peft import PeftModel

    from tune_magic.objectives.sft import SFT

    def alive():
        return sum(issubclass(type(thing), PeftModel) for thing in gc.get_objects())

    def fail(self, states):
        raise RuntimeError("boom")

    before = alive()
    if ends == "failed":
        monkeypatch.setattr(SFT, "loss_sum", fail)
    gc.disable()  # nobody else collects meanwhile
    try:
        run = train(max_steps=1)
        assert run.status == ends
        assert alive() == before
    finally:
        gc.enable()
