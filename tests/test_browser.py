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


@pytest.fixture
def page():
    from playwright.sync_api import sync_playwright

    PICTURES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        opened = browser.new_page(viewport={"width": 1300, "height": 1000})
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


def test_a_panel_stops_a_background_run(lab, page, tmp_path, tiny, data_file):
    recipe = (
        f"model: {tiny}\ndata: rows.jsonl\nbatch_size: 4\nmax_steps: 1000000\neval: {{steps: 1000000, samples: 0}}\n"
    )
    cells = [
        "%load_ext tune_magic",
        f"%%finetune bot --background\n{recipe}",
        "from tune_magic.widgets import RunPanel\nRunPanel(bot)",
    ]
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell) for cell in cells],
        metadata={"kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}},
    )
    nbformat.write(notebook, tmp_path / "panel.ipynb")
    open_notebook(page, lab, "panel.ipynb")
    run_all(page)
    page.wait_for_selector("text=training · step")
    page.screenshot(path=PICTURES / "panel.png")
    page.click('button:has-text("Stop")')
    page.wait_for_selector("text=stopped at step")
    run = Run(max((tmp_path / "tune_runs").glob("2*")))
    assert run.status == "stopped"
    assert page.locator('button:has-text("Resume")').is_enabled()
    page.screenshot(path=PICTURES / "panel-stopped.png")
