"""States, locks and run folders: dead runs are never shown as running (F18, F25, F26)."""

import json
import subprocess
import sys
import time

import pytest

from tune_magic.errors import LockedError, TuneError
from tune_magic.handles import Run
from tune_magic.recipe import build_recipe
from tune_magic.storage import folder, lock, places
from tune_magic.storage.events import EventLog
from tune_magic.storage.folder import RunFolder
from tune_magic.storage.state import STATES, TABLE, TERMINAL, derive


@pytest.mark.parametrize(
    ("last", "held", "age_s", "damaged", "state"),
    [
        (None, False, 1, False, "starting"),
        (None, False, 999, False, "lost"),
        (None, True, 999, False, "starting"),
        ("starting", True, 1, False, "starting"),
        ("starting", False, 1, False, "lost"),
        ("running", True, 1, False, "running"),
        ("running", False, 1, False, "lost"),
        ("paused", True, 1, False, "paused"),
        ("stopping", True, 1, False, "stopping"),
        ("stopping", False, 1, False, "lost"),
        ("stopped", True, 1, False, "stopped"),
        ("stopped", False, 1, False, "stopped"),
        ("finished", False, 1, False, "finished"),
        ("failed", False, 1, False, "failed"),
        ("finished", False, 1, True, "damaged"),
        ("running", True, 1, True, "running"),
    ],
)
def test_the_table(last, held, age_s, damaged, state):
    assert derive(last, lock_held=held, age_s=age_s, damaged=damaged) == state


def test_every_state_of_the_table_is_published():
    assert {state for pair in TABLE.values() for state in pair} <= set(STATES)
    assert set(STATES) >= TERMINAL


HOLD = """
import sys, time
from pathlib import Path
from tune_magic.storage.lock import Lock
from tune_magic.storage.events import EventLog
path = Path(sys.argv[1])
lock = Lock(path / "owner.lock")
EventLog(path / "events.jsonl").append("state", state="running")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(make_run):
    run = make_run()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield run, process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_f18_a_killed_worker_is_lost_at_once(holder):
    run, process = holder
    assert run.status == "running"
    assert run.holder().pid == process.pid
    process.kill()
    process.wait()
    started = time.monotonic()
    assert run.status == "lost"
    assert time.monotonic() - started < 2
    assert "%tune resume" in run.card()["text/plain"]


def test_f26_a_second_worker_is_refused_and_told_who_holds_it(holder):
    run, process = holder
    with pytest.raises(LockedError, match=str(process.pid)):
        lock.Lock(run.path / "owner.lock")
    assert run.status == "running"  # the refused one did not drop the lock


def test_looking_at_a_lock_of_ones_own_does_not_drop_it(make_run):
    run = make_run()
    path = run.path / "owner.lock"
    with lock.Lock(path):
        assert lock.holder(path) is not None
        probe = (
            f"from tune_magic.storage.lock import holder; from pathlib import Path; print(holder(Path({str(path)!r})))"
        )
        seen = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
        assert "Holder" in seen
        with pytest.raises(LockedError, match="already"):
            lock.Lock(path)
    assert lock.holder(path) is None


TRAIN = """
import sys, time, tune_magic
time.sleep(max(0.0, float(sys.argv[3]) - time.time()))
run = tune_magic.finetune(model=sys.argv[1], data=sys.argv[2], max_steps=3, batch_size=4, eval={"samples": 0},
                          executor="inline", fresh=True, name="same")
print(run.id)
"""


def test_f25_processes_that_start_together_never_touch_each_other(tmp_path, tiny, data_file, full):
    count = 8 if full else 4
    command = [sys.executable, "-c", TRAIN, str(tiny), str(data_file), str(time.time() + 8)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) for _ in range(count)]
    names = {process.communicate()[0].strip().split("\n")[-1] for process in processes}
    assert len(names) == count
    runs = [Run(tmp_path / "tune_runs" / name) for name in names]
    assert sorted(p.name for p in (tmp_path / "tune_runs").iterdir()) == sorted(names)
    assert {run.status for run in runs} == {"finished"}
    assert len({tuple(run.history["loss"]) for run in runs}) == 1  # the same recipe, to the bit
    assert all(3 in run.checkpoints for run in runs)


def test_f25_the_same_moment_and_the_same_letters_get_another_folder(tmp_path, monkeypatch):
    letters = iter("aaaabb")
    monkeypatch.setattr(folder.secrets, "choice", lambda _: next(letters))
    monkeypatch.setattr(folder, "datetime", FrozenClock)
    first = folder.create(tmp_path, "finetune", {"name": "one"})
    second = folder.create(tmp_path, "finetune", {"name": "two"})
    assert first.name[-2:] == "aa"
    assert second.name[-2:] == "bb"
    assert json.loads((first / "run.json").read_text())["name"] == "one"


class FrozenClock(folder.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 1, tzinfo=tz)


def test_a_run_folder_is_its_owners_alone(make_run):
    assert make_run().path.stat().st_mode & 0o777 == 0o700


def test_a_newer_format_is_named_not_guessed(make_run):
    run = make_run()
    path = run.path / "run.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(TuneError, match="newer tune_magic"):
        RunFolder(run.path).info  # noqa: B018


def test_a_request_for_an_earlier_attempt_is_stale(make_run):
    from tune_magic.storage.control import Control, StopRequested

    run = make_run()
    with EventLog(run.path / "events.jsonl") as log:
        log.append("state", state="running")
    run.request("stop")
    Control(run.path, attempt=2).check()
    with pytest.raises(StopRequested):
        Control(run.path, attempt=1).check()


def test_runs_are_found_by_id_name_path_and_near_names(make_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run()
    for reference in (run.id, run.id[:15], "tiny_run", str(run.path)):
        assert places.find(reference) == run.path
    with pytest.raises(TuneError, match="tiny_run"):
        places.find("tiny_rum")


def test_a_moved_folder_is_found_through_the_list_of_roots(make_run, tmp_path, monkeypatch):
    run = make_run()
    places.remember_root(run.path.parent)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert places.find("tiny_run") == run.path


def test_given_recipes_come_back_from_the_folder(make_run, recipe):
    assert build_recipe(make_run().info["recipe"]) == build_recipe(recipe)
