"""Faults injected for real: numbers that are none, full disks, strange plug-ins, hostile files, secrets, clocks."""

import errno
import json
import math
import os
import shutil
import signal
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tune_magic import files, plugins
from tune_magic import secrets as hidden
from tune_magic.errors import CheckpointError, ModelError, RunFailed, TuneError
from tune_magic.executors import local
from tune_magic.handles import Run
from tune_magic.storage import events
from tune_magic.storage.events import EventLog, EventReader
from tune_magic.storage.lock import Lock
from tune_magic.training import checkpoint
from tune_magic.training.loop import Loop

QUICK = {"max_steps": 6, "eval": {"steps": 2, "samples": 0}}
FORMATS = Path(__file__).parent / "formats"


# --- F20: a score that is no number ------------------------------------------------------------------------------------
@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_f20_a_score_that_is_no_number_is_shown_and_never_the_best(train, monkeypatch, score):
    real = Loop.held_out

    def held_out(loop, *tables):
        found = real(loop, *tables)
        return found | {"loss": score} if loop.progress.step == 4 else found

    monkeypatch.setattr(Loop, "held_out", held_out)
    run = train(**QUICK)
    assert run.status == "finished"
    (event,) = (e for e in run.events("eval") if e["step"] == 4)
    assert (event["loss"], event["best"]) == (str(score), False)
    for line in run.path.joinpath("events.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert run.summary().outcome["best_step"] in (2, 6)
    assert "finished" in run.card()["text/plain"]


# --- F23, F24: a full disk ---------------------------------------------------------------------------------------------
def test_f23_a_checkpoint_that_does_not_fit_is_said_with_its_size_and_the_run_goes_on(train, monkeypatch):
    usage, saves = shutil.disk_usage, iter(range(100))

    def full_at_first(path):
        found = usage(path)
        return found._replace(free=10_000_000) if next(saves) < 4 else found  # the first is asked for the plan

    monkeypatch.setattr(files.shutil, "disk_usage", full_at_first)
    run = train(**QUICK)
    assert run.status == "finished"
    warnings = [event for event in run.events("warning") if event["kind"] == "checkpoint_failed"]
    assert warnings
    assert all("67 MB are needed, 10 MB are free" in event["message"] for event in warnings)
    assert run.checkpoints
    for path in run.checkpoints.values():
        checkpoint.verify(path)
    assert not [path for path in (run.path / "checkpoints").iterdir() if path.name.startswith(".")]


class FullLog:
    """The log's disk is full from the n-th append on, for a few attempts; half a line gets through each time."""

    def __init__(self, monkeypatch, first, attempts, code=errno.ENOSPC):
        self.calls, self.refused, real = 0, 0, files.os.write

        def write(descriptor, data):
            if Path(f"/proc/self/fd/{descriptor}").readlink().name == "events.jsonl":
                self.calls += 1
                if self.calls >= first and self.refused < attempts:
                    self.refused += 1
                    if self.refused % 2:
                        return real(descriptor, bytes(data)[: len(data) // 2])  # the call after it fails
                    raise OSError(code, os.strerror(code))
            return real(descriptor, data)

        monkeypatch.setattr(files.os, "write", write)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the fault is injected by the name of a descriptor")
@pytest.mark.parametrize("first", [2, 5, 9])
def test_f24_a_full_log_makes_training_wait_and_nothing_is_lost_or_doubled(train, monkeypatch, first):
    whole = train(**QUICK)
    monkeypatch.setattr(events, "RETRY_S", 0.01)
    full = FullLog(monkeypatch, first, attempts=6)
    run = train(**QUICK)
    assert full.refused == 6
    assert run.status == "finished"
    assert [e["seq"] for e in run.events()] == list(range(len(list(run.events()))))
    steps, expected = run.summary().steps, whole.summary().steps
    assert [steps[n]["loss"] for n in steps] == [expected[n]["loss"] for n in expected]
    (warning,) = (e for e in run.events("warning") if e["kind"] == "disk_full")
    assert "waited" in warning["message"]
    reader = EventReader(run.path / "events.jsonl")
    assert len(list(reader.poll())) == reader.next_seq
    assert reader.damaged_line is None


def test_f24_another_fault_of_the_log_is_not_waited_for(tmp_path, monkeypatch):
    with EventLog(tmp_path / "events.jsonl") as log:
        log.append("step", step=1)
        full = FullLog(monkeypatch, first=1, attempts=100, code=errno.EIO)
        started = time.monotonic()
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            log.append("step", step=2)
        assert time.monotonic() - started < 5
        assert full.refused


# --- F27: plug-ins -----------------------------------------------------------------------------------------------------
TOY = """
import time
from tune_magic.methods.full import Full, FullOptions
class Options(FullOptions):
    name: str = "toy"
class Toy(Full):
    Options = Options
    {body}
"""
TOYS = {
    "broken": "raise ImportError('no such thing as a toy')",
    "raises": TOY.format(body="def apply(self, model, task): raise RuntimeError('toys break')"),
    "hangs": TOY.format(body="def to_training(self, model): time.sleep(3600)"),
    "first": TOY.format(body="merges = True"),
    "second": TOY.format(body="merges = False"),
}


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """Five strangers' packages are installed; two claim the same name."""
    for name, code in TOYS.items():
        (tmp_path / f"toy_{name}.py").write_text(code)
        info = tmp_path / f"toy_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: toy-{name}\nVersion: 1.0\n")
        claims = "toy" if name in ("first", "second") else f"toy_{name}"
        (info / "entry_points.txt").write_text(f"[{plugins.GROUP}]\nmethod.{claims} = toy_{name}:Toy\n")
    caches = (plugins._points, plugins._installed, plugins._clashes)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for cache in caches:
        cache.cache_clear()
    yield
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()
    for name in TOYS:
        sys.modules.pop(f"toy_{name}", None)


def test_f27_strange_plug_ins_break_nothing_but_themselves(toys, train):
    listed = {row.name: row for row in plugins.listing() if row.kind == "method"}
    assert "no such thing as a toy" in listed["toy_broken"].problem
    assert "toy-first" in listed["toy"].problem
    assert "toy-second" in listed["toy"].problem
    assert listed["lora"].problem is None
    with pytest.raises(TuneError, match=r"`toy_broken` of toy-broken cannot be imported"):
        plugins.get("method", "toy_broken")
    with pytest.raises(
        TuneError, match=r"`toy` exists twice: in toy-(first and in toy-second|second and in toy-first)"
    ):
        plugins.get("method", "toy")
    run = train(method={"name": "toy_raises"}, **QUICK)
    with pytest.raises(RunFailed, match=r"In the method `toy_raises` of toy-raises: RuntimeError: toys break"):
        run.raise_for_state()
    assert train(**QUICK).status == "finished"


def test_f27_a_plug_in_that_hangs_can_be_stopped(toys, make_run):
    run = make_run(method={"name": "toy_hangs"}, **QUICK)
    local.start(run.path)
    deadline = time.monotonic() + 60
    while run.holder() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    run.stop()  # nobody listens
    started = time.monotonic()
    assert run.kill()
    run.wait(timeout_s=10)
    assert time.monotonic() - started < 10
    assert run.status == "lost"


# --- F28: malicious files ----------------------------------------------------------------------------------------------
class Canary:
    """Sings when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("attack", ["weights", "auto_map", "both"])
def test_f28_a_models_files_run_no_code(train, tiny, tmp_path, attack):
    import pickle

    model, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(tiny, model)
    if attack != "auto_map":
        (model / "model.safetensors").unlink()
        (model / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    if attack != "weights":
        config = json.loads((model / "config.json").read_text())
        names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
        config |= {"auto_map": {name: f"evil.{name}" for name in names}, "trust_remote_code": True}
        (model / "config.json").write_text(json.dumps(config))
        (model / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    run = train(model=str(model), **QUICK)
    assert not canary.exists()
    assert run.status == ("finished" if attack == "auto_map" else "failed")


def test_f28_a_recipe_cannot_ask_for_trust(recipe):
    from tune_magic.recipe import build_recipe

    with pytest.raises(TuneError, match="trust_remote_code"):
        build_recipe(recipe | {"trust_remote_code": True})


def test_f28_a_checkpoint_with_a_pickle_in_it_is_refused(train, tmp_path):
    import pickle

    run = train(**QUICK)
    last, canary = run.checkpoints[max(run.checkpoints)], tmp_path / "canary"
    (last / "trainable.safetensors").write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises((CheckpointError, ModelError, TuneError)):
        Run(run.path).load()
    assert not canary.exists()


# --- F31: secrets ------------------------------------------------------------------------------------------------------
SECRETS = {
    "HF_TOKEN": "hf_" + "Ab1" * 11, "MY_API_KEY": "correct-horse-battery", "DB_PASSWORD": "staple-9000-x",
}  # fmt: skip
WRITTEN = ["sk-" + "a1B2" * 8, "ghp_" + "Zz9" * 12, "AKIA" + "ABCD1234" * 2, "hunter2:swordfish"]


def test_f31_no_secret_reaches_run_folder_card_or_export(train, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    every = [*SECRETS.values(), *WRITTEN]
    monkeypatch.setattr(
        Loop,
        "_note_memory",
        lambda loop: (_ for _ in ()).throw(
            RuntimeError(f"rejected: {' '.join(every[:-1])} at https://{every[-1]}@example.org")
        ),
    )
    failed = train(**QUICK)
    with pytest.raises(RunFailed) as told:
        failed.raise_for_state()
    monkeypatch.undo()
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    failed.path.joinpath("meta.json").unlink(missing_ok=True)
    files.write_json(failed.path / "meta.json", {"note": f"see https://{WRITTEN[3]}@example.org", "token": "short"})
    from tune_magic.storage import folder

    content = failed.info | {
        "recipe_text": f"# login: {every[0]}\nmodel: x",
        "link": {"source": f"key = '{WRITTEN[0]}'"},
    }
    folder.create(failed.path.parent, "finetune", {k: content[k] for k in ("name", "recipe", "recipe_text", "link")})
    found = failed.card()
    seen = found["text/html"] + found["text/plain"] + str(told.value)
    for path in failed.path.parent.rglob("*"):
        if path.is_file():
            seen += path.read_bytes().decode(errors="replace")
    assert hidden.HIDDEN in seen
    assert [secret for secret in every if secret in seen] == []
    assert '"token": "short"' not in seen


@pytest.mark.parametrize(
    "text",
    [
        "the token is short",
        "sk-learn",
        "max_new_tokens: 64",
        "https://example.org/a:b@c",
        "hf_hub",
        "risk-free-of-charge",
    ],
)
def test_ordinary_text_is_left_alone(text):
    assert hidden.hide(text) == text
    assert files.plain({"tokens": 7, "eos_token_id": 2, "token_ids": "5 6"}) == {
        "tokens": 7,
        "eos_token_id": 2,
        "token_ids": "5 6",
    }


def test_a_secret_is_known_from_the_moment_the_environment_has_it(monkeypatch):
    for value in ("first-of-two", "second-of-two"):
        monkeypatch.setenv("SOME_SERVICE_TOKEN", value)
        assert hidden.hide(f"it said {value}") == "it said [hidden]"
    monkeypatch.delenv("SOME_SERVICE_TOKEN")
    assert hidden.hide("it said second-of-two") == "it said second-of-two"


# --- F32: network ------------------------------------------------------------------------------------------------------
GUARD = """
import socket, sys
def refuse(*a, **k):
    open({note!r}, "a").write(f"{{a[1:]}} {{k}}\\n")
    raise OSError("the network is not to be used")
socket.socket.listen = socket.socket.bind = socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = refuse
from tune_magic import worker
worker.quiet_libraries()
sys.exit(worker.work(__import__("pathlib").Path({folder!r}), is_worker=True))
"""


def test_f32_a_run_uses_no_network_and_opens_no_port(make_run, tmp_path):
    import subprocess

    run, note = make_run(**QUICK), tmp_path / "calls"
    code = textwrap.dedent(GUARD).format(note=str(note), folder=str(run.path))
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert run.status == "finished"
    assert not note.exists(), note.read_text()


# --- F33: old formats --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "sample", sorted(path.name for path in FORMATS.iterdir() if path.is_dir() and path.name.isdigit())
)
def test_f33_every_format_that_was_released_opens(sample, tmp_path, tiny):
    shutil.copytree(FORMATS / sample, tmp_path / "run")
    run = Run(tmp_path / "run")
    assert run.status == "finished"
    assert run.summary().step == 2
    assert list(run.history["loss"].notna())
    assert "finished · 2 steps" in run.card()["text/html"]
    checkpoint.verify(run.best_checkpoint)
    assert run.recipe["method"]["r"] == 2

    with EventLog(run.path / "events.jsonl") as log:  # a later version's event and field
        log.append("vibes", good=True)
        log.append(
            "step", step=3, loss=1.0, learning_rate=1e-3, grad_norm=1.0, tokens=1, targets=1, seconds=0.1, mood="ok"
        )
    again = Run(run.path)
    assert again.summary().steps[3]["mood"] == "ok"
    assert next(again.events("vibes"))["good"]
    assert again.card()["text/html"]


# --- F34: floods, clocks, sleep ----------------------------------------------------------------------------------------
def test_f34_a_flood_of_events_is_two_frames_a_second(make_run, monkeypatch):
    from test_view import plan

    from tune_magic import follow

    class Screen:
        is_text = False

        def __init__(self):
            self.updates = 0

        def update(self, bundle):
            self.updates += 1

    run = make_run()
    screen = Screen()
    painter = follow.Painter(run, screen)
    with Lock(run.path / "owner.lock"), EventLog(run.path / "events.jsonl") as log:
        log.append("state", state="starting")
        log.append("plan", **plan(10_000, "x"))
        log.append("state", state="running", from_step=0)
        started = time.monotonic()
        step = 0
        while time.monotonic() - started < 1.6:
            for _ in range(20):
                step += 1
                log.append(
                    "step", step=step, epoch=0.1, loss=1.0, learning_rate=1e-3, grad_norm=1.0, tokens=9, seconds=0.01
                )
            painter.paint()
    assert step > 1000
    assert 1 <= screen.updates <= 2 * 1.6 + 1


def test_f34_a_clock_that_is_set_back_changes_no_duration_and_no_state(make_run, monkeypatch):
    run, real, offset = make_run(**QUICK), time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + offset[0])
    seen = Loop._note_memory

    def back(loop):
        seen(loop)
        offset[0] -= 3600

    monkeypatch.setattr(Loop, "_note_memory", back)
    local.start(run.path, "inline")
    assert run.status == "finished"
    assert all(0 <= event["seconds"] < 60 for event in run.summary().steps.values())
    assert run.card()["text/html"]


def test_f34_a_worker_that_sleeps_is_not_lost(slow, make_run, wait_for):
    run = make_run(max_steps=100_000, eval={"steps": 50_000, "samples": 0})
    local.start(run.path)
    wait_for(run, lambda e: e["type"] == "step")
    pid = run.holder().pid
    os.kill(pid, signal.SIGSTOP)
    try:
        heartbeat = run.path / "heartbeat"
        os.utime(heartbeat, (time.time() - 3600, time.time() - 3600))  # as after an hour with the lid closed
        assert Run(run.path).status == "running"
    finally:
        os.kill(pid, signal.SIGCONT)
    before = run.summary().step
    wait_for(run, lambda e: e["type"] == "step" and e["step"] > before)
    run.stop()
    run.wait(timeout_s=30)
    assert run.status == "stopped"
