"""The check-up finds what is wrong, and says what to do."""

import subprocess
import types

import pytest
from test_view import Page

import tune_magic
from tune_magic import checkup, commands
from tune_magic.magics import verbs
from tune_magic.storage import places

WELL = {"torch": "2.13.0", "cuda_build": None, "gpus": [], "threads": 2, "broken": []}


@pytest.fixture
def probed(monkeypatch):
    """Decide what the process that imports says."""
    found = dict(WELL)
    monkeypatch.setattr(checkup, "_probe", lambda: found)
    return found


def by_name(check):
    return {finding.name: finding for finding in check.findings}


def test_this_environment_is_well(monkeypatch):
    """For real: a process imports what a worker imports."""
    monkeypatch.delenv("OMP_NUM_THREADS")  # tests that run at once share the cores
    check = tune_magic.doctor()
    assert check.ok
    found = by_name(check)
    assert found["libraries"].says.startswith("torch 2.13.0")
    assert found["plug-ins"].says == "all of them import"
    card = check.card()
    for finding in check.findings:
        assert finding.says in card["text/plain"]
        assert finding.says.split(" · ")[0][:40] in Page(card["text/html"]).text


def test_it_is_a_verb(probed, capsys):
    verbs.do_verb("doctor", commands.parse(commands.COMMANDS["tune doctor"], ""), None)
    assert "tune_magic: " in capsys.readouterr().out


def test_a_package_that_is_missing_or_too_old_is_named_with_its_cure(probed, monkeypatch):
    monkeypatch.setattr(
        checkup, "requires", lambda _: ["peft>=99,<100", "nothing-of-that-name>=1", 'trl>=1; extra == "bench"']
    )
    check = tune_magic.doctor()
    assert not check.ok
    found = by_name(check)["packages"]
    assert "peft is " in found.says
    assert "nothing-of-that-name is missing" in found.says
    assert "trl" not in found.says
    assert found.do == 'pip install "peft<100,>=99" "nothing-of-that-name>=1"'


def test_libraries_that_do_not_import_are_a_problem(probed):
    probed.clear()
    probed["error"] = "OSError: libcudnn.so.9 is missing"
    check = tune_magic.doctor()
    assert not check.ok
    assert "libcudnn" in by_name(check)["libraries"].says
    assert "import torch" in by_name(check)["libraries"].do


def test_a_gpu_that_torch_cannot_use_is_told(probed, monkeypatch):
    monkeypatch.setattr(checkup.shutil, "which", lambda name: "/usr/bin/" + name)
    assert "is a build for CPUs" in by_name(tune_magic.doctor())["device"].says
    probed |= {"cuda_build": "13.0", "gpus": ["NVIDIA H200"]}
    assert by_name(tune_magic.doctor())["device"].says == "NVIDIA H200"


def test_little_memory_little_disk_and_few_threads_are_warnings(probed, monkeypatch):
    monkeypatch.setattr(checkup.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=1e9, total=8e9))
    monkeypatch.setattr(checkup.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1e9))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(checkup.os, "cpu_count", lambda: 16)
    check = tune_magic.doctor()
    found = by_name(check)
    assert check.ok  # a run can be started all the same
    for name in ("memory", "runs folder", "cache folder", "threads"):
        assert found[name].verdict == "warning"
        assert found[name].do


def test_a_folder_that_cannot_be_written_is_a_problem(probed, monkeypatch):
    monkeypatch.setattr(checkup.os, "access", lambda path, mode: False)
    check = tune_magic.doctor()
    assert not check.ok
    assert "cannot be written" in by_name(check)["runs folder"].says


def test_a_broken_plug_in_is_named_and_costs_nothing_else(probed):
    probed["broken"] = [["method", "mine", "my-package", "ImportError: no <b>x</b>"]]
    check = tune_magic.doctor()
    assert check.ok
    assert by_name(check)["plug-ins"].do == "pip install -U my-package"
    assert "<b>x</b>" not in check.card()["text/html"]


@pytest.mark.parametrize("failure", [subprocess.TimeoutExpired("python", 1), None])
def test_a_process_that_hangs_or_dies_is_told(monkeypatch, failure):
    def run(*_, **__):
        if failure:
            raise failure
        return types.SimpleNamespace(stdout="", stderr="Illegal instruction", returncode=-4)

    monkeypatch.setattr(checkup.subprocess, "run", run)
    found = by_name(tune_magic.doctor())["libraries"]
    assert found.verdict == "problem"
    assert ("longer than" if failure else "Illegal instruction") in found.says


def test_in_a_kernel_the_front_end_is_looked_at(probed, monkeypatch, tmp_path):
    monkeypatch.setattr(checkup.display, "in_kernel", lambda: True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torch.py").write_text("")
    found = by_name(tune_magic.doctor())
    assert "ipykernel" in found["front end"].says
    assert found["working folder"].verdict == "warning"
    assert found["standby"].says.startswith("not there")
    assert places.default_root().name in found["runs folder"].says
