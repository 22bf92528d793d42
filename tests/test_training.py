"""The loop: exact resume, honest loss, guarded updates (fault matrix F5, F6, F16, F18, F19)."""

import itertools
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch

from tune_magic.errors import RunFailed, Stopped, TuneError
from tune_magic.executors import local
from tune_magic.storage.control import Control, StopRequested
from tune_magic.storage.events import number
from tune_magic.training import checkpoint
from tune_magic.training.engine import TokenEngine
from tune_magic.training.loop import Loop
from tune_magic.training.optimizer import learning_rate
from tune_magic.training.order import Order

SHORT = {"microbatch_tokens": 100, "eval": {"steps": 5, "samples": 0}}


def losses(run):
    summary = run.summary()
    trained = {step: event["loss"] for step, event in summary.steps.items()}
    return trained, {step: event["loss"] for step, event in summary.evaluations.items()}


def weights(run):
    from safetensors.torch import load_file

    last = run.checkpoints[max(run.checkpoints)]
    return load_file(last / "trainable.safetensors") | load_file(last / "optimizer.safetensors")


def assert_same(run, whole):
    assert losses(run) == losses(whole)
    ours, theirs = weights(run), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    seqs = [event["seq"] for event in run.events()]
    assert seqs == list(range(len(seqs)))


def stop_and_resume(run, monkeypatch, n):
    """Stop a run at the worker's n-th look at the control folder, and let it go on."""
    with monkeypatch.context() as patch:
        StopAt(patch, n)
        local.start(run.path, "inline")
    assert run.status == "stopped"
    run.resume("inline")
    assert run.status == "finished"


class StopAt:
    """Stops the worker at its n-th look at the control folder: in a step, between microbatches, in an evaluation."""

    def __init__(self, monkeypatch, n):
        self.count, self.n, real = 0, n, Control.check

        def check(control, done=0, total=0):
            self.count += 1
            if self.count == self.n:
                raise StopRequested
            real(control, done, total)

        monkeypatch.setattr(Control, "check", check)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", [{"name": "lora", "r": 4, "lora_dropout": 0.2}, {"name": "full"}])
def test_f5_f6_stopped_anywhere_a_run_ends_as_if_unbroken(train, make_run, monkeypatch, full, method):
    with monkeypatch.context() as patch:
        counter = StopAt(patch, n=-1)
        whole = train(method=method, **SHORT)
    assert whole.status == "finished"
    assert counter.count > 40
    steps_seen = set()
    for n in range(1, counter.count + 1, 1 if full else 7):
        run = make_run(method=method, **SHORT)
        with monkeypatch.context() as patch:
            StopAt(patch, n)
            local.start(run.path, "inline")
        assert run.status == "stopped"
        steps_seen.add(run.summary().step)
        assert max(run.checkpoints, default=0) == run.summary().step
        run.resume("inline")
        assert run.status == "finished"
        assert_same(run, whole)
    assert len(steps_seen) >= (12 if full else 6)


def test_f4_killed_at_any_step_a_run_ends_as_if_unbroken(train, make_run, monkeypatch, full):
    """A kill leaves no last checkpoint and no last state: only what was on disk."""

    class Killed(BaseException):
        pass

    whole = train(**SHORT)
    for step in range(2, 13, 1 if full else 4):
        run = make_run(**SHORT)
        real = Loop._note_memory

        def die(loop, step=step, real=real):
            real(loop)
            if loop.progress.step == step:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(Loop, "_note_memory", die)
            with pytest.raises(Killed):
                local.start(run.path, "inline")
        assert run.status == "lost"
        assert max(run.checkpoints, default=0) == 5 * ((step - 1) // 5)
        run.resume("inline")
        assert_same(run, whole)


def test_f4_a_real_kill_is_lost_and_resumes_exactly(train, make_run, wait_for):
    long = {"max_steps": 400, "eval": {"steps": 100, "samples": 0}, "save_steps": 20}
    whole = train(**long)
    run = make_run(**long)
    local.start(run.path)
    wait_for(run, lambda e: e["type"] == "checkpoint" and e["step"] >= 40)
    assert run.kill()
    run.wait(timeout_s=10)
    assert run.status == "lost"
    with pytest.raises(RunFailed, match=r"killed.*%tune resume"):
        run.raise_for_state()
    run.resume().wait(timeout_s=120)
    assert run.status == "finished"
    assert_same(run, whole)


def test_the_loss_does_not_depend_on_microbatches_or_sharing(train):
    reference, _ = losses(train())
    for changes in ({"microbatch_tokens": 80}, {"share_prefixes": False}, {"microbatch_tokens": 16}):
        found, _ = losses(train(**changes))
        assert found.keys() == reference.keys()
        for step, loss in reference.items():
            assert found[step] == pytest.approx(loss, abs=1e-5)


def test_the_loss_is_the_mean_over_trained_tokens_of_transformers_own_forward(train, tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = train(max_steps=1, batch_size=4, method={"name": "full"})
    model = AutoModelForCausalLM.from_pretrained(tiny)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    lines = [json.loads(line) for line in Path(run.recipe["data"]["train"]).read_text().splitlines()]
    plan = run.summary().plan
    from tune_magic.data.split import split

    rows = split(len(lines), 0.25, plan["recipe"]["seed"])[0]
    total = count = 0.0
    for index in Order(len(rows), 4, plan["recipe"]["seed"]).rows(1):
        messages = lines[rows[index]]["messages"]
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([tokenizer(prompt + messages[-1]["content"] + "<|im_end|>")["input_ids"]])
        labels = ids.clone()
        labels[:, :start] = -100
        trained = ids.shape[1] - start
        total += float(model(ids, labels=labels).loss.detach()) * trained
        count += trained
    assert number(run.summary().steps[1]["loss"]) == pytest.approx(total / count, abs=1e-5)


def test_a_run_learns_and_keeps_its_best(train):
    run = train(max_steps=40, eval={"steps": 10, "samples": 1, "max_new_tokens": 4})
    summary = run.summary()
    assert run.metrics["held_out_loss"] < run.metrics["base_held_out_loss"] - 0.2
    assert set(summary.evaluations) == {0, 10, 20, 30, 40}
    assert run.best_checkpoint.name == f"step-{summary.best['step']}"
    assert set(run.checkpoints) == {summary.best["step"], 40}
    assert set(summary.samples) >= {0}
    assert len(run.history) == 40
    assert run.history["step"].tolist() == list(range(1, 41))


def test_early_stopping_stops_and_resume_does_not_undo_it(train):
    run = train(learning_rate=1.0, max_steps=200, eval={"steps": 2, "early_stopping_patience": 2, "samples": 0})
    summary = run.summary()
    assert run.status == "finished"
    assert summary.step < 200
    best = summary.best["step"]
    assert summary.step == best + 4


@pytest.mark.sampled(3)
@pytest.mark.parametrize("phase", ["step", "eval", "save"])
def test_f16_sigterm_saves_and_ends_cleanly(make_run, wait_for, phase):
    settings = {
        "step": {"eval": {"steps": 10**6, "samples": 0}},
        "eval": {"eval": {"steps": 1, "samples": 0}, "save_steps": 10**6, "microbatch_tokens": 16},
        "save": {"save_steps": 1, "eval": {"steps": 10**6, "samples": 0}},
    }[phase]
    run = make_run(max_steps=10**6, **settings)
    local.start(run.path)
    event = wait_for(run, lambda e: e["type"] == {"save": "checkpoint"}.get(phase, phase) and e["step"] > 3)
    os.kill(run.holder().pid, signal.SIGTERM)
    run.wait(timeout_s=30)
    assert run.status == "stopped"
    assert local.exit_code(run.path) == 0
    step = run.summary().step
    assert event["step"] <= step
    assert max(run.checkpoints) == step
    checkpoint.verify(run.checkpoints[step])
    with pytest.raises(Stopped, match=f"step {step}"):
        run.raise_for_state()


def test_f15_a_stop_file_ends_within_a_step_and_handlers_come_back(make_run, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    run = make_run()
    real = Loop._note_memory

    def ask(loop):
        real(loop)
        if loop.progress.step == 6:
            run.request("stop")

    monkeypatch.setattr(Loop, "_note_memory", ask)
    local.start(run.path, "inline")
    assert run.status == "stopped"
    assert run.summary().step == 6
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_pause_waits_and_a_checkpoint_is_made_on_request(make_run, wait_for):
    run = make_run(max_steps=10**6, eval={"steps": 10**6, "samples": 0})
    local.start(run.path)
    wait_for(run, lambda e: e["type"] == "step")
    run.checkpoint()
    wait_for(run, lambda e: e["type"] == "checkpoint")
    run.pause()
    wait_for(run, lambda e: e.get("state") == "paused")
    step = run.summary().step
    assert run.status == "paused"
    run.resume()
    wait_for(run, lambda e: e["type"] == "step" and e["step"] > step)
    run.stop()
    run.wait(timeout_s=30)
    assert run.status == "stopped"


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_f19_a_number_that_is_none_never_reaches_the_weights(make_run, monkeypatch, what):
    from tune_magic.objectives.sft import SFT

    real = SFT.loss_sum
    calls = {"n": 0}

    def poisoned(self, states):
        loss = real(self, states)
        if torch.is_grad_enabled() and states.states.requires_grad:
            calls["n"] += 1
            if calls["n"] == 2 + 4:  # the self-check looks twice
                loss = loss * float("nan") if what == "loss" else loss + (states.states.sum() * 0).sqrt()
        return loss

    run = make_run()
    monkeypatch.setattr(SFT, "loss_sum", poisoned)
    local.start(run.path, "inline")
    assert run.status == "failed"
    warning = next(run.events("warning"))
    assert warning["kind"] == "non_finite"
    stopped_at = warning["step"]
    assert run.summary().step == stopped_at - 1
    assert len(warning["rows"]) == 4
    last = run.checkpoints[max(run.checkpoints)]
    assert last.name == f"step-{stopped_at - 1}"
    assert all(torch.isfinite(t).all() for t in weights(run).values())
    assert math.isfinite(run.metrics["train_loss"])
    with pytest.raises(RunFailed, match="not finite"):
        run.raise_for_state()
    monkeypatch.undo()
    run.resume("inline")
    assert run.status == "finished"  # the fault has gone, the run goes on


def test_f11_a_damaged_checkpoint_is_named_and_the_one_before_is_used(train, make_run, monkeypatch):
    long = {"max_steps": 20, "save_steps": 2, "eval": {"steps": 10, "samples": 0}}
    whole = train(**long)
    run = make_run(**long)
    real = Loop._note_memory

    def ask(loop):
        real(loop)
        if loop.progress.step == 7:
            run.request("stop")

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_note_memory", ask)
        local.start(run.path, "inline")
    assert list(run.checkpoints) == [6, 7]
    member = run.checkpoints[7] / "optimizer.safetensors"
    data = bytearray(member.read_bytes())
    data[len(data) // 2] ^= 1
    member.write_bytes(bytes(data))
    run.resume("inline")
    rejected = next(run.events("checkpoint_rejected"))
    assert rejected["step"] == 7
    assert "optimizer.safetensors" in rejected["message"]
    assert_same(run, whole)


def test_f10_a_full_disk_costs_a_checkpoint_not_the_run(train, monkeypatch):
    real = checkpoint.save

    def save(folder, model, optimizer, progress, random_state, **rest):
        if progress.step == 8:
            raise OSError(28, "No space left on device")
        return real(folder, model, optimizer, progress, random_state, **rest)

    monkeypatch.setattr(checkpoint, "save", save)
    run = train(eval={"steps": 4, "samples": 0})
    assert run.status == "finished"
    warning = next(run.events("warning"))
    assert (warning["kind"], warning["step"]) == ("checkpoint_failed", 8)
    assert "No space left" in run.card()["text/plain"]
    assert 12 in run.checkpoints


def test_a_run_without_its_last_checkpoint_is_not_finished(train, monkeypatch):
    def full(*args, **keywords):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        run = train()
    assert run.status == "failed"
    run.resume("inline")
    assert run.status == "finished"
    assert run.best_checkpoint.exists()


def test_the_best_is_the_lowest_whatever_the_threshold(make_run):
    from tune_magic.storage.events import EventLog

    run = make_run()
    with EventLog(run.path / "events.jsonl") as log:
        for step, loss in ((0, 9.0), (4, 2.0), (8, 1.95), (12, 4.5)):
            log.append("eval", step=step, loss=loss, seconds=0.1)
    for name in ("step-4", "step-12", "step-12.bak"):
        (run.path / "checkpoints" / name).mkdir()
        (run.path / "checkpoints" / name / "manifest.json").touch()
    assert list(run.checkpoints) == [4, 12]
    assert run.best_checkpoint.name == "step-4"  # of those that exist, not the newest


def test_f28_a_folder_beside_the_notebook_runs_no_code_in_the_worker(make_run, tmp_path, monkeypatch):
    import json as js

    (tmp_path / "torch.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    run = make_run(max_steps=1)
    info = js.loads((run.path / "run.json").read_text()) | {"cwd": str(tmp_path)}
    (run.path / "run.json").write_text(js.dumps(info))
    local.start(run.path)
    run.wait(timeout_s=60)
    assert run.status == "finished"
    assert not (tmp_path / "canary").exists()


def test_padded_microbatches_count_their_padding():
    from test_engine import example

    from tune_magic.training import packing

    examples = [example(i, length=length) for i, length in enumerate((4, 4, 4, 40, 4, 4))]
    cut = list(packing.padded_groups(examples, 60))
    assert [e for group in cut for e in group] == examples
    assert all(len(group) == 1 or len(group) * max(map(len, group)) <= 60 for group in cut)


def test_a_worker_that_cannot_start_is_told_at_once(make_run, monkeypatch):
    run = make_run()
    monkeypatch.setattr("sys.executable", "/bin/false")
    local.start(run.path)
    run.wait(timeout_s=30)
    assert run.status == "lost"
    with pytest.raises(RunFailed, match=r"did not start.*log"):
        run.raise_for_state()


def test_f7_changed_data_is_refused_with_the_difference(train, data_file, monkeypatch):
    run = train(max_steps=4)
    log = run.path / "events.jsonl"
    log.write_bytes(b"\n".join(log.read_bytes().split(b"\n")[:-2]) + b"\n")  # as if it had been lost before its end
    data_file.write_text(data_file.read_text() + "\n" + data_file.read_text().split("\n")[0] + "\n")
    assert run.status == "lost"
    for _ in range(2):  # asking again does not help
        run.resume("inline")
        with pytest.raises(RunFailed, match=r"fingerprints\.train was"):
            run.raise_for_state()


def test_bad_rows_are_named_before_the_model_is_loaded(make_run, data_file, monkeypatch):
    lines = data_file.read_text().splitlines()
    lines[4] = '{"messages": [{"role": "user"'
    lines[9] = '{"messages": []}'
    data_file.write_text("\n".join(lines))
    monkeypatch.setattr("tune_magic.training.prepare.build_model", lambda *a: pytest.fail("model was loaded"))
    run = make_run()
    local.start(run.path, "inline")
    with pytest.raises(RunFailed, match=r"(?s)rows\.jsonl: 2 bad rows.*line 5, column 30") as caught:
        run.raise_for_state()
    assert caught.value.run is run


def test_a_crash_of_the_worker_names_its_log(make_run, monkeypatch):
    run = make_run()
    monkeypatch.setattr("tune_magic.training.job.prepare", lambda *a, **k: 1 / 0)
    local.start(run.path, "inline")
    with pytest.raises(RunFailed, match="ZeroDivisionError") as caught:
        run.raise_for_state()
    assert caught.value.log == run.log


def test_a_finished_run_cannot_be_resumed(train):
    with pytest.raises(TuneError, match="nothing to resume"):
        train(max_steps=2).resume()


def test_the_order_is_a_pure_function_of_seed_and_epoch():
    order = Order(10, 4, seed=3)
    epochs = [[row for step in range(e * 3 + 1, e * 3 + 4) for row in order.rows(step)] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert Order(10, 4, seed=3).rows(5) == order.rows(5)
    assert Order(10, 4, seed=4).rows(1) != order.rows(1)


@pytest.mark.parametrize("ranks", [None, list(range(9))])
def test_no_step_has_fewer_rows_than_it_needs(ranks):
    order = Order(9, 4, seed=3, ranks=ranks, fewest=2)
    assert order.steps_per_epoch == 2
    for first in (1, 3):
        assert [len(order.rows(step)) for step in (first, first + 1)] == [4, 5]
        assert sorted([*order.rows(first), *order.rows(first + 1)]) == list(range(9))
    assert [len(Order(10, 4, seed=3, fewest=2).rows(step)) for step in (1, 2, 3)] == [4, 4, 2]
    assert [len(Order(9, 4, seed=3).rows(step)) for step in (1, 2, 3)] == [4, 4, 1]
    assert Order(1, 4, seed=3, fewest=2).rows(2) == [0]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]), ("constant", [0.5, 1.0, 1, 1, 1, 1])],
)
def test_the_learning_rate_by_step(recipe, schedule, expected):
    from tune_magic.recipe import build_recipe

    built = build_recipe(recipe | {"learning_rate": 1.0, "lr_scheduler_type": schedule, "warmup_steps": 2})
    assert [learning_rate(step, 6, built) for step in range(1, 7)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shape", "ours", "theirs"),
    [
        ("linear", {}, {}),
        ("cosine", {}, {}),
        ("cosine_with_restarts", {"num_cycles": 3}, {"num_cycles": 3}),
        ("polynomial", {"power": 2.0}, {"power": 2.0, "lr_end": 0.0}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}, {"min_lr_rate": 0.1}),
        ("inverse_sqrt", {}, {"timescale": 10}),
        ("warmup_stable_decay", {"decay_ratio": 0.2}, {"num_decay_steps": 18, "decay_type": "linear"}),
    ],
)
def test_schedules_are_those_of_transformers(recipe, shape, ours, theirs):
    from transformers import get_scheduler

    from tune_magic.recipe import build_recipe

    total, warmup = 100, 10
    name = shape.removesuffix("_with_min_lr")
    content = {"learning_rate": 1.0, "lr_scheduler_type": name, "warmup_steps": warmup, "lr_scheduler_kwargs": ours}
    built = build_recipe(recipe | content)
    found = [learning_rate(step, total, built) for step in range(1, total + 1)]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(
        shape, optimizer, num_warmup_steps=warmup, num_training_steps=total, scheduler_specific_kwargs=theirs
    )
    reference = []
    for _ in range(total):
        reference.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    # theirs spends its first step on a rate of nothing; ours is one step ahead while it rises
    assert found[:warmup] == pytest.approx([*reference[1:warmup], 1.0])
    assert found[warmup:] == pytest.approx(reference[warmup:])


@pytest.mark.parametrize("optim", ["sgd", "adafactor"])
def test_other_optimizers_learn_and_resume_exactly(train, make_run, monkeypatch, optim):
    # Adafactor's steps are in proportion to the parameters, so LoRA's zeros hardly move
    method = {"sgd": {"name": "lora", "r": 4}, "adafactor": {"name": "full"}}[optim]
    changes = {"optim": optim, "method": method, "learning_rate": {"sgd": 0.3, "adafactor": 0.1}[optim], **SHORT}
    whole = train(**changes)
    whole.raise_for_state()
    evaluations = whole.summary().evaluations
    assert min(evaluations[step]["loss"] for step in evaluations if step) < evaluations[0]["loss"] - 0.05
    run = make_run(**changes)
    stop_and_resume(run, monkeypatch, 14)
    assert_same(run, whole)


def test_cosine_falls_from_one_to_nearly_zero(recipe):
    from tune_magic.recipe import build_recipe

    built = build_recipe(recipe | {"learning_rate": 1.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.0})
    rates = [learning_rate(step, 100, built) for step in range(1, 101)]
    assert rates[0] == 1.0
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 0.001


def test_grouping_keeps_every_row_once_an_epoch_and_nothing_but_the_seed_decides():
    ranks = [number % 7 for number in range(500)]
    order = Order(500, 4, seed=1, ranks=ranks)
    epochs = [[order.rows(step) for step in range(e * 125 + 1, e * 125 + 126)] for e in range(2)]
    assert all(sorted(itertools.chain(*epoch)) == list(range(500)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert Order(500, 4, seed=1, ranks=ranks).rows(200) == epochs[1][74]
    kinds = [len({ranks[row] for row in rows}) for rows in epochs[0]]
    assert sum(kinds) / len(kinds) < 1.5  # of seven; drawn freely it would be more than three
    firsts = [ranks[rows[0]] for rows in epochs[0]]
    assert firsts != sorted(firsts)
    uneven = Order(10, 4, seed=3, ranks=list(range(10)))
    assert sorted(itertools.chain(*(uneven.rows(step) for step in (1, 2, 3)))) == list(range(10))
    assert len(uneven.rows(3)) == 2


def test_rows_that_begin_alike_meet_and_less_is_computed(train, write, monkeypatch):
    system = ["Answer in one word, and be quick about it.", "Reply to the customer in a full, polite sentence."]
    rows = [{"system": system[i % 2], "prompt": f"question {i}", "completion": f"answer {i}"} for i in range(40)]
    data = {"train": str(write("two.jsonl", "".join(json.dumps(row) + "\n" for row in rows))), "held_out": 0}
    sizes = {}
    for strategy in ("random", "group_by_prefix", "group_by_length"):
        computed, real = [], TokenEngine.compute

        def compute(engine, batch, examples, computed=computed, real=real):
            computed.append(batch.input_ids.size)
            return real(engine, batch, examples)

        with monkeypatch.context() as patch:
            patch.setattr(TokenEngine, "compute", compute)
            run = train(data=data, train_sampling_strategy=strategy, max_steps=10, microbatch_tokens=4096)
        run.raise_for_state()
        sizes[strategy] = sum(computed)
        tokens = sum(event["tokens"] for event in run.summary().steps.values())
        assert tokens == run.summary().plan["tokens_per_epoch"]
    assert sizes["group_by_prefix"] < 0.8 * sizes["random"]
