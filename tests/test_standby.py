"""The standby: a job given to it is a worker's like any other, and it is never in the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from test_kernel import Kernel

from tune_magic import worker
from tune_magic.executors import local, standby
from tune_magic.storage import lock, places

RESIDENT_LIMIT_BYTES = 700_000_000  # measured: 412 MB on Linux with torch 2.13 for CPU
CEILING_S = 240.0  # a busy machine imports slowly


@pytest.fixture(autouse=True)
def switched_on(own_home, monkeypatch):
    monkeypatch.delenv("TUNE_MAGIC_STANDBY")
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_home / "cache"))
    monkeypatch.setattr(places, "cache_folder", lambda: own_home / "cache" / "tune_magic")
    yield
    standby.dismiss()


def until(condition):
    deadline = time.monotonic() + CEILING_S
    while not condition():
        assert time.monotonic() < deadline, "not seen in time"
        time.sleep(0.02)


def warm_up():
    """Start a standby that can be handed a job, and return its process id; its imports still go on."""
    standby.warm_up()
    until(lambda: standby._current.says(worker.HELD))
    return standby.pid()


def pid_of(run):
    return next(event["pid"] for event in run.events("state") if event["state"] == "starting")


def is_gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def story(run):
    """The events of a run without what differs from run to run."""
    told = []
    for event in run.events():
        if event["type"] != "memory":
            told.append({k: v for k, v in event.items() if k not in ("seq", "t", "pid", "seconds", "crc", "memory")})
    return told


def spawn(**environment):
    """Start a standby whose pipes are in the hands of the test."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        return worker.spawn(worker.STANDBY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)


def test_a_ready_standby_trains_exactly_like_a_fresh_worker(slow, make_run):
    pid = warm_up()
    until(standby.is_ready)
    assert psutil.Process(pid).memory_info().rss < RESIDENT_LIMIT_BYTES
    exact = {"steps": 4, "samples": 0}  # samples get a share of the time, so their number is not exact
    warm, cold = make_run(eval=exact), make_run(eval=exact)
    local.start(warm.path)
    assert standby.pid() is None
    warm.wait(CEILING_S)
    local.start(cold.path)  # there is no other standby
    cold.wait(CEILING_S)
    for run in (warm, cold):
        assert run.status == "finished", run.log.read_text()
        assert local.exit_code(run.path) == 0
        assert json.loads((run.path / "owner.lock").read_text())["pid"] == pid_of(run)
    assert pid_of(warm) == pid != pid_of(cold)
    assert story(warm) == story(cold)
    assert warm.log.read_text() == cold.log.read_text()


def test_a_job_handed_over_during_the_imports_is_done_after_them(make_run, tmp_path, monkeypatch):
    pid = warm_up()
    assert not standby.is_ready()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = make_run(data={"train": "missing.jsonl"})  # looked for in the working folder of now
    local.start(run.path)
    until(lambda: run.summary().attempt)
    assert lock.holder(places.cache_folder() / "standby.lock") is None  # the next one may come
    run.wait(CEILING_S)
    assert run.status == "failed"
    assert pid_of(run) == pid
    assert "Traceback" in run.log.read_text()


def test_a_job_is_killed_even_before_the_imports_are_done(make_run):
    warm_up()
    run = make_run()
    local.start(run.path)
    assert local.is_starting(run.path)
    assert local.kill(run.path)
    assert local.exit_code(run.path) == -signal.SIGKILL
    assert run.status == "lost"


def test_a_library_that_cannot_be_imported_is_left_to_the_job(slow, make_run, tmp_path, monkeypatch):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "peft.py").write_text("raise RuntimeError('a broken library')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    pid = warm_up()
    without, needing = make_run(method={"name": "full"}, max_steps=1), make_run(max_steps=1)
    local.start(without.path)
    without.wait(CEILING_S)
    assert without.status == "finished", without.log.read_text()
    assert pid_of(without) == pid
    warm_up()
    local.start(needing.path)
    needing.wait(CEILING_S)
    assert needing.status == "failed"
    assert "a broken library" in needing.log.read_text()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("idle_s", ["0", "900"])
def test_it_ends_by_itself_when_idle_and_when_the_pipe_ends(idle_s):
    with spawn(TUNE_MAGIC_STANDBY_IDLE_S=idle_s) as process:
        assert process.stdout.read(64) == worker.HELD
        process.send_signal(signal.SIGINT)  # ignored
        if idle_s == "900":
            process.stdin.close()
        assert process.wait(CEILING_S) == 0


def test_it_is_not_handed_a_job_when_its_time_is_up(monkeypatch, make_run):
    monkeypatch.setenv("TUNE_MAGIC_STANDBY_IDLE_S", "1")
    pid = warm_up()
    assert standby.adopt(make_run().path, str(Path.cwd())) is None
    assert is_gone(pid)


PARENT = """
import sys, time
from pathlib import Path
from tune_magic import worker
from tune_magic.executors import local, standby
standby.warm_up()
while not standby._current.says(worker.HELD): time.sleep(0.01)
print(standby.pid(), flush=True)
if sys.argv[1:]: local.start(Path(sys.argv[1]))
print("done", flush=True)
time.sleep(1000)
"""


@pytest.mark.sampled(2)
@pytest.mark.parametrize("has_job", [False, True])
def test_a_killed_kernel_leaves_no_standby_and_every_worker(make_run, wait_for, has_job):
    run = make_run()
    command = [sys.executable, "-c", PARENT, *([str(run.path)] if has_job else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert parent.stdout.readline() == "done\n"
        parent.kill()
    if has_job:
        wait_for(run, lambda event: event.get("state") == "finished", CEILING_S)
        assert pid_of(run) == pid
    until(lambda: is_gone(pid))


@pytest.mark.parametrize("change", ["environment", "off", "packages"])
def test_one_that_does_not_fit_is_ended(monkeypatch, make_run, change):
    pid = warm_up()
    if change == "packages":
        monkeypatch.setattr(standby.fingerprint, "versions", lambda: {"torch": "99"})
    else:
        name, value = {"environment": ("OMP_NUM_THREADS", "1"), "off": ("TUNE_MAGIC_STANDBY", "off")}[change]
        monkeypatch.setenv(name, value)
    run = make_run()
    local.start(run.path)
    assert is_gone(pid)
    until(lambda: run.summary().attempt)
    assert pid_of(run) != pid
    assert run.kill()
    standby.warm_up()
    assert (standby.pid() is None) == (change == "off")


def test_none_is_started_on_a_machine_short_of_memory(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2_900_000_000))
    standby.warm_up()
    assert standby.pid() is None


def test_a_second_one_waits_a_while_and_leaves():
    first = warm_up()
    impatient = f"import sys; from tune_magic import worker; worker._LOCK_WAIT_S = 0.5; sys.argv[1:] = ['{worker.STANDBY}']; sys.exit(worker.stand_by())"
    with subprocess.Popen([sys.executable, "-c", impatient], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as second:
        assert second.wait(CEILING_S) == 0
        assert second.stdout.read() == b""
    assert lock.holder(places.cache_folder() / "standby.lock").pid == first
    with spawn() as patient:  # as after a restart of the kernel: the one before it takes a moment to go
        until(lambda: (psutil.Process(patient.pid).cpu_times().user) > 0)
        standby.dismiss()
        assert patient.stdout.read(64) == worker.HELD
        patient.kill()


def test_the_next_one_is_started_when_the_last_job_has_ended(monkeypatch):
    monkeypatch.setattr(local, "_started", {})
    local.job_ended()
    assert standby.pid() is None  # nobody ever asked for one
    first = warm_up()
    local.job_ended()
    assert standby.pid() == first  # it is still there
    os.killpg(first, signal.SIGKILL)
    until(lambda: is_gone(first))
    with subprocess.Popen(["sleep", "1000"]) as job:
        local._started[places.cache_folder()] = job
        local.job_ended()
        assert standby.pid() == first  # a job goes on: its memory is not shared
        job.kill()
        job.wait()
    local.job_ended()
    assert standby.pid() not in (None, first)


LOADING = """
import sys, types
from IPython.terminal.interactiveshell import TerminalInteractiveShell
shell = TerminalInteractiveShell.instance()
shell.run_line_magic("load_ext", "tune_magic")
assert "tune_magic.executors.standby" not in sys.modules  # a terminal trains seldom and is left at once
shell.run_line_magic("unload_ext", "tune_magic")
shell.kernel = object()
shell.run_line_magic("load_ext", "tune_magic")
from tune_magic.executors import standby
pid = standby.pid()
heavy = [name for name in ("torch", "transformers", "pydantic", "numpy", "pandas") if name in sys.modules]
assert not heavy, heavy
shell.run_line_magic("unload_ext", "tune_magic")
print(pid, standby.pid())
"""


def test_loading_starts_one_in_a_kernel_and_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", LOADING], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pid, after = done.stdout.split()
    assert after == "None"
    assert is_gone(int(pid))


def test_no_gpu_is_touched_by_the_imports():
    code = (
        "from tune_magic import worker; assert worker._import_libraries();"
        "import torch; assert not torch.cuda.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_cell_is_trained_by_the_standby_of_its_kernel(tmp_path, own_home, tiny, data_file, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(own_home / "ipython"))
    kernel = Kernel(tmp_path)
    try:
        kernel.run("%load_ext tune_magic")
        kernel.run("from tune_magic.executors import local, standby")
        until(lambda: kernel.run("print(standby.is_ready())").strip() == "True")
        pid = int(kernel.run("print(standby.pid())"))
        body = f"model: {tiny}\ndata: {data_file.name}\nbatch_size: 4\nmax_steps: 2\neval: {{samples: 0}}\n"
        kernel.run(f"%%finetune bot\n{body}", timeout_s=CEILING_S)
        assert "finished" in kernel.run("print(bot.status)")
        assert int(kernel.run("print(next(e['pid'] for e in bot.events('state')))")) == pid
        kernel.run("local.job_ended()")
        following = int(kernel.run("print(standby.pid())"))
        assert following != pid
        kernel.run("%unload_ext tune_magic")
        assert is_gone(following)
    finally:
        kernel.close()


def test_a_worker_imports_bitsandbytes_only_where_something_is_quantised(tiny):
    """It takes seconds and a tenth of a gigabyte, and PEFT imports it wherever it is installed."""
    code = f"""
import sys
import torch
from transformers import AutoModelForCausalLM
from tune_magic.methods.lora import Lora, LoraOptions
from tune_magic.models.quantise import quantise
from tune_magic.recipe.schema import QuantizationOptions

def load():
    return AutoModelForCausalLM.from_pretrained({str(tiny)!r})

Lora(LoraOptions(r=2)).apply(load(), "CAUSAL_LM")
print("bitsandbytes" in sys.modules)
base = quantise(load(), QuantizationOptions(kind="nf4"), torch.float32, torch.device("cpu"))
model = Lora(LoraOptions(r=2)).apply(base, "CAUSAL_LM")
print("bitsandbytes" in sys.modules, sum(p.requires_grad for p in model.parameters()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "28"]
