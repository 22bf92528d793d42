"""``%tune doctor``: is everything there that runs need, and what to do where it is not.

What must be imported to be known is looked at in a process of its own, as a worker would see it.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

import psutil

from tune_magic import display
from tune_magic.executors import standby
from tune_magic.models.find import installed
from tune_magic.storage import places

DISTRIBUTION = "tune-magic"
_LEAST_MEMORY_BYTES = 4e9
_LEAST_DISK_BYTES = 5e9
_LIMIT_S = 120.0
_PROBE = """
import json, os, sys
found = {}
try:
    import torch
    found["torch"] = torch.__version__
    found["cuda_build"] = torch.version.cuda
    found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    found["threads"] = torch.get_num_threads()
    import transformers, peft
    from tune_magic import plugins
    found["broken"] = [[row.kind, row.name, row.origin, row.problem] for row in plugins.listing() if row.problem]
except BaseException as error:
    found["error"] = f"{type(error).__name__}: {error}"
os.write(1, ("\\n" + json.dumps(found) + "\\n").encode())
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What.
        verdict: ok, warning or problem.
        says: What was found.
        do: What to do about it; empty where nothing is to be done.
    """

    name: str
    verdict: Literal["ok", "warning", "problem"]
    says: str
    do: str = ""


class CheckUp:
    """What `check` found.

    Attributes:
        findings: In the order in which they were looked at.
        ok: Whether runs can be started.
    """

    def __init__(self, findings: list[Finding]) -> None:
        self.findings = findings
        self.ok = all(finding.verdict != "problem" for finding in findings)

    def card(self) -> dict[str, str]:
        """Return it as HTML and as text."""
        from tune_magic.view.doctor import findings_card

        return findings_card(self.findings)

    def show(self) -> None:
        """Show it: in a notebook as HTML, elsewhere as text."""
        display.show(self.card())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return self.card()

    def __repr__(self) -> str:
        wrong = [finding.name for finding in self.findings if finding.verdict != "ok"]
        return f"<CheckUp {'all well' if not wrong else 'look at ' + ', '.join(wrong)}>"


def check() -> CheckUp:
    """Look at versions, device, memory, disk, caches, plug-ins and front end."""
    probed = _probe()
    found = [_python(), *_packages(), *_libraries(probed), *_device(probed), *_memory(), *_folders()]
    return CheckUp([*found, *_plugins(probed), *_hub(), *_front_end()])


def _python() -> Finding:
    return Finding("Python", "ok", f"{platform.python_version()} in {sys.prefix}")


def _packages() -> Iterator[Finding]:
    """Compare what is installed with what this package asks for."""
    from packaging.requirements import Requirement

    wrong = []
    for line in requires(DISTRIBUTION) or []:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            there = version(wanted.name)
        except PackageNotFoundError:
            wrong.append((str(wanted), f"{wanted.name} is missing"))
            continue
        if not wanted.specifier.contains(there, prereleases=True):
            wrong.append((str(wanted), f"{wanted.name} is {there}, needed {wanted.specifier}"))
    if wrong:
        names = " ".join(f'"{line.partition(";")[0].strip()}"' for line, _ in wrong)
        yield Finding("packages", "problem", "; ".join(text for _, text in wrong), f"pip install {names}")
    else:
        yield Finding("packages", "ok", f"{DISTRIBUTION} {version(DISTRIBUTION)} and all it needs")


def _probe() -> dict[str, Any]:
    """Import what a worker imports, in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _PROBE], capture_output=True, timeout=_LIMIT_S, check=False, text=True,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"importing torch and transformers takes longer than {_LIMIT_S:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return {"error": f"the process that imports them ended with {done.returncode}: {done.stderr[-200:].strip()}"}
    return dict(json.loads(lines[-1]))


def _libraries(probed: dict[str, Any]) -> Iterator[Finding]:
    if "error" in probed:
        advice = "Does `python -c 'import torch, transformers, peft'` work in this environment?"
        yield Finding("libraries", "problem", str(probed["error"]), advice)
    else:
        yield Finding(
            "libraries",
            "ok",
            f"torch {probed['torch']}, transformers {version('transformers')}, peft {version('peft')}",
        )


def _device(probed: dict[str, Any]) -> Iterator[Finding]:
    cores = os.cpu_count()
    if probed.get("gpus"):
        yield Finding("device", "ok", ", ".join(probed["gpus"]))
    elif shutil.which("nvidia-smi") and probed.get("torch") and not probed.get("cuda_build"):
        says = f"There is a GPU, but torch {probed['torch']} is a build for CPUs."
        yield Finding("device", "warning", says, "Install a CUDA build of torch.")
    else:
        yield Finding("device", "ok", f"no GPU; {cores} CPU cores, {probed.get('threads', '?')} threads")
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and cores and int(threads) < cores // 2:
        yield Finding(
            "threads", "warning", f"OMP_NUM_THREADS is {threads}, of {cores} cores.", "Unset it, or training is slower."
        )


def _memory() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    says = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    if memory.available < _LEAST_MEMORY_BYTES:
        yield Finding("memory", "warning", says, "Close other programs; `--dry-run` tells what a run needs.")
    else:
        yield Finding("memory", "ok", says)


def _folders() -> Iterator[Finding]:
    for name, folder in (("runs", places.default_root()), ("cache", places.cache_folder())):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not os.access(there, os.W_OK):
            yield Finding(f"{name} folder", "problem", f"{folder} cannot be written.", "Work in a folder of your own.")
            continue
        free = shutil.disk_usage(there).free
        says = f"{folder} · {free / 1e9:.0f} GB free"
        low = free < _LEAST_DISK_BYTES
        advice = "Delete runs (`%tune rm`), or work on another disk." if low else ""
        yield Finding(f"{name} folder", "warning" if low else "ok", says, advice)


def _plugins(probed: dict[str, Any]) -> Iterator[Finding]:
    broken = probed.get("broken")
    if broken:
        for kind, name, origin, problem in broken:
            yield Finding("plug-ins", "warning", f"{kind} `{name}` of {origin}: {problem}", f"pip install -U {origin}")
    elif broken is not None:
        yield Finding("plug-ins", "ok", "all of them import")


def _hub() -> Iterator[Finding]:
    models = ", ".join(installed()) or "no model from a wheel"
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    yield Finding("models", "ok", f"{models} · the hub is {'off (HF_HUB_OFFLINE)' if offline else 'asked for others'}")


def _front_end() -> Iterator[Finding]:
    """What shows cards and panels, as far as this process can know it."""
    if not display.in_kernel():
        yield Finding("front end", "ok", "a terminal: text only")
        return
    where = "VS Code" if "VSCODE_PID" in os.environ else "Colab" if "COLAB_RELEASE_TAG" in os.environ else "Jupyter"
    missing = [name for name in ("ipywidgets", "jupyterlab_widgets") if not _is_there(name)]
    says = f"{where}, ipykernel {version('ipykernel')}"
    if missing and where == "Jupyter":
        yield Finding("front end", "warning", f"{says}; {', '.join(missing)} is missing, so panels stay blank.",
                      "pip install ipywidgets, then reload the page")  # fmt: skip
    else:
        yield Finding("front end", "ok", says)
    if Path("torch.py").exists() or Path("transformers.py").exists():
        yield Finding("working folder", "warning", "It holds torch.py or transformers.py, which your own cells would import.",
                      "Rename the file; workers are not affected.")  # fmt: skip
    yield Finding(
        "standby", "ok", "ready" if standby.is_ready() else "not there: the next run starts a few seconds later"
    )


def _is_there(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True
