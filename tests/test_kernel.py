"""Real kernels: saved outputs, interrupts, restarts (fault matrix F13, F14, F17)."""

import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tune_magic.handles import Run
from tune_magic.models.find import installed

ROOT = Path(__file__).parent.parent
FRAME_LIMIT, CARD_LIMIT = 32_000, 60_000
OLD_IPYKERNEL = Path(sys.prefix) / "ipykernel6"  # made by `make install`, beside the newest


@pytest.fixture
def folder(tmp_path, data_file, own_home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_home / "cache"))
    monkeypatch.setenv("IPYTHONDIR", str(own_home / "ipython"))
    yield tmp_path
    for path in (tmp_path / "tune_runs").glob("2*"):  # a test that failed must not leave a worker behind
        Run(path).kill()


@pytest.fixture
def body(tiny, data_file):
    return f"model: {tiny}\ndata: {data_file.name}\nbatch_size: 4\neval: {{steps: 50, samples: 1, max_new_tokens: 4}}\n"


def notebook_of(*cells):
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])


def execute(notebook, folder, **options):
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}, **options
    )
    return client.execute()


def test_a_saved_notebook_tells_the_story_alone(folder, body):
    notebook = notebook_of("%load_ext tune_magic", f"%%finetune bot\n{body}max_steps: 60\n", "%evaluate bot --limit 3")
    execute(notebook, folder)
    assert "widgets" not in notebook.metadata
    assert not [o for o in notebook.cells[0].outputs if o.output_type == "error"]
    assert notebook.cells[0].outputs == []  # loading is silent
    displays = [o for o in notebook.cells[1].outputs if o.output_type == "display_data"]
    assert len(displays) == 1  # one display, updated in place
    card = displays[0]
    assert set(card.data) == {"text/html", "text/plain"}
    assert "finished" in card.data["text/plain"]
    assert len(card.data["text/html"]) < CARD_LIMIT
    assert "data:image/svg+xml;base64," in card.data["text/html"]
    run_id = card.metadata["tune_magic"]["run_id"]
    run = Run(folder / "tune_runs" / run_id)
    assert run.status == "finished"
    assert run.link["source"].startswith("model:")
    text = json.dumps(notebook)
    assert "<script" not in text
    assert "application/vnd.jupyter.widget" not in text
    nbformat.validate(notebook)
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter(template_name="basic").from_notebook_node(
        notebook
    )  # the cells alone, without a page's scripts
    assert "<script" not in page
    assert 'alt="loss by step' in page
    assert "finished" in page


def test_300_steps_stay_within_the_budget_of_a_notebook(folder, body):
    frames = []

    class Counting(NotebookClient):
        def process_message(self, msg, cell, cell_index):
            if msg["msg_type"] in ("display_data", "update_display_data"):
                frames.append((time.monotonic(), len(msg["content"]["data"]["text/html"])))
            return super().process_message(msg, cell, cell_index)

    notebook = notebook_of("%load_ext tune_magic", f"%%finetune bot\n{body}max_steps: 300\n")
    Counting(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    *live, (_, card) = frames
    seconds = live[-1][0] - live[0][0]
    assert max(size for _, size in live) < FRAME_LIMIT
    assert card < CARD_LIMIT
    assert len(live) <= 2 * seconds + 6 + 2  # two a second, and one more at each evaluation
    saved = folder / "saved.ipynb"
    nbformat.write(notebook, saved)
    assert saved.stat().st_size < 80_000


def test_a_stop_ends_run_all_with_one_line(folder, body, wait_for):
    notebook = notebook_of(
        "%load_ext tune_magic",
        "import threading, time, tune_magic\n"
        "def stop_soon():\n"
        "    while tune_magic.last is None or not tune_magic.last.summary().steps: time.sleep(0.05)\n"
        "    tune_magic.last.stop()\n"
        "threading.Thread(target=stop_soon, daemon=True).start()",
        f"%%finetune bot\n{body}max_steps: 1000000\n",
        "%export bot --to merged",
    )
    with pytest.raises(CellExecutionError):
        execute(notebook, folder)
    error = next(o for o in notebook.cells[2].outputs if o.output_type == "error")
    assert error.ename == "Stopped"
    assert len(error.traceback) <= 3
    assert re.search(r"stopped at step \d+", error.traceback[0])
    assert notebook.cells[3].execution_count is None  # half a run is never exported
    card = next(o for o in notebook.cells[2].outputs if o.output_type == "display_data")
    assert "%tune resume bot" in card.data["text/plain"]


class Kernel:
    """A real kernel with the few things these tests ask of one."""

    def __init__(self, folder, name="python3"):
        self.manager, self.client = start_new_kernel(kernel_name=name, cwd=str(folder))
        self.outputs = {}

    def send(self, code):
        return self.client.execute(code)

    def finish(self, request, timeout_s=60):
        reply = self.client.get_shell_msg(timeout=timeout_s)
        while reply["parent_header"].get("msg_id") != request:
            reply = self.client.get_shell_msg(timeout=timeout_s)
        return reply["content"]

    def run(self, code, timeout_s=60):
        """Execute and return what was printed."""
        printed = []
        reply = self.client.execute_interactive(
            code, timeout=timeout_s,
            output_hook=lambda m: printed.append(m["content"].get("text") or m["content"].get("data", {}).get("text/plain", "")),
        )  # fmt: skip
        assert reply["content"]["status"] == "ok", reply["content"]
        return "".join(printed)

    def wait_for_output(self, request, timeout_s=60):
        """Wait until a request has shown something."""
        while True:
            message = self.client.get_iopub_msg(timeout=timeout_s)
            if message["parent_header"].get("msg_id") == request and message["msg_type"] == "display_data":
                return

    def settle(self):
        """Wait until requests are answered again: for a moment after an error a kernel sends them back undone."""
        while self.finish(self.send("pass"))["status"] == "aborted":
            time.sleep(0.05)

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def kernel(folder):
    made = Kernel(folder)
    made.run("%load_ext tune_magic")
    yield made
    made.close()


@pytest.fixture(params=[7, 6])
def any_kernel(request, folder, full, monkeypatch, tmp_path_factory):
    """A kernel of the newest ipykernel, and one of the sixth."""
    if request.param == 7 and not full:
        pytest.skip("sampled: --full interrupts both")
    name = "python3"
    if request.param == 6:
        if not OLD_IPYKERNEL.is_dir():
            pytest.skip("there is no ipykernel 6 beside the newest: make install")
        name = "ipykernel6"
        spec = tmp_path_factory.mktemp("jupyter") / "kernels" / name
        spec.mkdir(parents=True)
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        content = {
            "argv": command,
            "display_name": name,
            "language": "python",
            "env": {"PYTHONPATH": str(OLD_IPYKERNEL)},
        }
        (spec / "kernel.json").write_text(json.dumps(content))
        monkeypatch.setenv("JUPYTER_PATH", str(spec.parent.parent))
    made = Kernel(folder, name)
    made.run("%load_ext tune_magic")
    assert made.run("import ipykernel; print(ipykernel.version_info[0])").strip() == str(request.param)
    yield made
    made.close()


def wait_for_run(folder):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = list((folder / "tune_runs").glob("2*"))
        if found:
            return Run(found[0])
        time.sleep(0.05)
    raise AssertionError("no run was started")


def test_f13_one_interrupt_saves_two_kill_and_handlers_come_back(any_kernel, folder, body, wait_for):
    kernel = any_kernel
    kernel.run("import signal; before = signal.getsignal(signal.SIGINT)")
    request = kernel.send(f"%%finetune bot\n{body}max_steps: 1000000\n")
    run = wait_for_run(folder)
    wait_for(run, lambda e: e["type"] == "step" and e["step"] > 5)
    kernel.manager.interrupt_kernel()
    content = kernel.finish(request)
    assert content["ename"] == "Stopped"
    assert run.status == "stopped"
    assert max(run.checkpoints) == run.summary().step  # the last completed step
    kernel.settle()
    assert kernel.run("print(bot.status)").strip() == "stopped"
    assert kernel.run("print(signal.getsignal(signal.SIGINT) == before)").strip() == "True"

    # a worker that does not answer: the second interrupt kills it
    request = kernel.send(f"%%finetune bot --fresh\n{body}max_steps: 1000000\n")
    deadline = time.monotonic() + 60
    while len(list((folder / "tune_runs").glob("2*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    second = Run(max((folder / "tune_runs").glob("2*")))
    wait_for(second, lambda e: e["type"] == "checkpoint")
    os.kill(second.holder().pid, signal.SIGSTOP)
    kernel.manager.interrupt_kernel()
    deadline = time.monotonic() + 30
    while not second.requested("stop") and time.monotonic() < deadline:
        time.sleep(0.05)
    kernel.manager.interrupt_kernel()
    content = kernel.finish(request)
    assert content["ename"] == "RunFailed"
    assert "%tune resume" in "".join(content["traceback"])
    assert second.status == "lost"
    assert second.checkpoints

    # and an interrupt after the run has ended is an ordinary one
    kernel.settle()
    request = kernel.send("import pathlib, time; pathlib.Path('asleep').touch(); time.sleep(60)")
    deadline = time.monotonic() + 30
    while not (folder / "asleep").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    kernel.manager.interrupt_kernel()
    assert kernel.finish(request)["ename"] == "KeyboardInterrupt"


def test_f14_a_killed_kernel_does_not_stop_a_run(kernel, folder, body, wait_for):
    kernel.send(f"%%finetune bot\n{body}max_steps: 300\n")
    run = wait_for_run(folder)
    wait_for(run, lambda e: e["type"] == "step")
    kernel.manager.restart_kernel(now=True)
    kernel.client.wait_for_ready(timeout=60)
    if run.is_live:
        assert "bot of this notebook is still training: %tune watch bot" in kernel.run("%load_ext tune_magic")
    assert "bot: finished · 300 steps" in kernel.run("%load_ext tune_magic\n%tune watch bot", timeout_s=300)
    assert run.status == "finished"
    assert "bot" in kernel.run("%tune runs")


def test_a_background_view_lives_on_while_other_cells_run(slow, folder, body):
    notebook = notebook_of(
        "%load_ext tune_magic",
        f"%%finetune bot --background\n{body}max_steps: 150\n",
        "print(bot.status)\nbot.wait()\nimport time; time.sleep(1)",  # while this cell runs, the one above is drawn
        "bot",
    )
    execute(notebook, folder)
    view, busy, shown = (cell.outputs for cell in notebook.cells[1:])
    assert [o.output_type for o in view] == ["display_data"]
    assert "bot: finished · 150 steps" in view[0].data["text/plain"]
    assert "data:image/svg+xml" in view[0].data["text/html"]
    assert [o.output_type for o in busy] == ["stream"]  # the thread's drawings never land in another cell
    assert busy[0].text.strip() in ("starting", "running")
    assert "finished" in shown[0].data["text/plain"]  # the view has not used up the value's own card


def test_two_kernels_watch_one_run_and_a_stop_reaches_both(kernel, folder, body, wait_for):
    kernel.run(f"%%finetune bot --background\n{body}max_steps: 1000000\n")
    run = wait_for_run(folder)
    wait_for(run, lambda e: e["type"] == "step")
    other = Kernel(folder)
    try:
        other.run("%load_ext tune_magic")
        watching = other.send("%tune watch bot")
        also = kernel.send("%tune watch bot")
        other.wait_for_output(watching)
        kernel.wait_for_output(also)
        run.stop()
        for one, request in ((other, watching), (kernel, also)):
            content = one.finish(request)
            assert content["ename"] == "Stopped"
            assert "stopped at step" in content["evalue"]
    finally:
        other.close()


def test_f17_a_moved_notebook_finds_its_run(folder, body, tmp_path_factory):
    notebook = notebook_of("%load_ext tune_magic", f"%%finetune bot\n{body}max_steps: 20\n")
    execute(notebook, folder)
    before = notebook.cells[1].outputs[0].data["text/plain"]
    elsewhere = tmp_path_factory.mktemp("moved")
    nbformat.write(notebook, elsewhere / "copy.ipynb")
    saved = nbformat.read(elsewhere / "copy.ipynb", as_version=4)
    assert "finished · 20 steps" in saved.cells[1].outputs[0].data["text/plain"]  # static, needs nothing
    again = notebook_of("%load_ext tune_magic", "%tune show bot", "%tune runs --all", "%tune watch bot")
    execute(again, elsewhere)
    assert again.cells[1].outputs[0].data["text/plain"] == before
    assert "bot" in again.cells[2].outputs[0].data["text/plain"]
    assert "finished · 20 steps" in again.cells[3].outputs[0].data["text/plain"]


def test_f14_a_shut_down_kernel_does_not_stop_a_background_run(slow, folder, body, wait_for):
    kernel = Kernel(folder)
    try:
        kernel.run("%load_ext tune_magic")
        kernel.run(f"%%finetune bot --background\n{body}max_steps: 300\n")
        run = wait_for_run(folder)
        wait_for(run, lambda e: e["type"] == "step")
    finally:
        kernel.client.stop_channels()
        kernel.manager.shutdown_kernel()
    run.wait(timeout_s=120)
    assert run.status == "finished"
    assert run.summary().step == 300


def test_interrupting_a_watch_leaves_the_run_alone(kernel, folder, body, wait_for):
    kernel.run(f"%%finetune bot --background\n{body}max_steps: 1000000\n")
    run = wait_for_run(folder)
    wait_for(run, lambda e: e["type"] == "step")
    request = kernel.send("%tune watch bot")
    kernel.wait_for_output(request)
    kernel.manager.interrupt_kernel()
    assert kernel.finish(request)["status"] == "ok"
    assert run.status == "running"
    kernel.run("%tune stop bot")
    run.wait(timeout_s=30)
    assert run.status == "stopped"


@pytest.fixture
def executed_short(folder, monkeypatch, full):
    """Execute an example notebook in its short form, with a standby, and return what its cells show, as text."""
    monkeypatch.delenv("XDG_CACHE_HOME")  # the converted model is worth keeping between runs
    monkeypatch.setenv("TUNE_MAGIC_STANDBY", "on")
    monkeypatch.syspath_prepend(str(ROOT / "example_notebooks"))
    from execute import execute as execute_file

    def execute_short(name, model):
        if model not in installed():
            pytest.skip(f"{model} is not installed: make install")
        if not full and name != "01_quickstart.ipynb":
            pytest.skip("sampled: --full executes every notebook")
        for script in (ROOT / "example_notebooks").glob("make_*.py"):
            shutil.copy(script, folder)
        execute_file(ROOT / "example_notebooks" / name, folder / name, short=True)
        notebook = nbformat.read(folder / name, as_version=4)
        assert "widgets" not in notebook.metadata
        sys.modules.pop("execute")
        return [o.data.get("text/plain", "") for c in notebook.cells for o in c.get("outputs", []) if "data" in o]

    return execute_short


def test_the_quickstart_runs_in_short_form(executed_short, folder):
    shown = executed_short("01_quickstart.ipynb", "smollm2-135m-instruct")
    assert any("finished · 2 steps" in text for text in shown)
    assert any("exported as merged" in text for text in shown)
    run = Run(max((folder / "tune_runs").glob("2*")))
    assert run.metrics["held_out_loss"] < run.metrics["base_held_out_loss"]


def test_the_classification_notebook_runs_in_short_form(executed_short):
    shown = executed_short("02_classify.ipynb", "minilm-l6")
    assert sum("finished · 2 steps" in text for text in shown) == 3
    assert any("exported as onnx int8" in text and "within the limits of int8" in text for text in shown)
    assert any("macro F1: base" in text for text in shown)


def test_the_notebook_of_panels_runs_in_short_form(executed_short, folder):
    shown = executed_short("03_form_and_background.ipynb", "minilm-l6")
    assert any("patient: stopped at step" in text for text in shown)
    assert any("memory at" in text for text in shown)
    runs = {run.name: run for run in map(Run, (folder / "tune_runs").glob("2*"))}
    assert runs["intents"].status == "finished"
    assert runs["patient"].status == "stopped"
    assert runs["patient"].link["notebook"] is None or runs["patient"].link["source"]


def test_the_notebook_of_runs_and_panels_runs(executed_short, folder):
    shown = executed_short("04_runs_and_panels.ipynb", "minilm-l6")
    assert any("4 things to look at" in text for text in shown)
    assert any("('starting', 'queued')" in text or "('running', 'queued')" in text for text in shown)
    assert any("exported as merged" in text for text in shown)
    assert any("tuned: 0." in text for text in shown)
    runs = {run.name: run for run in map(Run, (folder / "tune_runs").glob("2*"))}
    assert {run.status for run in runs.values()} == {"finished"}
    assert runs["baseline"].summary().ended <= runs["adapters"].summary().started  # one after the other
    assert runs["adapters"].meta["note"] == "the one to ship"


def test_the_notebook_of_data_runs_in_short_form(executed_short, folder):
    shown = executed_short("05_data.ipynb", "smollm2-135m-instruct")
    assert any("answers.csv: data · 6 things to look at" in text for text in shown)
    assert any("cleaned: near_duplicates: 1 row left out (rows 104)" in text for text in shown)
    assert any("skipped: 2 bad rows of broken.jsonl (line 5" in text for text in shown)
    assert any("to be made by synonyms: 42 rows" in text for text in shown)
    assert any("notes.txt (replay) 10 %" in text for text in shown)
    runs = {run.name: run for run in map(Run, (folder / "tune_runs").glob("2*"))}
    assert {run.status for run in runs.values()} == {"finished"}
    made = (runs["reviews_balanced"].path / "augmented.jsonl").read_text().splitlines()
    assert len(made) == sum(about["rows"] for about in runs["reviews_balanced"].summary().plan["augmented"])


@pytest.mark.parametrize(
    ("name", "model", "runs", "said"),
    [
        (
            "06_methods.ipynb", "minilm-l6",
            {"quantised"},
            ["arXiv:2106.09685", "nf4", "exported as merged", "bottleneck"],
        ),
        (
            "07_instruction_and_chat.ipynb", "smollm2-135m-instruct",
            {"desk", "sailor", "both"},
            ["label lens", "finished · 2 steps"],
        ),
        (
            "08_domain_adaptation.ipynb", "smollm2-135m-instruct",
            {"plain", "hidden", "few_marks", "reader"},
            ["domain accuracy", "domain_adversarial"],
        ),
        (
            "09_continual_learning.ipynb", "minilm-l6",
            {"capitals", "plain", "replayed", "near_predictions", "near_weights", "important_weights"},
            ["exported as merged", "capitals after"],
        ),
        (
            "10_distillation.ipynb", "minilm-l6",
            {"teacher", "alone", "taught", "capitals", "pupil", "listener"},
            ["Capital of Peru?"],
        ),
        (
            "11_custom_loss.ipynb", "smollm2-135m-instruct",
            {"desk"},
            ["fields right", "smoothed"],
        ),
        (
            "12_evaluate.ipynb", "smollm2-135m-instruct",
            {"desk", "intents", "intents_frozen"},
            ["general set", "few-shot", "JSON fields", "ROC AUC", "rated against base", "right intent"],
        ),
        (
            "13_export_and_serve.ipynb", "minilm-l6",
            {"capitals", "loud", "sums", "intents"},
            ["exported as gguf q8_0", "onnx_adapters", "capitals@1", "server · ended"],
        ),
        (
            "14_compression.ipynb", "minilm-l6",
            {"whole", "fewer_layers", "fewer_neurons", "fewer_weights", "fewer_values", "fewer_bits"},
            ["exported as onnx int8", "before recovery"],
        ),
    ],
)  # fmt: skip
def test_a_notebook_of_methods_runs_in_short_form(name, model, runs, said, executed_short, folder):
    shown = "\n".join(executed_short(name, model))
    assert all(words in shown for words in said)
    found = {run.name: run.status for run in map(Run, (folder / "tune_runs").glob("2*"))}
    assert runs <= found.keys()
    assert set(found.values()) == {"finished"}


@pytest.mark.parametrize(
    ("name", "metric", "before", "after"),
    [
        ("01_quickstart.ipynb", "exact match", 0.1, 0.7),
        ("02_classify.ipynb", "accuracy", 0.2, 0.55),
        ("03_form_and_background.ipynb", "held-out accuracy", 0.2, 0.5),
        ("04_runs_and_panels.ipynb", "held-out accuracy", 0.2, 0.5),
        ("05_data.ipynb", "held-out accuracy", 0.5, 0.9),
        ("06_methods.ipynb", "accuracy", 0.2, 0.5),
        ("07_instruction_and_chat.ipynb", "held-out loss", 0.8, 0.2),
        ("08_domain_adaptation.ipynb", "accuracy", 0.6, 0.7),
        ("09_continual_learning.ipynb", "held-out loss", 4.0, 0.3),
        ("10_distillation.ipynb", "accuracy", 0.2, 0.6),
        ("11_custom_loss.ipynb", "held-out loss", 0.7, 0.2),
        ("12_evaluate.ipynb", "exact match", 0.1, 0.2),
        ("13_export_and_serve.ipynb", "held-out loss", 4.0, 0.5),
        ("14_compression.ipynb", "held-out accuracy", 0.2, 0.6),
    ],
)
def test_a_committed_notebook_is_a_real_execution(name, metric, before, after):
    """Its outputs are there, and the model was no better than `before` and became at least as good as `after`."""
    notebook = nbformat.read(ROOT / "example_notebooks" / name, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert "widgets" not in notebook.metadata
    text = "".join(o.get("data", {}).get("text/plain", "") for c in code for o in c.outputs)
    found = re.search(rf"{metric}: base (\S+), tuned (\S+),", text)
    sign = -1 if "loss" in metric else 1
    assert sign * float(found[1]) <= sign * before
    assert sign * float(found[2]) >= sign * after
    assert not re.search(r"/(home|root|work|Users|tmp)/", json.dumps(notebook))
    assert "application/vnd.jupyter.widget" not in json.dumps(notebook)
    assert not [o for c in code for o in c.outputs if o.output_type == "error"]


def test_runs_are_kept_in_order_from_a_notebook(slow, folder, body):
    cells = (
        f"%load_ext tune_magic\n__session__ = '{folder}/n.ipynb'",
        f"%%finetune a\n{body}max_steps: 6\n",
        f"%%finetune b\n{body}max_steps: 6\nlearning_rate: 1e-3\n",
        "%tune compare a b", "%tune rename b c", "%tune note c slower", "%tune runs --here", "%tune gpu --free",
        "%tune rm c --yes", "%tune runs", "%tune rm a",
    )  # fmt: skip
    notebook = notebook_of(*cells)
    with pytest.raises(CellExecutionError, match=r"UsageError.*%tune rm a --yes"):
        execute(notebook, folder)  # nobody can be asked here
    outputs = {cell.source: cell.outputs for cell in notebook.cells}
    (compared,) = outputs["%tune compare a b"]
    assert set(compared.data) == {"text/html", "text/plain"}
    assert "learning_rate" in compared.data["text/plain"]
    assert len(compared.data["text/html"]) < FRAME_LIMIT
    assert "c · slower" in outputs["%tune runs --here"][0].data["text/plain"]
    assert "this kernel" in outputs["%tune gpu --free"][0].data["text/plain"]
    left = outputs["%tune runs"][0].data["text/plain"]
    assert "slower" not in left
    assert len(list((folder / "tune_runs").glob("2*"))) == 1
