"""A real JupyterLab in headless Chromium: run, watch the curve move, interrupt, save, reload without trust.

Pictures go to ``tests/screenshots``. Without Chromium the tests are skipped, visibly.
"""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

from tune_magic.handles import Run

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


@pytest.fixture
def lab(tmp_path, own_home):
    """A JupyterLab over the test's folder; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = tmp_path / "settings"
    apputils = settings / "@jupyterlab" / "apputils-extension"
    apputils.mkdir(parents=True)
    (apputils / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", "--ip=127.0.0.1", "--allow-root",
        "--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True", f"--ServerApp.root_dir={tmp_path}",
        f"--LabApp.user_settings_dir={settings}", f"--LabApp.workspaces_dir={tmp_path / 'workspaces'}",
    ]  # fmt: skip
    with (tmp_path / "lab.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(address + "/api", timeout=1):
                break
            time.sleep(0.2)
        yield address
        process.terminate()
        process.wait(20)
    for path in (tmp_path / "tune_runs").glob("2*"):  # a test that failed must not leave a worker behind
        Run(path).kill()


@pytest.fixture
def page():
    from playwright.sync_api import sync_playwright

    PICTURES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        opened = browser.new_page(viewport={"width": 1300, "height": 1400})
        opened.set_default_timeout(60_000)
        yield opened
        browser.close()


def open_notebook(page, lab, name):
    page.goto(f"{lab}/lab/tree/{name}?reset")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.wait_for_selector("text=Python 3 (ipykernel) | Idle", timeout=90_000)


def run_all(page):
    page.locator(".jp-Notebook .jp-Cell").first.click()
    page.click("text=Run >> nth=0")
    page.click("text=Run All Cells >> nth=0")


def curve_of(page):
    return page.locator('.jp-OutputArea img[alt^="loss by step"]').get_attribute("src")


def test_the_main_job_in_a_real_browser(lab, page, tmp_path, tiny, data_file, wait_for):
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
    open_notebook(page, lab, "main.ipynb")
    run_all(page)

    # the curve appears and moves
    page.wait_for_selector('.jp-OutputArea img[alt^="loss by step"]')
    first = curve_of(page)
    page.screenshot(path=PICTURES / "live.png")
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
    page.screenshot(path=PICTURES / "stopped.png")
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
    open_notebook(page, lab, "sent/main.ipynb")
    page.wait_for_selector("text=%tune resume bot")
    picture = page.locator('.jp-OutputArea img[alt^="loss by step"]')
    picture.scroll_into_view_if_needed()
    assert picture.evaluate("image => image.complete && image.naturalWidth > 100")
    page.screenshot(path=PICTURES / "untrusted.png")


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


def test_a_form_starts_a_run_that_a_button_stops_and_a_cell_watches_again(lab, page, tmp_path, tiny, data_file):
    notebook_in(
        tmp_path,
        "form.ipynb",
        "%load_ext tune_magic",
        f"from tune_magic.widgets import FinetunePanel\nFinetunePanel('bot', model='{tiny}', data='rows.jsonl')",
        "1 + 1",
        "%tune watch bot",
    )
    open_notebook(page, lab, "form.ipynb")
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
    page.wait_for_selector("text=plan · nothing was trained", timeout=90_000)
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
    page.reload()
    page.wait_for_selector("text=training · step")
    page.wait_for_selector("text=Python 3 (ipykernel) | Idle", timeout=90_000)
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
    open_notebook(page, lab, "panel.ipynb")
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


def test_a_finished_panel_leaves_no_widget_behind(lab, page, tmp_path, tiny, data_file):
    notebook_in(
        tmp_path,
        "short.ipynb",
        "from tune_magic.widgets import FinetunePanel, MemoryGauge\n"
        f"FinetunePanel('short', model='{tiny}', data='rows.jsonl', max_steps=20)",
        "MemoryGauge(minutes=0.02)",
    )
    open_notebook(page, lab, "short.ipynb")
    run_all(page)
    page.wait_for_selector("text=memory at")
    page.click('button:has-text("Start")')
    page.wait_for_selector("text=finished · 20 steps")
    page.wait_for_function("() => document.querySelectorAll('.jupyter-widgets').length === 0")
    save(page, tmp_path / "short.ipynb", "finished · 20 steps")
    saved = json.dumps(nbformat.read(tmp_path / "short.ipynb", as_version=4))
    assert "application/vnd.jupyter.widget" not in saved
    page.screenshot(path=PICTURES / "panel-finished.png")
