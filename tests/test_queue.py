"""The line before a device: one run trains, the others wait their turn, and nothing that died stands in the way."""

import time
from pathlib import Path

import pytest

from tune_magic import api, launching
from tune_magic.errors import TuneError
from tune_magic.executors import local
from tune_magic.recipe.build import build_launch, build_recipe
from tune_magic.storage import queue
from tune_magic.storage.control import Control, StopRequested
from tune_magic.storage.events import EventLog
from tune_magic.storage.lock import Lock
from tune_magic.storage.queue import Line
from tune_magic.view import frame, words


@pytest.fixture
def at_work(make_run):
    """Make runs that this process works on: their locks are held and their logs say so, until the test ends."""
    locks = []

    def make(state="running", *events):
        run = make_run()
        locks.append(Lock(run.path / "owner.lock"))
        with EventLog(run.path / "events.jsonl") as log:
            for kind, fields in events:
                log.append(kind, **fields)
            log.append("state", state=state)
        run.lock = locks[-1]
        return run

    yield make
    for lock in locks:
        lock.release()


def say(run, state):
    with EventLog(run.path / "events.jsonl", attempt=1) as log:
        log.append("state", state=state)


def test_the_line_is_kept_in_the_order_of_coming(at_work):
    line = Line("cpu")
    runs = [at_work() for _ in range(3)]
    tickets = [line.join(run) for run in runs]
    assert [[r.id for r in line.ahead_of(t)] for t in tickets] == [[], [runs[0].id], [runs[0].id, runs[1].id]]
    line.leave(tickets[0])
    assert [r.id for r in Line("cpu").ahead_of(tickets[2])] == [runs[1].id]  # another process sees the same
    assert Line("cuda-0").ahead_of(tickets[2]) == []  # another device has a line of its own


def test_a_clock_that_goes_back_changes_no_order(at_work, monkeypatch):
    line = Line("cpu")
    first, second = at_work(), at_work()
    before = line.join(first)
    monkeypatch.setattr(queue.time, "time_ns", lambda: 1)
    assert line.join(second) > before


def test_who_died_or_ended_or_paused_is_not_waited_for(at_work):
    line = Line("cpu")
    died, ended, paused, mine = (at_work() for _ in range(4))
    tickets = [line.join(run) for run in (died, ended, paused, mine)]
    assert len(line.ahead_of(tickets[3])) == 3
    say(died, "running")
    died.lock.release()  # as the system does when a process is killed
    say(ended, "finished")
    say(paused, "paused")
    assert line.ahead_of(tickets[3]) == []
    assert not tickets[0].exists()  # swept by who looked
    say(paused, "running")
    assert [r.id for r in line.ahead_of(tickets[3])] == [paused.id]


def test_a_resumed_run_takes_its_place_anew(at_work):
    line = Line("cpu")
    again, other = at_work(), at_work()
    old = line.join(again)
    ticket = line.join(other)
    assert line.join(again) > ticket
    assert not old.exists()
    assert line.ahead_of(ticket) == []


def test_a_worker_that_comes_up_keeps_the_place_its_starter_took(make_run, at_work, monkeypatch):
    line = Line(queue.device_name())
    slow, quick = make_run(), at_work()
    queue.announce(slow.path)
    ticket = line.join(quick)
    assert [run.id for run in line.ahead_of(ticket)] == [slow.id]  # it has no worker yet
    with Lock(slow.path / "owner.lock"), EventLog(slow.path / "events.jsonl") as log:
        log.append("state", state="starting")
        assert [run.id for run in line.ahead_of(ticket)] == [slow.id]
        with queue.turn(slow, log, Control(slow.path, 1)):  # it is its turn, though its worker came later
            assert [run.id for run in line.ahead_of(ticket)] == [slow.id]
        assert line.ahead_of(ticket) == []
    queue.announce(slow.path)
    assert [run.id for run in line.ahead_of(line.join(quick))] == [slow.id]
    with EventLog(slow.path / "events.jsonl") as log:
        log.append("state", state="starting")  # it came up, and died
    assert line.ahead_of(line.ticket_of(quick)) == []
    queue.announce(slow.path)
    line.join(quick)
    now = queue.time.time()
    monkeypatch.setattr(queue.time, "time", lambda: now + 61)
    assert line.ahead_of(line.ticket_of(quick)) == []  # it never came up
    assert line.ticket_of(slow) is None


def test_other_jobs_take_no_ticket(make_run):
    job = make_run("plan")
    queue.announce(job.path)
    assert Line(queue.device_name()).ticket_of(job) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"run": 3}', b'{"run": "/nowhere"}'])
def test_a_ticket_that_says_nothing_is_removed(at_work, content):
    line = Line("cpu")
    mine = at_work()
    ticket = line.join(mine)
    bad = ticket.with_name(f"{1:020d}.json")
    bad.write_bytes(content)
    assert line.ahead_of(ticket) == []
    assert not bad.exists()


def test_where_no_line_can_be_kept_runs_start(at_work, monkeypatch, tmp_path):
    def fails(*_, **__):
        raise PermissionError("read-only")

    run = at_work()
    Line("cpu").join(at_work())
    monkeypatch.setattr(queue.files, "write_json", fails)
    with EventLog(run.path / "events.jsonl", attempt=1) as log, queue.turn(run, log, Control(run.path, 1)):
        pass
    assert run.summary().state == "running"


PLAN = ("plan", {"total_steps": 10, "eval_steps": 100})


def step(number):
    return "step", {"step": number, "seconds": 60.0, "loss": 1.0, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens": 9}


def test_waiting_is_told_with_place_and_expected_start(at_work, monkeypatch):
    head = at_work("running", PLAN, step(4))
    head.rename("head")
    mine = at_work("starting")
    line = Line(queue.device_name())
    line.join(head)
    mine.request("budget", until=time.time() + 60)
    control = Control(mine.path, 1)
    looks = []

    def sleep(seconds):
        looks.append(frame.line(mine, mine.summary().state))
        if len(looks) == 3:
            say(head, "finished")

    monkeypatch.setattr(queue.time, "sleep", sleep)
    monkeypatch.setattr(queue.time, "monotonic", iter(range(0, 1000, 5)).__next__)
    with EventLog(mine.path / "events.jsonl", attempt=1) as log, queue.turn(mine, log, control):
        assert mine.summary().state == "starting"
        assert len(list(line.folder.glob("[0-9]*"))) == 2
    assert len(list(line.folder.glob("[0-9]*"))) == 1  # mine is given back
    queued = [event for event in mine.events("state") if event["state"] == "queued"]
    assert len(queued) == 1  # what has not changed is not said again
    assert queued[0]["ahead"] == [{"id": head.id, "name": "head"}]
    assert queued[0]["expected"] == pytest.approx(time.time() + 360, abs=20)
    assert (
        looks[0]
        == looks[2]
        == f"tiny_run: queued · 2nd in line, after head · starts about {words.clock(queued[0]['expected'])}"
    )
    waited = next(event["waited_s"] for event in mine.events("state") if "waited_s" in event)
    assert control.budget_s() == pytest.approx(60 + waited, abs=10)  # waiting is not on its account
    assert waited > 10


def test_an_unknown_wait_is_no_promise(at_work):
    news = queue._expectation([at_work("running", PLAN, step(4)), at_work("starting")])
    assert news["at_least"]
    assert queue._expectation([at_work("starting")])["expected"] is None


def test_a_stop_reaches_a_run_in_the_line(at_work):
    Line(queue.device_name()).join(at_work())
    mine = at_work("starting")
    mine.request("stop")
    log = EventLog(mine.path / "events.jsonl", attempt=1)
    with log, pytest.raises(StopRequested), queue.turn(mine, log, Control(mine.path, 1)):
        pytest.fail("it was not its turn")


@pytest.mark.parametrize(("visible", "count", "name"), [
    (None, 0, "cpu"), (None, 2, "cuda-0"), ("", 2, "cpu"), ("-1", 2, "cpu"), ("1,0", 2, "cuda-1"), ("GPU-7f", 1, "cuda-GPU-7f"),
])  # fmt: skip
def test_devices_are_told_apart_without_torch(monkeypatch, visible, count, name):
    import pynvml

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for call, answer in (("nvmlInit", None), ("nvmlShutdown", None), ("nvmlDeviceGetCount", count)):
        monkeypatch.setattr(pynvml, call, lambda answer=answer: answer)
    assert queue.device_name() == name


def test_real_runs_wait_skip_the_line_and_let_others_pass(recipe, tmp_path, monkeypatch, wait_for):
    monkeypatch.chdir(tmp_path)

    def start(name, steps, **flags):
        built = build_recipe(recipe | {"max_steps": steps, "eval": {"steps": 100_000, "samples": 0}})
        run, _ = api.begin(built, build_launch(flags), name=name)
        return run

    runs = []
    try:
        first = start("first", 1_000_000)
        runs.append(first)
        wait_for(first, lambda e: e["type"] == "step")
        second, third = start("second", 1_000_001), start("third", 3)
        runs += [second, third]
        wait_for(third, lambda e: e.get("state") == "queued" and len(e["ahead"]) == 2)
        wait_for(second, lambda e: e.get("state") == "queued")
        assert second.status == third.status == "queued"
        assert "3rd in line, after first and 1 more" in frame.line(third, third.status)
        assert "torch" not in maps_of(third)  # a run that waits holds no memory to speak of

        assert api.begin(build_recipe(third.recipe), build_launch({"now": True}))[1] == launching.ATTACHED
        assert third.wait(60).status == "finished"
        assert second.status == "queued"

        first.pause()
        paused_at = wait_for(first, lambda e: e.get("state") == "paused")["seq"]
        wait_for(second, lambda e: e["type"] == "step")
        assert first.status == "paused"
        assert start("fourth", 3, now=True).wait(60).status == "finished"

        second.stop()
        assert second.wait(60).status == "stopped"
        first.resume()
        wait_for(first, lambda e: e.get("state") == "running" and e["seq"] > paused_at)
        second.resume()
        wait_for(second, lambda e: e["attempt"] == 2 and e.get("state") == "queued")
        first.kill()
        wait_for(second, lambda e: e["attempt"] == 2 and e["type"] == "step", 30)  # the dead are not waited for
        with pytest.raises(TuneError, match="second is running"):
            second.resume()
    finally:
        for run in runs:
            run.kill()
            local.reap()


def maps_of(run):
    """Return what a run's worker has loaded; nothing where the system does not tell."""
    path = Path(f"/proc/{run.holder().pid}/maps")
    return path.read_text() if path.exists() else ""
