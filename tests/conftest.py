"""Shared fixtures: a tiny model with a tokenizer and chat template, rows, and run folders, all made on the spot."""

import json
import os
import zlib
from collections import Counter

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TUNE_MAGIC_STANDBY"] = "off"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as workers have it
os.environ.setdefault(  # tests that run at once share the cores, with all that they start
    "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
)
os.environ.pop("VIRTUAL_ENV", None)  # IPython warns when it runs in another environment than the activated one

import pytest

from tune_magic.testing.models import make_model, make_tokenizer
from tune_magic.worker import quiet_libraries

quiet_libraries()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


def rows(count=24):
    colours = ["red", "green", "blue", "black"]
    return [
        {
            "messages": [
                {"role": "system", "content": "Name the colour."},
                {"role": "user", "content": f"item {i} is {colours[i % 4]}"},
                {"role": "assistant", "content": colours[i % 4]},
            ]
        }
        for i in range(count)
    ]


def normalise(rows, options, source):
    """Bring rows to normal form, all at once."""
    from tune_magic.data.normalise import Normaliser
    from tune_magic.data.read import RowFaults

    normaliser = Normaliser(rows, options, RowFaults(source))
    contents = normaliser.contents(rows)
    normaliser.raise_if_any()
    return contents


def fast(engine):
    """Return what computes examples in the way that must prove itself, with everything shared that can be."""
    return lambda examples: engine.compute(engine._packed(examples, worth=1), examples)


def plainly(engine):
    """Return what computes examples in the way that is right by construction."""
    return lambda examples: engine.compute(engine._padded(examples), examples)


def encode(renderer, contents, source="rows.jsonl", places=None):
    """Encode contents, all at once."""
    from tune_magic.data.read import RowFaults
    from tune_magic.data.render import Part

    part = Part(
        contents, places or [f"row {i + 1}" for i in range(len(contents))], range(len(contents)), RowFaults(source)
    )
    examples = renderer.examples(part)
    part.faults.raise_if_any()
    return examples


def table_of(examples, folder):
    """Return examples as a table."""
    from tune_magic.data.table import TableWriter

    with TableWriter(folder) as writer:
        writer.add(examples)
        return writer.table()


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's lists and caches; run folders go to the test's own folder."""
    from tune_magic.storage import places

    home = tmp_path_factory.mktemp("home")
    monkeypatch.setattr(places, "data_folder", lambda: home / "tune_magic")  # as workers find it
    monkeypatch.setattr(places, "cache_folder", lambda: home / "cache")
    monkeypatch.setenv("XDG_DATA_HOME", str(home))
    return home


@pytest.fixture(autouse=True)
def one_precision(monkeypatch):
    """Runs of a test's own process are computed in float32 on every processor, unless they ask for another precision."""
    import torch

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


@pytest.fixture
def recipe(tiny, data_file):
    """Keywords of a recipe that trains in a second."""
    return {
        "model": str(tiny), "data": {"train": str(data_file), "held_out": 0.25}, "learning_rate": 1e-2,
        "method": {"name": "lora", "r": 4}, "batch_size": 4, "max_steps": 12, "max_length": 128,
        "eval": {"steps": 4, "samples": 1, "max_new_tokens": 8}, "dtype": "float32",
    }  # fmt: skip


@pytest.fixture
def make_run(recipe, tmp_path):
    """Make a run folder from the recipe with changes, without starting it."""
    from tune_magic.handles import Run
    from tune_magic.recipe import build_recipe
    from tune_magic.storage import folder

    def make(kind="finetune", **changes):
        built = build_recipe(recipe | changes)
        return Run(folder.create(tmp_path / "tune_runs", kind, {"name": "tiny_run", "recipe": built.given()}))

    return make


@pytest.fixture
def train(make_run):
    """Make a run and train it in this process; returns the run."""
    from tune_magic.executors import local

    def start(**changes):
        run = make_run(**changes)
        local.start(run.path, "inline")
        return run

    return start


@pytest.fixture
def wait_for():
    """Wait until an event of a run fulfils a condition; a time limit is only a ceiling."""
    import time

    def wait(run, condition, timeout_s=60.0):
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for event in run.events():
                if condition(event):
                    return event
            time.sleep(0.02)
        log = run.log.read_text() if run.log.exists() else "no log"
        raise AssertionError(f"not seen in {timeout_s} s; {run.status}; {log[-2000:]}")

    return wait


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the slow proofs whole")


def pytest_collection_modifyitems(config, items):
    """Of a test marked ``sampled(n)`` leave one in n of its parameters, another choice for each test, unless --full."""
    if config.getoption("--full"):
        return
    seen = Counter()
    for item in items:
        mark = item.get_closest_marker("sampled")
        if mark:
            test = f"{item.path.name}::{item.originalname}"
            place = seen[test] + zlib.crc32(test.encode())
            seen[test] += 1
            if place % mark.args[0]:
                item.add_marker(pytest.mark.skip(reason="sampled: --full runs it"))


@pytest.fixture(scope="session")
def one_shell():
    """The one shell that a process may have."""
    from IPython.testing.globalipapp import start_ipython

    return start_ipython()


@pytest.fixture
def slow(full):
    """Marks a test that only --full runs; it stands first among the fixtures, so that none is made for nothing."""
    if not full:
        pytest.skip("sampled: --full runs it")


@pytest.fixture
def full(request):
    """Whether slow proofs run whole (`make test-full`) or sampled (`make test`)."""
    return request.config.getoption("--full")


@pytest.fixture
def write(tmp_path):
    """Write a file of text or bytes in the test's folder and return its path."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write
