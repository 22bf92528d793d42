"""A time budget: the run ends inside it, scored and saved, and goes on exactly; pause and checkpoint on demand."""

import time

import pytest
from test_training import losses, weights

import tune_magic
from tune_magic.errors import RecipeError, TuneError
from tune_magic.executors import local
from tune_magic.recipe.build import build_launch
from tune_magic.recipe.launch import seconds_of
from tune_magic.training import loop
from tune_magic.training.budget import Budget

ENDLESS = {"max_steps": 100_000, "eval": {"steps": 50_000, "samples": 0}, "save_steps": 50_000}


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("1h30m", 5400), ("1.5h", 5400), ("2m 5s", 125)]
)
def test_times_are_read(text, seconds):
    assert seconds_of(text) == seconds
    assert build_launch({"budget": text}).budget == text


@pytest.mark.parametrize("text", ["", "10", "m", "10x", "-5m", "0s", "10m!", "1..5h", "5 minutes"])
def test_what_is_no_time_is_a_fault(text):
    with pytest.raises(RecipeError, match="90s, 10m or 1h30m"):
        build_launch({"budget": text})


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize("passes", [0, 1, 2])
@pytest.mark.parametrize(("step_s", "score_s", "save_s"), [(1, 4, 0.2), (0.01, 10, 2), (9, 1, 1), (3, 0, 5)])
def test_what_is_promised_is_kept(passes, step_s, score_s, save_s):
    clock = Clock()
    budget = Budget(100, held_out_tokens=1000, save_bytes=10**7, clock=clock)
    for _ in range(2):  # steps teach the speed; a scoring and a checkpoint on the way teach theirs
        clock.now += step_s
        budget.note_step(step_s, 100)
    clock.now += score_s + save_s
    budget.note_scoring(score_s)
    budget.note_save(save_s)
    ahead, taken = budget.steps_ahead(passes), 0
    while budget.pays_for_step(passes):
        clock.now += step_s
        budget.note_step(step_s, 100)
        taken += 1
    assert ahead - 2 <= taken <= ahead
    assert budget.pays_for_scoring(passes)
    clock.now += passes * score_s + save_s
    assert 0 < budget.left_s < 2 * step_s + 0.5 * (passes * score_s + save_s) + 3


def test_a_machine_that_slows_down_is_believed():
    clock = Clock()
    budget = Budget(60, held_out_tokens=0, save_bytes=0, clock=clock)
    step_s = 1.0
    while budget.pays_for_step(0):
        clock.now += step_s
        budget.note_step(step_s, 10)
        step_s *= 1.15
    assert budget.left_s > 0


def test_rows_that_would_take_most_of_the_time_are_not_scored():
    clock = Clock()
    budget = Budget(60, held_out_tokens=10**6, save_bytes=0, clock=clock)
    budget.note_step(1.0, 100)
    assert budget.pays_for_step(1)
    assert not budget.pays_for_scoring(1)


class Known(Budget):
    """A budget whose clock is moved by what the run does: a step or a scoring takes a second, a checkpoint half of one."""

    last = None

    def __init__(self, seconds, held_out_tokens, save_bytes):
        self.time = Clock()
        super().__init__(seconds, held_out_tokens, save_bytes, clock=self.time)
        type(self).last = self

    def note_step(self, seconds, tokens):
        self.time.now += 1.0
        super().note_step(1.0, tokens)

    def note_scoring(self, seconds):
        self.time.now += 1.0
        super().note_scoring(1.0)

    def note_save(self, seconds):
        self.time.now += 0.5
        super().note_save(0.5)


def test_a_run_ends_in_time_and_goes_on_exactly(make_run, train, monkeypatch):
    whole = train(max_steps=60, eval={"steps": 30, "samples": 0})
    run = make_run(**ENDLESS)
    run.limit("90s")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Budget", Known)
        local.start(run.path, "inline")
    assert 0 < Known.last.left_s < 5
    run.raise_for_state()  # nothing went wrong: the cells below go on
    summary = run.summary()
    assert run.status == "stopped"
    assert summary.outcome["reason"] == "budget"
    assert 10 < summary.step < 90
    assert max(run.checkpoints) == summary.step
    assert set(summary.evaluations) == {0, summary.step}
    (planned,) = run.events("budget")
    assert abs(planned["steps"] - summary.step) < 10
    assert "its time was up at step" in run.card()["text/plain"]
    assert "%tune resume" in run.card()["text/html"]

    short = make_run(max_steps=60, eval={"steps": 30, "samples": 0})
    short.limit("60s")  # more than it needs: it ends as any other
    local.start(short.path, "inline")
    assert short.status == "finished"
    assert losses(short) == losses(whole)


def test_real_seconds_are_kept(slow, make_run):
    run = make_run(**ENDLESS)
    started = time.monotonic()
    run.limit("10s")
    local.start(run.path, "inline")
    assert time.monotonic() - started < 10.0
    summary = run.summary()
    assert (run.status, summary.outcome["reason"]) == ("stopped", "budget")
    assert set(summary.evaluations) == {0, summary.step}
    assert max(run.checkpoints) == summary.step > 10


def test_a_budget_that_is_over_before_the_first_step_says_so(make_run):
    run = make_run(**ENDLESS)
    run.limit("0.001s")
    local.start(run.path, "inline")
    run.raise_for_state()
    assert (run.status, run.summary().step) == ("stopped", 0)
    assert "its time was up before the first step" in run.card()["text/plain"]
    assert "%tune resume" in run.card()["text/html"]


def test_a_budget_is_for_one_attempt(make_run, monkeypatch):
    run = make_run(max_steps=40, eval={"steps": 20, "samples": 0})
    with monkeypatch.context() as patch:
        patch.setattr(Budget, "pays_for_step", lambda budget, passes: budget.left_s > 0 and not budget._step_s)
        run.limit("30s")
        local.start(run.path, "inline")
    assert run.status == "stopped"
    assert run.summary().step == 1
    run.resume("inline")
    assert run.status == "finished"


def test_a_stop_by_time_changes_no_later_step(make_run, train, monkeypatch):
    changes = {
        "max_steps": 12,
        "eval": {"steps": 6, "samples": 0},
        "method": {"name": "lora", "r": 4, "lora_dropout": 0.2},
    }
    whole = train(**changes)
    run = make_run(**changes)
    for _ in range(20):
        if run.status == "finished":
            break
        count = iter(range(100))
        with monkeypatch.context() as patch:
            patch.setattr(Budget, "pays_for_step", lambda *_, count=count: next(count) < 5)
            if run.status == "stopped":
                run.resume("inline", "30s")
            else:
                run.limit("30s")
                local.start(run.path, "inline")
    assert run.summary().attempt > 2
    assert losses(run)[0] == losses(whole)[0]
    ours, theirs = weights(run), weights(whole)
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_the_same_cell_again_goes_on_with_a_new_budget(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(Budget, "pays_for_step", lambda budget, passes: not budget._step_s)
    keys = recipe | {"max_steps": 3, "eval": {"steps": 3, "samples": 0}}
    for step in (1, 2):
        run = tune_magic.finetune(keys, executor="inline", output=str(tmp_path / "out"), budget="1m")
        assert (run.status, run.summary().step) == ("stopped", step)
    run = tune_magic.finetune(keys, executor="inline", output=str(tmp_path / "out"))
    assert (run.status, run.summary().step) == ("finished", 3)


def test_pause_checkpoint_and_continue_from_a_line(make_run, wait_for, capsys):
    from tune_magic import commands
    from tune_magic.magics.verbs import do_verb

    run = make_run(max_steps=100_000, eval={"steps": 50_000, "samples": 0}, save_steps=50_000)

    def say(verb):
        do_verb(verb, commands.parse(commands.COMMANDS[f"tune {verb}"], ""), lambda name: type(run)(run.path))
        return capsys.readouterr().out

    local.start(run.path)
    wait_for(run, lambda e: e["type"] == "step")
    assert "saves after its current step" in say("checkpoint")
    saved = wait_for(run, lambda e: e["type"] == "checkpoint")
    assert "`%tune resume tiny_run`" in say("pause")
    paused = wait_for(run, lambda e: e["type"] == "state" and e["state"] == "paused")
    assert run.status == "paused"
    at = run.summary().step
    assert max(run.checkpoints) == at >= saved["step"]
    time.sleep(0.5)
    assert run.summary().step == at
    with pytest.raises(TuneError, match="keeps the time it was given"):
        run.resume(budget="1m")
    run.resume()
    wait_for(run, lambda e: e["type"] == "state" and e["state"] == "running" and e["seq"] > paused["seq"])
    wait_for(run, lambda e: e["type"] == "step" and e["step"] > at)
    run.stop()
    run.wait(timeout_s=30)
    assert run.status == "stopped"
    assert "tiny_run is stopped; nothing works on it" in say("pause")
