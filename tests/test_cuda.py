"""What only a GPU can show; skipped, visibly, where there is none (fault matrix F8, F22)."""

import pytest
import torch
from test_training import StopAt, losses, weights

from tune_magic.executors import local
from tune_magic.training import memory, prepare

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
ON_GPU = {"dtype": "float32", "eval": {"steps": 5, "samples": 0}}


@pytest.mark.parametrize("method", [{"name": "lora", "r": 4, "lora_dropout": 0.2}, {"name": "full"}])
def test_f8_a_resumed_run_ends_as_an_unbroken_one(train, make_run, monkeypatch, method):
    """Sums on a GPU may come in another order: within 1e-5, as docs/RELIABILITY.md says."""
    whole = train(method=method, **ON_GPU)
    assert whole.summary().plan["device"].startswith("cuda")
    run = make_run(method=method, **ON_GPU)
    with monkeypatch.context() as patch:
        StopAt(patch, 20)
        local.start(run.path, "inline")
    assert run.status == "stopped"
    run.resume("inline")
    for ours, theirs in zip(losses(run), losses(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    ours, theirs = weights(run), weights(whole)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_trees_are_flex_attention_and_give_what_the_cpu_gives(train, monkeypatch, compiled):
    ours = train(**ON_GPU, torch_compile=compiled)
    plan = ours.summary().plan
    assert (plan["attention"], plan["compiled"]) == ("flex", compiled), plan["engine_note"]
    monkeypatch.setattr(prepare, "device", lambda: torch.device("cpu"))
    for mine, theirs in zip(losses(ours), losses(train(**ON_GPU)), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)


def test_f22_the_allocators_own_refusal_halves_the_microbatch(train):
    """The real thing: the process may use too little of the GPU for the whole batch."""
    roomy = train(**ON_GPU, batch_size=16, microbatch_tokens=4096)
    held = torch.empty(memory.free(torch.device("cuda")) - (48 << 20), dtype=torch.uint8, device="cuda")
    try:
        run = train(**ON_GPU, batch_size=16, microbatch_tokens=4096)
    finally:
        del held
        memory.give_back()
    assert run.status == "finished"
    for ours, theirs in zip(losses(run), losses(roomy), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
