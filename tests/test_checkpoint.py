"""Checkpoints: killed, failing and damaged writes (fault matrix F9, F10, F11, F12, F29)."""

import errno
import json
import subprocess
import sys

import pytest
import torch
from test_files import until_clean

from tune_magic.errors import CheckpointError
from tune_magic.training import checkpoint
from tune_magic.training.checkpoint import Progress

MEMBERS = ["optimizer.safetensors", "random.safetensors", "state.json", "trainable.safetensors"]


def toy():
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(folder, step, model=None, optimizer=None):
    made = toy() if model is None else (model, optimizer)
    return checkpoint.save(folder, *made, Progress(step=step), checkpoint.random_state())


def test_what_is_saved_comes_back_to_the_bit(tmp_path):
    model, optimizer = toy()
    path = save(tmp_path, 3, model, optimizer)
    before = {name: p.clone() for name, p in model.named_parameters()}
    drawn = torch.rand(4)
    other = torch.nn.Linear(8, 8)
    fresh = torch.optim.AdamW(other.parameters())
    assert checkpoint.restore(path, other, fresh).step == 3
    assert all(torch.equal(before[name], p) for name, p in other.named_parameters())
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[ours].keys() == fresh.state[theirs].keys()
        assert all(torch.equal(value, fresh.state[theirs][key]) for key, value in optimizer.state[ours].items())
    assert torch.equal(torch.rand(4), drawn)


def test_no_file_is_a_pickle(tmp_path):
    path = save(tmp_path, 1)
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", *MEMBERS]
    assert all(p.read_bytes()[:2] != b"\x80\x04" and p.read_bytes()[:2] != b"PK" for p in path.iterdir())


KILL = """
import os, random, signal, sys, time, json
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[3])
from tune_magic.training import checkpoint
from tune_magic import files
from test_checkpoint import save, toy
folder, kills = Path(sys.argv[1]), int(sys.argv[2])
generator = random.Random(0)
toy()  # imports what the first optimizer imports, before the clock of the kills runs
bad = torn = good = step = 0
for kill in range(kills):
    child = os.fork()
    if child == 0:
        model, optimizer = toy()
        base = 1000 * (kill + 1)
        for n in range(500):
            save(folder, base + n, model, optimizer)
            done = set(checkpoint.steps(folder))
            checkpoint.retain(folder, limit=2, protected={min(done)}, own=done)
        os._exit(0)
    time.sleep(generator.uniform(0.02, 0.12))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    torn += sum(p.name.startswith(".") for p in folder.iterdir())
    for step in checkpoint.steps(folder):
        try:
            checkpoint.verify(folder / checkpoint.name_of(step)); good += 1
        except Exception:
            bad += 1
    files.sweep(folder)
    assert not any(p.name.startswith(".") for p in folder.iterdir())
print(json.dumps({"bad": bad, "torn": torn, "good": good, "left": len(checkpoint.steps(folder))}))
"""


def test_f9_f12_a_kill_at_any_instant_leaves_only_whole_checkpoints(tmp_path, full):
    kills = 150 if full else 25
    here = str(__import__("pathlib").Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", KILL, str(tmp_path), str(kills), here], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["bad"] == 0
    assert seen["good"] > kills  # kills hit a folder that had something to lose
    assert seen["torn"] > 0  # and some of them hit a save
    assert seen["left"] >= 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_f9_f10_a_save_that_fails_at_any_call_leaves_the_one_before(tmp_path, monkeypatch, code):
    save(tmp_path, 1)
    model, optimizer = toy()
    target = tmp_path / "step-2"

    def check(failed):
        checkpoint.verify(tmp_path / "step-1")
        if target.exists():
            checkpoint.verify(target)
            assert checkpoint.latest_valid(tmp_path)[0] == 2
            __import__("shutil").rmtree(target)
        else:
            assert checkpoint.latest_valid(tmp_path) == (1, [])
        assert [p.name for p in tmp_path.iterdir()] == ["step-1"]

    calls = until_clean(monkeypatch, lambda: save(tmp_path, 2, model, optimizer), code, check)
    assert calls > 20


@pytest.mark.parametrize("member", [*MEMBERS, "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_f11_every_damage_is_seen(tmp_path, member, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / member
    data = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 8]) + data[middle + 1 :])
    latest, rejected = checkpoint.latest_valid(tmp_path)
    assert latest == 1
    assert rejected or (member, damage) == ("manifest.json", "remove")
    with pytest.raises(CheckpointError):
        checkpoint.restore(tmp_path / "step-2", torch.nn.Linear(8, 8))


@pytest.mark.parametrize("name", ["../../secret", "/etc/hostname", "link"])
def test_f29_a_manifest_cannot_point_outside(tmp_path, name):
    path = save(tmp_path, 1)
    (path / "link").symlink_to("/etc/hostname")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"].pop("state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError):
        checkpoint.verify(path)


def test_f29_a_member_that_is_a_link_is_refused(tmp_path):
    path = save(tmp_path, 1)
    outside = tmp_path / "outside.json"
    (path / "state.json").rename(outside)
    (path / "state.json").symlink_to(outside)
    with pytest.raises(CheckpointError):
        checkpoint.verify(path)


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    model, optimizer = toy()
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        save(tmp_path, 1, model, optimizer)
    assert list(tmp_path.iterdir()) == []


def test_retention_keeps_the_newest_the_best_and_what_is_not_its_own(tmp_path):
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    assert checkpoint.retain(tmp_path, limit=2, protected={2}, own={1, 2, 4, 5}) == [1]
    assert checkpoint.steps(tmp_path) == [2, 3, 4, 5]


def test_the_random_state_of_a_device_that_is_gone_is_passed_over():
    state = checkpoint.random_state() | {"cuda_7": torch.zeros(16, dtype=torch.uint8)}
    first = torch.rand(3)
    checkpoint.set_random_state(state)
    assert torch.equal(torch.rand(3), first)
