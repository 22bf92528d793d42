"""The example package installs, is found, trains in a process of its own, and passes its own tests."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "plugin"
RUN = """
import sys, tune_magic
from tune_magic import plugins
assert not [row for row in plugins.listing() if row.problem]
run = tune_magic.finetune(
    model=sys.argv[1], data={"train": sys.argv[2], "held_out": 0.25}, method="output_scale",
    objective={"name": "focal_tokens", "gamma": 2}, callbacks={"smoothed_loss": {"decay": 0.5}}, learning_rate=1e-2, max_steps=4,
    batch_size=4, eval={"steps": 2, "samples": 0},
)
report = run.evaluate(metrics=["loss", "word_overlap"], limit=3, max_new_tokens=4)
print("found", sorted(report.metrics), run.history["smoothed_loss.loss"].notna().all(), run.info.get("cell_code"), run.path)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The environment of a process that has the package; it is built from a copy, which leaves no build behind."""
    copy, target = tmp_path_factory.mktemp("source") / "plugin", tmp_path_factory.mktemp("site")
    shutil.copytree(EXAMPLE, copy)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*command, str(target), str(copy)], check=True, capture_output=True, text=True)
    return os.environ | {"PYTHONPATH": str(target)}


def test_the_package_trains_in_a_fresh_process(slow, installed, tiny, data_file, tmp_path, own_home):
    environment = installed | {"XDG_DATA_HOME": str(own_home), "XDG_CACHE_HOME": str(own_home / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tiny), str(data_file)], env=environment, cwd=tmp_path, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    told = done.stdout[done.stdout.index("found ") :]
    assert told.startswith("found ['loss', 'word_overlap'] True None ")
    info = json.loads((Path(told.split()[-1]) / "run.json").read_text())
    assert info["recipe"]["callbacks"] == [{"name": "smoothed_loss", "decay": 0.5}]


def test_the_package_passes_its_own_tests(installed, tmp_path, own_home, full):
    chosen = [] if full else ["-k", "learns or merged or base or gradient or sum or Overlap or state"]
    environment = installed | {"XDG_DATA_HOME": str(own_home), "XDG_CACHE_HOME": str(own_home / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), *chosen,
         str(EXAMPLE / "tests")],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_every_plug_in_of_the_package_is_in_its_readme():
    points = (EXAMPLE / "pyproject.toml").read_text().split('plugins"]\n')[1].split("\n\n")[0].splitlines()
    names = [line.split('"')[1].split(".")[1] for line in points]
    readme = (EXAMPLE / "README.md").read_text()
    assert names
    assert all(name in readme for name in names)
