"""Plug-ins of a notebook's cells: shipped to workers, recorded, part of a run's identity (fault matrix F27)."""

import json
import time
from pathlib import Path

import pytest
from test_kernel import Kernel
from test_kernel import folder as of_kernels  # noqa: F401 - a fixture
from test_standby import until, warm_up
from test_training import SHORT, StopAt, assert_same, losses

import tune_magic
from tune_magic import cell_code, launching, plugins
from tune_magic.errors import RecipeError, RunFailed, TuneError
from tune_magic.executors import local, standby
from tune_magic.handles import Run
from tune_magic.recipe.build import build_launch, build_recipe
from tune_magic.training.callbacks import Callback
from tune_magic.training.loop import Loop
from tune_magic.training.tuned import load_tuned
from tune_magic.worker import HELD

PICKLE = b"cloudpickle"  # is in every pickle of a function or class by value
LOSS = """
import tune_magic
class Scale:
    def __init__(self, by): self.by = by
scale = Scale({by})
FACTOR = 1.0
def scaled(losses): return losses * scale.by * FACTOR
@tune_magic.objective("my_loss")
def my_loss(states):
    "Twice what it would be."
    return scaled(-(states.log_probs() * states.weights).sum())
"""
EXTRAS = '''
import tune_magic
from pydantic import Field
from tune_magic.methods.lora import Lora, LoraOptions
from tune_magic.objectives.sft import SFT
from tune_magic.recipe.schema import CallbackOptions, ObjectiveOptions
from tune_magic.training.callbacks import Callback

GAMMA = 2.0

class FocalOptions(ObjectiveOptions):
    gamma: float = Field(GAMMA, ge=0, description="How much less sure tokens count.")

@tune_magic.objective("focal")
class Focal(SFT):
    Options = FocalOptions
    def loss_sum(self, states):
        log_p = states.log_probs()
        return -((1 - log_p.exp()) ** self.options.gamma * log_p * states.weights).sum()

@tune_magic.method("my_lora")
class MyLora(Lora):
    """LoRA by another name."""
    merges = False

class WatchOptions(CallbackOptions):
    every: int = Field(1, ge=1, description="Steps between numbers.")

@tune_magic.callback("watch")
class Watch(Callback):
    Options = WatchOptions
    total = 0.0
    def on_step(self, step, numbers):
        self.total += numbers["loss"]
        return {"mean": self.total / step} if step % self.options.every == 0 else None
    def state(self): return {"total": self.total}
    def load_state(self, state): self.total = state["total"]

@tune_magic.callback("enough")
def enough(step, numbers):
    return step == 3

@tune_magic.metric("first_letter")
def first_letter(answer, reference):
    return answer[:1] == reference[:1]
'''


@pytest.fixture(autouse=True)
def none_left(monkeypatch):
    """Every test begins with no plug-in of a cell, and leaves none."""
    monkeypatch.setattr(plugins, "_local", {})


@pytest.fixture
def cell(one_shell, tmp_path, monkeypatch):
    """Run a cell of an IPython shell whose working folder is the test's."""
    monkeypatch.chdir(tmp_path)

    def run(text):
        done = one_shell.run_cell(text, store_history=False)
        done.raise_error()
        return one_shell.user_ns

    return run


def forget():
    """What a restart of the kernel does to its plug-ins."""
    plugins._local.clear()


def start(recipe, **changes):
    """Launch as a user does; returns the run, ended."""
    built = build_recipe(recipe | changes)
    run, note = launching.begin(built, build_launch({}), name="bot")
    run.wait(240)
    return run, note


def assert_no_pickle(path):
    for file in path.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert PICKLE not in content, file
            assert not content.startswith(b"\x80\x05"), file
            assert b"gASV" not in content, file  # the same in base64


def test_a_function_of_a_cell_is_trained_with_in_a_worker(cell, recipe):
    cell(LOSS.format(by=2.0))
    run, _ = start(recipe, objective="my_loss", max_steps=4)
    assert run.status == "finished", run.log.read_text()
    plain, _ = start(recipe, max_steps=4)
    assert run.summary().steps[1]["loss"] == pytest.approx(2 * plain.summary().steps[1]["loss"], rel=1e-5)
    assert run.summary().plan["objective"]["name"] == "my_loss"
    assert_no_pickle(run.path)
    assert {p.name for p in run.path.iterdir()} == {p.name for p in plain.path.iterdir()}
    (kept,) = run.info["cell_code"]
    assert (kept["kind"], kept["name"]) == ("objective", "my_loss")
    assert kept["source"].startswith('@tune_magic.objective("my_loss")\ndef my_loss(states):')
    assert run.cell_code == {"objective my_loss": kept["source"]}
    assert run.summary().plan["fingerprints"]["objective my_loss"] == kept["hash"]
    assert "cell_code" not in plain.info


def test_everything_a_recipe_names_may_come_from_cells(slow, cell, recipe):
    cell(EXTRAS)
    run, _ = start(
        recipe, objective={"name": "focal", "gamma": 1}, method={"name": "my_lora", "r": 4},
        callbacks={"watch": {"every": 2}, "enough": None},
    )  # fmt: skip
    run.raise_for_state()
    assert len(run.info["cell_code"]) == 4
    assert run.summary().step == 3  # `enough` ended it
    assert run.summary().outcome["by"] == "enough"
    assert 3 in run.summary().evaluations
    assert "ended by `enough`" in run.card()["text/plain"]
    history = run.history
    trained = history["loss"]
    assert history["watch.mean"].tolist()[1] == pytest.approx(trained[:2].mean())
    assert history["watch.mean"].isna().tolist() == [True, False, True]
    report = tune_magic.evaluate(run, metrics="loss,first_letter", limit=3, max_new_tokens=3)
    assert set(report.comparisons) == {"loss", "first_letter"}
    assert report.comparisons["first_letter"].title == "first letter"
    job = Run(next((run.path / "evals").iterdir()))
    assert [code["name"] for code in job.info["cell_code"]] == ["first_letter"]
    assert run.export("adapter", rows=2).ok
    with tune_magic.chat(run) as chat:
        assert chat.ask("item 1 is red", max_new_tokens=2)
    Run(chat.job.path).wait(60)
    assert_no_pickle(run.path)


def test_a_run_is_known_by_the_code_it_was_trained_with(cell, recipe, monkeypatch):
    real = local.start
    monkeypatch.setattr(local, "start", lambda folder, executor="inline": real(folder, "inline"))
    recipe |= {"objective": "my_loss", "max_steps": 2}
    cell(LOSS.format(by=2.0))
    first, _ = start(recipe)
    cell(LOSS.format(by=2.0).replace("* FACTOR", "*  FACTOR  # a remark"))
    again, note = start(recipe)
    assert (again.id, note) == (first.id, launching.FOUND)
    cell(LOSS.format(by=3.0))  # a value of an instance that a helper uses
    second, note = start(recipe)
    assert (note, second.id != first.id) == (None, True)
    cell("def scaled(losses): return losses * 5")  # a helper, in a cell of its own
    third, note = start(recipe)
    assert (note, third.id != second.id) == (None, True)
    cell("FACTOR = 7.0")  # nothing uses it any more
    assert start(recipe)[1] == launching.FOUND


def test_a_stopped_run_needs_the_cell_to_go_on(slow, cell, make_run, recipe, monkeypatch):
    cell(LOSS.format(by=2.0))
    built = build_recipe(recipe | {"objective": "my_loss"} | SHORT)
    with monkeypatch.context() as patch:
        StopAt(patch, 20)
        run, _ = launching.begin(built, build_launch({"executor": "inline"}))
    assert run.status == "stopped"
    forget()
    missing = r"needs the objective `my_loss`, which a notebook cell defined.*Run the cell that defines it"
    for go_on in (run.resume, run.evaluate, lambda: run.export("merged"), lambda: tune_magic.chat(run), run.load):
        with pytest.raises(TuneError, match=missing):
            go_on()
    assert run.status == "stopped"
    assert not list(run.path.glob("evals/*"))
    assert "my_loss" in run.card()["text/plain"]
    cell(LOSS.format(by=2.5))
    with pytest.raises(
        TuneError, match=r"other code of the objective `my_loss`.*run\.cell_code\['objective my_loss'\]"
    ):
        run.resume("inline")
    cell(LOSS.format(by=2.0))
    run.resume().wait(240)  # in a worker now
    assert run.status == "finished", run.log.read_text()
    whole, _ = launching.begin(built, build_launch({"executor": "inline", "fresh": True}))
    assert_same(run, whole)
    assert load_tuned(run).objective.options.name == "my_loss"


def test_a_kernel_that_was_restarted_asks_for_the_cell(slow, of_kernels, tiny, data_file):  # noqa: F811
    body = f"model: {tiny}\ndata: {data_file.name}\nobjective: my_loss\nmax_steps: 3\neval: {{samples: 0}}\n"
    code = LOSS.format(by=2.0)
    kernel = Kernel(of_kernels)
    try:
        kernel.run("%load_ext tune_magic\n" + code)
        kernel.run(f"%%finetune bot\n{body}", timeout_s=240)
        ids = kernel.run("print(bot.id)").split()
        kernel.manager.restart_kernel(now=True)
        kernel.client.wait_for_ready(timeout=60)
        kernel.run("%load_ext tune_magic")
        request = kernel.send("%evaluate bot --limit 2 --metrics loss")
        answer = kernel.finish(request)
        assert answer["ename"] == "TuneError"
        assert "objective `my_loss`" in answer["evalue"]
        kernel.settle()
        kernel.run(code)
        kernel.run(f"%%finetune bot\n{body}", timeout_s=240)
        assert kernel.run("print(bot.id)").split() == ids  # another kernel, the same code: the same run
        kernel.run("report = %evaluate bot --limit 2 --metrics loss", timeout_s=240)
        assert "loss" in kernel.run("print(report.metrics)")
    finally:
        kernel.close()


def test_a_standby_is_sent_the_code_too(slow, cell, make_run, recipe, own_home, monkeypatch):
    from tune_magic.storage import places

    monkeypatch.delenv("TUNE_MAGIC_STANDBY")
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_home / "cache"))
    monkeypatch.setattr(places, "cache_folder", lambda: own_home / "cache" / "tune_magic")
    monkeypatch.setattr(standby, "warm_up_again", lambda: None)
    names = cell("import numpy as np\nbig = np.arange(1_000_000.0)\n" + LOSS.format(by="float(big[2])"))
    names["scale"].big = names["big"]  # more than any pipe holds
    try:
        for is_ready in (False, True):
            pid = warm_up()
            if is_ready:
                until(standby.is_ready)
            built = build_recipe(recipe | {"objective": "my_loss", "max_steps": 2})
            started = time.monotonic()
            run, _ = launching.begin(built, build_launch({"fresh": True}))
            assert time.monotonic() - started < 5  # nobody waits for the imports
            run.wait(240)
            assert run.status == "finished", run.log.read_text()
            assert next(run.events("state"))["pid"] == pid
    finally:
        standby.dismiss()
    assert HELD


def test_code_that_cannot_travel_is_named(cell, recipe, make_run, tmp_path, monkeypatch):
    cell(
        "import threading, tune_magic\nlock = threading.Lock()\n@tune_magic.objective('locked')\n"
        "def locked(states):\n    with lock: return states.log_probs().sum()"
    )
    with pytest.raises(TuneError, match="objective `locked` cannot be sent to the worker"):
        start(recipe, objective="locked")
    assert not list((tmp_path / "tune_runs").glob("2*"))
    (tmp_path / "beside.py").write_text("def half(x): return x / 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    cell(
        "import tune_magic\nfrom beside import half\n@tune_magic.objective('halved')\n"
        "def halved(states): return -half((states.log_probs() * states.weights).sum())"
    )
    run, _ = start(recipe, objective="halved", max_steps=1)
    with pytest.raises(RunFailed, match=r"cannot read the objective `halved`.*ModuleNotFoundError.*beside"):
        run.raise_for_state()


def test_a_plug_in_of_a_file_beside_the_notebook_travels_whole(recipe, tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(LOSS.format(by=2.0))
    monkeypatch.syspath_prepend(str(tmp_path))
    import my_losses  # noqa: F401 - it registers

    run, _ = start(recipe, objective="my_loss", max_steps=1)
    run.raise_for_state()


def test_f27_an_error_in_a_cells_code_is_told_by_its_name(cell, recipe):
    cell("import tune_magic\n@tune_magic.objective('odd')\ndef odd(states):\n    return states.nothing")
    run, _ = start(recipe, objective="odd", max_steps=1)
    with pytest.raises(RunFailed, match=r"In the objective `odd` of a notebook cell: AttributeError"):
        run.raise_for_state()


def test_f27_a_callback_that_raises_or_hangs_can_be_ended(cell, recipe, wait_for):
    cell(
        "import time, tune_magic\n@tune_magic.callback('breaks')\ndef breaks(step, numbers):\n    raise OSError('dull')\n"
        "@tune_magic.callback('hangs')\ndef hangs(step, numbers):\n    time.sleep(60)"
    )
    run, _ = start(recipe, callbacks="breaks")
    with pytest.raises(RunFailed, match=r"In the callback `breaks` of a notebook cell: OSError: dull"):
        run.raise_for_state()
    built = build_recipe(recipe | {"callbacks": "hangs"})
    run, _ = launching.begin(built, build_launch({}))
    wait_for(run, lambda event: event["type"] == "step", timeout_s=120)
    run.stop()  # nobody listens
    started = time.monotonic()
    assert run.kill()
    run.wait(timeout_s=10)
    assert time.monotonic() - started < 10
    assert run.status == "lost"


def test_a_cell_that_is_run_again_replaces_its_own_and_nobody_elses(cell):
    cell(LOSS.format(by=2.0))
    cell(LOSS.format(by=3.0))
    with pytest.raises(TuneError, match=r"objective `sft` exists twice: tune_magic\.objectives\.sft:SFT and sft"):
        cell("import tune_magic\n@tune_magic.objective('sft')\ndef sft(states): return 0")
    with pytest.raises(TuneError, match=r"exists twice: __main__:my_loss and test_plugins_in_cells:.*other"):

        @tune_magic.objective("my_loss")
        def other(states):
            return 0


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("@tune_magic.method('m')\ndef m(model): pass", "method `m` must be a class on the base of"),
        ("@tune_magic.objective('o')\nclass O: pass", "objective `o` must be a class on the base of"),
        ("@tune_magic.objective('o')\ndef o(): pass", "a class or a function of 1 arguments"),
        ("@tune_magic.metric('a metric')\ndef m(a, b): pass", "`a metric` cannot be the name"),
        ("from tune_magic.methods.base import Method\n@tune_magic.method('m')\nclass M(Method): pass", "lacks `apply`"),
    ],
)
def test_what_is_no_plug_in_is_refused_when_it_is_defined(cell, text, problem):
    with pytest.raises(TuneError, match=problem):
        cell(f"import tune_magic\n{text}")


def test_faults_of_their_options_are_told_as_of_any(cell, recipe):
    cell(EXTRAS)
    with pytest.raises(RecipeError, match=r"objective\.gamma.*at least 0"):
        start(recipe, objective={"name": "focal", "gamma": -1})
    with pytest.raises(RecipeError, match=r"callbacks.*watch\.every.*greater than or equal to 1"):
        start(recipe, callbacks={"watch": {"every": 0}})
    with pytest.raises(RecipeError, match=r"there is no callback 'wach'. There are: enough, watch"):
        start(recipe, callbacks="wach")
    with pytest.raises(RecipeError, match="has one of them twice: watch, watch"):
        start(recipe, callbacks=["watch", {"name": "watch"}])


def test_a_loss_like_classifying_takes_rows(cell, train, write):
    cell(
        "import tune_magic\nfrom torch.nn import functional\n@tune_magic.objective('smooth', like='classify')\n"
        "def smooth(states):\n"
        "    return functional.cross_entropy(states.logits, states.targets, label_smoothing=0.1, reduction='sum')"
    )
    rows = "".join(json.dumps({"text": f"it is {c} {i}", "label": c}) + "\n" for i in range(8) for c in ("red", "blue"))
    data = {"train": str(write("labelled.jsonl", rows)), "held_out": 0.25}
    run = train(objective={"name": "smooth", "focal_gamma": 0}, data=data, max_steps=2)
    run.raise_for_state()
    assert run.summary().plan["objective"]["classes"] == ["blue", "red"]
    assert "accuracy" in run.summary().evaluations[2]


# --- callbacks ---------------------------------------------------------------------------------------------------------
class Draws(Callback):
    """Draws numbers, keeps a state, and tells the story of its hooks."""

    def __init__(self, options=None):
        super().__init__(options)
        self.story = []

    def on_start(self):
        import random

        import torch

        self.story.append(["start", len(self.training.plan) > 0, torch.rand(1).numel(), random.random() < 2])

    def on_step(self, step, numbers):
        import numpy as np

        np.random.rand()
        self.story.append(["step", step])
        return {"gap": float("nan") if step == 2 else step / 2}

    def on_evaluation(self, step, scores):
        self.story.append(["evaluation", step])

    def on_end(self, state):
        self.story.append(["end", state])
        return {"end": 1}

    def state(self):
        return {"story": self.story}

    def load_state(self, state):
        self.story = state["story"]


def state_of(run):
    path = run.checkpoints[max(run.checkpoints)] / "state.json"
    return json.loads(path.read_text())["callbacks"]


@pytest.mark.parametrize("n", [25, 45, 70])
@pytest.mark.sampled(3)
def test_looking_on_changes_nothing_and_goes_on_where_it_was(train, make_run, monkeypatch, n):
    dropout = {"method": {"name": "lora", "r": 4, "lora_dropout": 0.2}}  # which draws too
    plain = train(**dropout, **SHORT)
    tune_magic.callback("draws")(Draws)
    watched = train(**dropout, callbacks="draws", **SHORT)
    watched.raise_for_state()
    assert losses(watched) == losses(plain)
    run = make_run(**dropout, callbacks="draws", **SHORT)
    with monkeypatch.context() as patch:
        StopAt(patch, n)
        local.start(run.path, "inline")
    assert run.status == "stopped"
    run.resume("inline")
    assert_same(run, watched)
    told, whole = (
        [part for part in state_of(r)["draws"]["story"] if part[0] in ("step", "evaluation")] for r in (run, watched)
    )
    assert whole == sorted(whole, key=lambda part: (part[1], part[0] == "evaluation"))
    assert told == whole[: len(told)]  # a last checkpoint from before the last evaluation is not written again
    assert len(told) >= len(whole) - 1
    history = run.history
    assert history["draws.gap"].tolist()[0] == 0.5
    assert str(history["draws.gap"].tolist()[1]) == "nan"
    assert history["draws.end"].tolist()[-1] == 1


def test_a_run_that_a_callback_ended_stays_ended(train, make_run, monkeypatch):
    @tune_magic.callback("third")
    def third(step, numbers):
        return step == 3

    run = make_run(callbacks="third", **SHORT)
    real = Loop._train

    class Killed(BaseException):
        pass

    def die(loop):
        real(loop)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_train", die)
        with pytest.raises(Killed):
            local.start(run.path, "inline")
    assert run.status == "lost"
    run.resume("inline")
    assert (run.status, run.summary().step, list(run.summary().evaluations)) == ("finished", 3, [0, 3])


@pytest.mark.parametrize(
    ("hook", "value", "problem"),
    [
        ("on_step", "stop", "returned 'stop'"),
        ("on_start", True, "returned True"),
        ("state", {1: 2}, "not the same as JSON"),
    ],
)
def test_what_a_hook_may_not_return_is_told(train, hook, value, problem):
    class Odd(Callback):
        pass

    setattr(Odd, hook, lambda *_: value)
    tune_magic.callback("odd")(Odd)
    with pytest.raises(RunFailed, match=problem):
        train(callbacks="odd", max_steps=1).raise_for_state()


def test_a_recipe_without_callbacks_is_as_before(train):
    run = train(max_steps=1)
    assert run.summary().plan["recipe"]["callbacks"] == []
    assert state_of(run) == {}
    assert list(run.events("note")) == []


# --- what code says ------------------------------------------------------------------------------------------------------
def hash_of(cell, text):
    forget()
    cell(f"import tune_magic\n{text}")
    (code,) = cell_code.of_names([("objective", "o")])
    return code.hash


def test_the_hash_is_of_what_the_code_says(slow, cell):
    base = "@tune_magic.objective('o')\ndef o(states): return {}"
    same = hash_of(cell, base.format("states.x * 2"))
    assert hash_of(cell, base.format("states.x*2  # twice")) == same
    assert hash_of(cell, base.format("states.x * 3")) != same
    assert hash_of(cell, "x = 1\n" + base.format("states.x * 2")) == same  # an attribute is no global
    inner = (
        "def make(k):\n    @tune_magic.objective('o')\n    def o(states): return states * k\n    return o\nf = make({})"
    )
    assert hash_of(cell, inner.format(2)) != hash_of(cell, inner.format(3))
    array = "import numpy as np\nw = np.array([1.0, {}])\n" + base.format("states.x @ w")
    assert hash_of(cell, array.format(2)) != hash_of(cell, array.format(3))
    assert hash_of(cell, array.format(2)) == hash_of(cell, array.format(2))
    parent = (
        "from tune_magic.objectives.sft import SFT\nclass P(SFT):\n    k = {}\n    def loss_sum(self, s): return s * self.k\n"
        "@tune_magic.objective('o')\nclass O(P): pass"
    )
    assert hash_of(cell, parent.format(2)) != hash_of(cell, parent.format(3))
    assert hash_of(cell, parent.format(2)) == hash_of(cell, parent.format(2))
    recursive = "def f(n): return f(n - 1) if n else {}\n" + base.format("f(states)")
    assert hash_of(cell, recursive.format(0)) != hash_of(cell, recursive.format(1))
    names = "names = {{'b', 'a', 'c', {}}}\n" + base.format("states in names")
    assert (
        hash_of(cell, names.format("'d'")) == hash_of(cell, names.format("'d'")) != hash_of(cell, names.format("'e'"))
    )


VALUE_IN_A_CLASS = """
import dataclasses, functools
from pydantic import Field, PrivateAttr
from tune_magic.objectives.sft import SFT
from tune_magic.recipe.schema import ObjectiveOptions
ALPHA = {value}
{before}
@tune_magic.objective("o")
class O(SFT):
    {inside}
"""


@pytest.mark.parametrize(
    ("before", "inside"),
    [
        ("", "alpha = ALPHA"),
        ("", "table = {'x': [1, ALPHA]}"),
        ("", "def __init__(self, options=None): self.alpha = ALPHA"),
        ("", "alpha = functools.cached_property(lambda self: ALPHA)"),
        ("class Own(ObjectiveOptions):\n    alpha: float = Field(ALPHA)", "Options = Own"),
        ("class Own(ObjectiveOptions):\n    alpha: float = Field(1.0, lt=ALPHA + 9)", "Options = Own"),
        ("class Own(ObjectiveOptions):\n    alpha: float = Field(default_factory=lambda: ALPHA)", "Options = Own"),
        ("@dataclasses.dataclass\nclass D:\n    alpha: float = ALPHA", "table = D()"),
        ("class P:\n    alpha = ALPHA\n    def f(self): return 1", "def loss_sum(self, states): return P().alpha"),
    ],
)
def test_a_value_in_a_class_is_part_of_the_hash(cell, before, inside):
    def of(value):
        return hash_of(cell, VALUE_IN_A_CLASS.format(value=value, before=before, inside=inside))

    first = of(0.3)
    assert of(0.5) != first
    assert of(0.3) == first


def test_the_same_code_has_the_same_hash_in_another_process(cell, tmp_path):
    import subprocess
    import sys

    sets = """
class SetOptions(ObjectiveOptions):
    words: set[str] = Field({"a", "b", "c"}, description="Words.")

@tune_magic.objective("with_sets")
class WithSets(SFT):
    Options = SetOptions
    table = {"x": [GAMMA], "y": {"one", "two", "three"}}
"""
    cell(EXTRAS + sets)
    wanted = [
        ("objective", "focal"),
        ("objective", "with_sets"),
        ("method", "my_lora"),
        ("callback", "watch"),
        ("callback", "enough"),
    ]
    here = [code.hash for code in cell_code.of_names(wanted)]
    script = Path(tmp_path / "script.py")
    show = f"from tune_magic import cell_code\nprint([code.hash for code in cell_code.of_names({wanted})])"
    script.write_text(EXTRAS + sets + show)
    there = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    assert there.strip() == str(here)
