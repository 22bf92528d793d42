"""A real JupyterLab and Notebook 7 in headless Chromium: run, watch, interrupt, save, reload without trust, dark pages.

Pictures go to ``tests/screenshots``. Without Chromium the tests are skipped, visibly.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

from tune_magic import files
from tune_magic.evaluation.votes import VoteReader
from tune_magic.handles import Run
from tune_magic.storage import folder

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PICTURES = Path(__file__).parent / "screenshots"
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


class Server:
    """A Jupyter server over a folder, seen through one front end.

    Args:
        folder: What it serves.
        front: ``lab`` for JupyterLab, ``notebook`` for Notebook 7.
        dark: Whether the page is dark.
    """

    def __init__(self, folder, front="lab", *, dark=False):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.front, self.address = front, f"http://127.0.0.1:{port}"
        settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
        settings.mkdir(parents=True)
        (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
        theme = "JupyterLab Dark" if dark else "JupyterLab Light"
        (settings / "themes.jupyterlab-settings").write_text(json.dumps({"theme": theme}))
        places = {
            "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        }
        command = [
            sys.executable, "-m", "jupyterlab" if front == "lab" else "notebook", "--no-browser", f"--port={port}",
            "--ip=127.0.0.1", "--allow-root", "--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True",
            f"--ServerApp.root_dir={folder}",
        ]  # fmt: skip
        self._log = (folder / "server.log").open("w")
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log, env=os.environ | places)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not self.get("/api"):
            time.sleep(0.2)

    def get(self, path):
        """Return what the server says, None while it says nothing."""
        with contextlib.suppress(OSError), urllib.request.urlopen(self.address + path, timeout=2) as answer:
            return json.loads(answer.read())
        return None

    def open_busy(self, page, name):
        """Open a notebook, whatever its kernel does."""
        where = f"/lab/tree/{name}?reset" if self.front == "lab" else f"/notebooks/{name}"
        page.goto(self.address + where)
        page.wait_for_selector(".jp-Notebook .jp-Cell")

    def open(self, page, name):
        """Open a notebook and wait until its kernel is idle."""
        self.open_busy(page, name)
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            sessions = [s for s in self.get("/api/sessions") or [] if s["path"] == name]
            if sessions and sessions[0]["kernel"]["execution_state"] == "idle" and sessions[0]["kernel"]["connections"]:
                page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]')  # the page knows it, too
                return
            time.sleep(0.2)
        raise AssertionError(f"no idle kernel for {name}")

    def close(self):
        """End the server with its kernels."""
        self._process.terminate()
        self._process.wait(20)
        self._log.close()


@pytest.fixture
def serve(tmp_path, own_home):
    """Start servers over the test's folder; they and their workers end with the test."""
    started = []

    def start(front="lab", *, dark=False):
        started.append(Server(tmp_path, front, dark=dark))
        return started[-1]

    yield start
    for server in started:
        server.close()
    for path in (tmp_path / "tune_runs").glob("2*"):  # a test that failed must not leave a worker behind
        Run(path).kill()


@pytest.fixture
def lab(serve):
    """A JupyterLab over the test's folder."""
    return serve()


@pytest.fixture
def page():
    from playwright.sync_api import sync_playwright

    PICTURES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        context = browser.new_context(viewport={"width": 1300, "height": 1400})
        context.set_default_timeout(180_000)
        opened = context.new_page()
        yield opened
        browser.close()


def run_all(page):
    page.locator(".jp-Notebook .jp-Cell").first.click()
    page.click("text=Run >> nth=0")
    page.click("text=Run All Cells >> nth=0")


def curve_of(page):
    return page.locator('.jp-OutputArea img[alt^="loss by step"]').get_attribute("src")


# colours of every piece of text in our outputs against what is behind it, as WCAG counts contrast
_CONTRASTS = """() => {
  const parse = text => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const over = (top, below) => { const a = top.length > 3 ? top[3] : 1; return [0, 1, 2].map(i => a * top[i] + (1 - a) * below[i]); };
  const behind = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
  };
  const light = colour => {
    const [r, g, b] = colour.map(c => c / 255).map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const element of document.querySelectorAll('.jp-OutputArea-output *')) {
    const text = [...element.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join('').trim();
    if (!text) continue;
    const ground = behind(element), colour = over(parse(getComputedStyle(element).color), ground);
    const [low, high] = [light(ground), light(colour)].sort((a, b) => a - b);
    found.push([(high + 0.05) / (low + 0.05), text.slice(0, 60)]);
  }
  return found;
}"""
MARKS = ("●", "▲", "◆")  # words beside them say the same
LEAST_CONTRAST = 2.7  # mid-tones read on light and dark pages alike


def faint(page, *, dark=False):
    """Return the texts of our outputs that can hardly be read; the page must be as dark as was asked for."""
    assert page.evaluate("document.body.dataset.jpThemeLight") == str(not dark).lower()
    found = page.evaluate(_CONTRASTS)
    assert len(found) > 5
    return [(ratio, text) for ratio, text in found if ratio < LEAST_CONTRAST and text not in MARKS]


@pytest.mark.parametrize(("front", "dark"), [("lab", False), ("notebook", True)])
def test_the_main_job_in_a_real_browser(serve, front, dark, page, tmp_path, tiny, data_file, wait_for, full):
    if front == "notebook" and not full:
        pytest.skip("sampled: --full looks at Notebook 7 too")
    lab = serve(front, dark=dark)
    recipe = (
        f"model: {tiny}\ndata: rows.jsonl\nbatch_size: 4\nmax_steps: 1000000\neval: {{steps: 500, max_new_tokens: 4}}\n"
    )
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell("%load_ext tune_magic"),
            nbformat.v4.new_code_cell(f"%%finetune bot\n{recipe}"),
        ],
        metadata={"kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}},
    )
    nbformat.write(notebook, tmp_path / "main.ipynb")
    lab.open(page, "main.ipynb")
    run_all(page)

    # the curve appears and moves
    page.wait_for_selector('.jp-OutputArea img[alt^="loss by step"]')
    first = curve_of(page)
    page.screenshot(path=PICTURES / f"live-{front}.png")
    page.wait_for_function(
        "old => document.querySelector('.jp-OutputArea img[alt^=\"loss by step\"]').src !== old", arg=first
    )
    shown = page.locator(".jp-OutputArea").last.inner_text()
    for word in (
        "training · step",
        "train loss",
        "held-out loss",
        "learning rate",
        "tokens / s",
        "this run",
        "peak",
        "system",
    ):
        assert word in shown, word

    # interrupt, and the card says how to go on
    page.keyboard.press("Escape")
    page.keyboard.press("i")
    page.keyboard.press("i")
    page.wait_for_selector("text=%tune resume bot")
    page.wait_for_selector("text=Stopped: bot was stopped at step")
    run = Run(max((tmp_path / "tune_runs").glob("2*")))
    assert run.status == "stopped"
    assert run.link["cell_id"] == notebook.cells[1].id
    assert run.link["notebook"].endswith("main.ipynb")
    assert faint(page, dark=dark) == []
    page.screenshot(path=PICTURES / f"stopped-{front}.png")
    page.keyboard.press("Control+s")
    deadline = time.monotonic() + 30
    while "stopped at step" not in (tmp_path / "main.ipynb").read_text() and time.monotonic() < deadline:
        time.sleep(0.2)
    saved = nbformat.read(tmp_path / "main.ipynb", as_version=4)
    assert "widgets" not in saved.metadata
    assert "application/vnd.jupyter" not in json.dumps(saved)

    # somebody else opens the saved file: no kernel, no trust, the card is there
    other = tmp_path / "sent"
    other.mkdir()
    for cell in saved.cells:
        cell.metadata.pop("trusted", None)
    saved.cells[1].source += "# changed, so the signature does not fit\n"
    nbformat.write(saved, other / "main.ipynb")
    lab.open(page, "sent/main.ipynb")
    page.wait_for_selector("text=%tune resume bot")
    picture = page.locator('.jp-OutputArea img[alt^="loss by step"]')
    picture.scroll_into_view_if_needed()
    assert picture.evaluate("image => image.complete && image.naturalWidth > 100")
    assert faint(page, dark=dark) == []
    page.screenshot(path=PICTURES / f"untrusted-{front}.png")


def notebook_in(folder, name, *cells):
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell) for cell in cells],
        metadata={"kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}},
    )
    nbformat.write(notebook, folder / name)


def newest_run(folder):
    return Run(max((folder / "tune_runs").glob("2*")))


def save(page, path, expected):
    """Save the notebook and wait until the file says what is expected."""
    page.keyboard.press("Escape")
    page.keyboard.press("Control+s")
    deadline = time.monotonic() + 30
    while expected not in path.read_text() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert expected in path.read_text()


def test_a_form_starts_a_run_that_a_button_stops_and_a_cell_watches_again(slow, lab, page, tmp_path, tiny, data_file):
    notebook_in(
        tmp_path,
        "form.ipynb",
        "%load_ext tune_magic",
        f"from tune_magic.widgets import FinetunePanel\nFinetunePanel('bot', model='{tiny}', data='rows.jsonl')",
        "1 + 1",
        "%tune watch bot",
    )
    lab.open(page, "form.ipynb")
    page.locator(".jp-Notebook .jp-Cell").first.click()
    for _ in range(3):
        page.keyboard.press("Shift+Enter")

    # the form: its recipe as a cell, faults while they are typed, the plan when there are none
    page.wait_for_selector("text=the cell that does the same")
    steps = page.locator("label:has-text('batch_size') + input")
    steps.fill("none")
    page.wait_for_selector("text=`batch_size`: must be a whole number, got 'none'.")
    assert page.locator('button:has-text("Start")').is_disabled()
    steps.fill("4")
    page.wait_for_selector("text=batch_size: 4")
    page.locator("text=all keys").click()
    page.locator("label:has-text('max_steps') + input").fill("1000000")
    page.locator("label:text-is('eval.steps') + input").fill("1000000")
    page.wait_for_selector("text=plan · nothing was trained")
    page.wait_for_selector("text=what it learns")
    page.screenshot(path=PICTURES / "form.png")

    # start: the form gives way to the run
    page.click('button:has-text("Start")')
    page.wait_for_selector("text=training · step")
    assert page.locator('button:has-text("Start")').count() == 0
    run = newest_run(tmp_path)
    assert run.name == "bot"
    assert run.recipe["batch_size"] == 4
    page.screenshot(path=PICTURES / "panel.png")

    # another reader of the page: reload, without the kernel's widgets the view is still there, and a cell re-attaches
    save(page, tmp_path / "form.ipynb", "training · step")
    lab.open(page, "form.ipynb")
    page.wait_for_selector("text=training · step")
    page.locator(".jp-Notebook .jp-Cell").last.click()
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector(".jp-Notebook .jp-Cell:nth-child(4) .jp-OutputArea >> text=training · step")
    page.screenshot(path=PICTURES / "watched-again.png")
    page.keyboard.press("Escape")
    page.keyboard.press("i")
    page.keyboard.press("i")  # ends the watching, not the run
    page.wait_for_selector("text=bot goes on.")
    assert run.is_live

    # the kernel restarts; a panel on the same run stops it by its button
    run_panel = "from tune_magic.widgets import RunPanel; import tune_magic; RunPanel(tune_magic.load_run('bot'))"
    notebook_in(tmp_path, "panel.ipynb", run_panel)
    lab.open(page, "panel.ipynb")
    run_all(page)
    page.wait_for_selector("text=training · step")
    page.click('button:has-text("Checkpoint now")')
    page.click('button:has-text("Stop")')
    page.wait_for_selector("text=stopped at step")
    assert run.status == "stopped"
    assert page.locator('button:has-text("Resume")').is_enabled()
    page.screenshot(path=PICTURES / "panel-stopped.png")
    at = run.summary().step
    page.click('button:has-text("Resume")')
    page.wait_for_selector("text=training · step")
    page.click('button:has-text("Stop")')
    page.wait_for_selector("text=stopped at step")
    assert run.summary().step >= at

    # what is saved is a card: no widget is needed to read it
    save(page, tmp_path / "panel.ipynb", "stopped at step")
    saved = nbformat.read(tmp_path / "panel.ipynb", as_version=4)
    cards = [o for o in saved.cells[0].outputs if "stopped at step" in o.get("data", {}).get("text/html", "")]
    assert len(cards) == 1
    assert set(cards[0].data) == {"text/html", "text/plain"}
    assert "widgets" not in saved.metadata


def test_a_finished_panel_leaves_no_widget_behind(slow, lab, page, tmp_path, tiny, data_file):
    notebook_in(
        tmp_path,
        "short.ipynb",
        "from tune_magic.widgets import FinetunePanel, MemoryGauge\n"
        f"FinetunePanel('short', model='{tiny}', data='rows.jsonl', max_steps=300)",
        "MemoryGauge(minutes=0.02)",
    )
    lab.open(page, "short.ipynb")
    run_all(page)
    page.wait_for_selector("text=memory at")
    page.click('button:has-text("Start")')
    page.wait_for_selector("text=finished · 300 steps")
    page.wait_for_function("() => document.querySelectorAll('.jupyter-widgets').length === 0")
    save(page, tmp_path / "short.ipynb", "finished · 300 steps")
    saved = json.dumps(nbformat.read(tmp_path / "short.ipynb", as_version=4))
    assert "application/vnd.jupyter.widget" not in saved
    assert (tmp_path / "short.ipynb").stat().st_size < 100_000  # however many steps
    page.screenshot(path=PICTURES / "panel-finished.png")


EVIL = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"


def test_f30_hostile_rows_names_and_errors_do_nothing_in_a_trusted_notebook(lab, page, tmp_path, tiny):
    rows = [{"prompt": f"{EVIL} {i}", "completion": f"{EVIL} {i % 3}", EVIL: "x"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": EVIL}) + "\n" + f"not json {EVIL}\n")
    recipe = f"model: {tiny}\ndata: rows.jsonl\nmax_steps: 4\nmax_length: 300\neval: {{max_new_tokens: 4}}\n"
    notebook_in(
        tmp_path, "evil.ipynb",
        "%load_ext tune_magic",
        f"%%finetune bot\n{recipe}",
        f"import tune_magic\nbot.note({EVIL!r})\nbot.show()",
        "%evaluate bot --limit 2 --max-new-tokens 2",
        f"%tune data rows.jsonl --model {tiny} max_length=300",
        "%tune runs",
        "try:\n    tune_magic.inspect('bad.jsonl')\nexcept Exception as error:\n    from tune_magic.view.html import note_bundle\n"
        "    tune_magic.display.show(note_bundle(str(error)))",
        f"%%finetune worse\nmodel: {EVIL!r}\ndata: bad.jsonl\n",
    )  # fmt: skip
    lab.open(page, "evil.ipynb")
    run_all(page)
    page.wait_for_selector(".jp-Notebook .jp-Cell:nth-child(8) .jp-OutputArea-output")
    page.wait_for_timeout(500)
    assert page.evaluate("window.hacked") is None
    text = page.locator(".jp-Notebook").inner_text()
    assert text.count("onerror=") >= 6  # shown as what it is, in card, note, report, data and errors
    page.screenshot(path=PICTURES / "hostile.png", full_page=True)


def test_a_second_run_waits_in_its_cell_and_two_tabs_see_the_same(slow, lab, page, tmp_path, tiny, data_file):
    recipe = f"model: {tiny}\ndata: rows.jsonl\nbatch_size: 4\nmax_steps: 1000000\neval: {{steps: 100000}}\n"
    notebook_in(
        tmp_path, "one.ipynb", "%load_ext tune_magic", f"%%finetune first --background\n{recipe}",
        f"%%finetune second\n{recipe}seed: 1\n",
    )  # fmt: skip
    notebook_in(tmp_path, "two.ipynb", "%load_ext tune_magic", "%tune watch first")
    lab.open(page, "one.ipynb")
    run_all(page)
    page.wait_for_selector("text=queued · 2nd in line, after first")
    page.wait_for_selector("text=/starts (about|after) \\d\\d:\\d\\d/")
    page.screenshot(path=PICTURES / "queued.png")

    # another tab, another kernel: the first run is seen live there as well
    tab = page.context.new_page()
    lab.open(tab, "two.ipynb")
    run_all(tab)
    tab.wait_for_selector("text=training · step")
    before = tab.locator("text=training · step").first.inner_text()
    tab.wait_for_function("old => !document.body.innerText.includes(old)", arg=before)
    # the same notebook in a second tab, and the first one closed: nothing is lost
    save(page, tmp_path / "one.ipynb", "queued")
    again = page.context.new_page()
    lab.open_busy(again, "one.ipynb")
    again.wait_for_selector("text=queued · 2nd in line, after first")
    page.close()
    first = next(run for run in map(Run, (tmp_path / "tune_runs").glob("2*")) if run.name == "first")
    second = next(run for run in map(Run, (tmp_path / "tune_runs").glob("2*")) if run.name == "second")
    assert (first.status, second.status) == ("running", "queued")
    first.stop()
    tab.wait_for_selector("text=stopped at step")
    deadline = time.monotonic() + 60
    while second.status != "running" and time.monotonic() < deadline:
        time.sleep(0.2)
    assert second.status == "running"
    second.stop()
    second.wait(30)
    assert second.status == "stopped"


def test_every_panel_works_alone_by_keyboard_and_leaves_text(slow, serve, page, tmp_path, tiny, data_file):
    lab = serve(dark=True)
    recipe = f"model: {tiny}\ndata: rows.jsonl\nbatch_size: 4\nmax_steps: 8\neval: {{max_new_tokens: 4}}\n"
    panels = {
        "data": f"data_panel = DataPanel('rows.jsonl', model='{tiny}'); data_panel",
        "chat": "chat_panel = ChatPanel('bot'); chat_panel",
        "export": "export_panel = ExportPanel('bot'); export_panel",
        "compare": "compare_panel = ComparePanel('bot', 'again'); compare_panel",
    }
    notebook_in(
        tmp_path, "panels.ipynb",
        "%load_ext tune_magic\nfrom tune_magic.widgets import *",
        f"%%finetune bot\n{recipe}",
        f"%%finetune again\n{recipe}learning_rate: 1e-3\n",
        *panels.values(),
        "for panel in (data_panel, chat_panel, export_panel, compare_panel): panel.close()\nprint('closed:', 4)",
    )  # fmt: skip
    lab.open(page, "panels.ipynb")
    cells = page.locator(".jp-Notebook .jp-Cell")
    cells.first.click()
    for _ in range(7):
        page.keyboard.press("Shift+Enter")

    # data: the rows as they are, then as the model sees them; another length is a cut
    page.wait_for_selector("text=first rows")
    page.wait_for_selector("text=label lens")
    page.locator("label:text-is('max_length') + input").fill("64")
    page.wait_for_selector("text=what was cut off")
    cells.nth(3).scroll_into_view_if_needed()
    page.screenshot(path=PICTURES / "panel-data.png")
    page.locator("button", has_text="max_length: ").click()  # the line that would mend it
    page.wait_for_selector("text=what was cut off", state="detached")
    assert int(page.locator("label:text-is('max_length') + input").input_value()) > 64

    # chat, without a mouse: type, tab to the button, press it
    page.wait_for_selector("text=chat · listening")
    message = page.locator("textarea[placeholder^='Say something']")
    message.focus()
    page.keyboard.type("item 3 is")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=/tuned · \\d+ tokens/", timeout=60_000)
    page.wait_for_selector("text=/base · \\d+ tokens/", timeout=60_000)
    assert "item 3 is" in cells.nth(4).locator(".jp-OutputArea-output").last.inner_text()
    assert message.input_value() == ""
    cells.nth(4).scroll_into_view_if_needed()
    page.screenshot(path=PICTURES / "panel-chat.png")

    # export
    cells.nth(5).locator("label:text-is('format') + select").select_option("merged")
    page.click('button:has-text("Export")')
    page.wait_for_selector("text=exported as merged")
    cells.nth(5).scroll_into_view_if_needed()
    page.screenshot(path=PICTURES / "panel-export.png")

    # compare
    page.wait_for_selector("text=learning_rate")
    unnamed = page.evaluate("""() => [...document.querySelectorAll(
        '.jupyter-widgets input, .jupyter-widgets textarea, .jupyter-widgets select, .jupyter-widgets button'
    )].filter(e => !(e.labels?.length || e.title || e.ariaLabel || e.innerText?.trim() || e.placeholder
        || e.closest('[title]') || e.parentElement.querySelector('label')?.innerText.trim())).map(e => e.outerHTML)""")
    assert unnamed == []
    assert faint(page, dark=True) == []

    # closed, all of it is text and pictures
    cells.nth(7).click()
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector(".jp-OutputArea >> text=closed: 4")  # cells out of sight are not in the page
    page.wait_for_function("() => document.querySelectorAll('.jupyter-widgets').length === 0")
    save(page, tmp_path / "panels.ipynb", "closed: 4")  # no earlier save says so
    saved = nbformat.read(tmp_path / "panels.ipynb", as_version=4)
    nbformat.validate(saved)
    assert "application/vnd.jupyter.widget" not in json.dumps(saved)
    for number, words in ((3, "cut off"), (4, "tuned:"), (5, "exported as merged"), (6, "learning_rate")):
        text = "".join(o.get("data", {}).get("text/plain", "") for o in saved.cells[number].outputs)
        assert words in text, number


def test_answers_are_rated_blind_by_mouse_and_keyboard(lab, page, tmp_path):
    """Keys reach the panel and never the notebook; neither page nor saved file tells whose answer is which."""
    run = Run(folder.create(tmp_path / "tune_runs", "finetune", {"name": "bot", "recipe": {}}))
    evaluation = folder.create(run.path / "evals", "evaluate", {})
    files.write_json(evaluation / "report.json", {"format": 1, "about": {"rows": 8}, "metrics": {}})
    rows = [
        {
            "row": i,
            "question": f"What is {i}? {EVIL}",
            "reference": "r",
            "base": f"first {i} {EVIL}",
            "tuned": f"second {i}",
        }
        for i in range(8)
    ]
    files.write_json_lines(evaluation / "rows.jsonl", rows)
    notebook_in(
        tmp_path,
        "rate.ipynb",
        "%load_ext tune_magic",
        "%tune rate bot --rater ann",
        "import tune_magic\ntune_magic.load_run('bot').report.rating()",
    )
    lab.open(page, "rate.ipynb")
    cells = page.locator(".jp-Notebook .jp-Cell")
    cells.first.click()
    page.keyboard.press("Shift+Enter")
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector("text=0 of 8 rated")
    page.screenshot(path=PICTURES / "rating.png")

    def votes():
        return [(vote.choice, vote.comment) for vote in VoteReader(evaluation).votes().values()]

    def rated(count):
        page.wait_for_selector(f"text={count} of 8 rated")

    # by keyboard alone: one key a vote
    keys = page.locator("input[placeholder^='type a vote']")
    keys.focus()
    page.keyboard.type("1")
    rated(1)
    page.keyboard.type("b")
    rated(2)
    page.keyboard.type("=")
    rated(3)
    # a click, and the next key is a vote, not a shortcut of the notebook (4 would make the cell a heading)
    page.click('button:has-text("Skip")')
    rated(4)
    page.keyboard.type("4")
    rated(5)
    # a comment, and back to the keys
    page.keyboard.press("Tab")
    page.keyboard.type("too long by far")
    page.keyboard.press("Shift+Tab")
    page.keyboard.type("2")
    rated(6)
    assert page.locator("textarea[placeholder^='comment']").input_value() == ""
    # back, where choice and comment are seen again; another vote goes on to the first open pair
    page.keyboard.type("6")
    page.wait_for_selector("text=You said: B is better.")
    assert page.locator("textarea[placeholder^='comment']").input_value() == "too long by far"
    page.keyboard.type("1")
    page.wait_for_selector("text=You said", state="detached")
    # buttons by tab and space
    page.locator('button:has-text("A is better")').focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    rated(7)
    assert votes() == [
        ("A", ""), ("B", ""), ("equal", ""), ("skip", ""), ("bad", ""), ("A", "too long by far"), ("B", "")
    ]  # fmt: skip
    assert cells.count() == 3
    assert page.locator(".jp-Notebook .jp-MarkdownCell").count() == 0
    assert page.evaluate("window.hacked") is None
    assert faint(page) == []
    page.screenshot(path=PICTURES / "rating-later.png")

    # neither page nor file tells; a text field keeps all keys to itself, so the save is typed elsewhere
    cells.first.click()
    save(page, tmp_path / "rate.ipynb", "7 of 8 rated")
    outputs = nbformat.read(tmp_path / "rate.ipynb", as_version=4).cells[1].outputs
    shown = page.evaluate("[...document.querySelectorAll('.jp-OutputArea')].map(e => e.outerHTML).join()")
    for text in (json.dumps(outputs), shown):
        assert "tuned" not in text
        assert "better on" not in text

    # the last one, and the end: what the votes say, without a widget
    keys.focus()
    page.keyboard.type("1")
    page.wait_for_selector("text=Every row has its vote")
    page.click('button:has-text("Finish")')
    page.wait_for_selector("text=rated against base on 7 rows")
    page.wait_for_function("() => document.querySelectorAll('.jupyter-widgets').length === 0")
    page.screenshot(path=PICTURES / "rating-done.png")
    cells.first.click()
    save(page, tmp_path / "rate.ipynb", "rated against base on 7 rows")
    assert "application/vnd.jupyter.widget" not in (tmp_path / "rate.ipynb").read_text()
