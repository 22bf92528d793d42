"""Loading the extension: milliseconds of `%load_ext tune_magic` as in a kernel, the standby's start included.

python benchmarks/load_ext.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

RUNS = 7
CODE = """
import json, sys, time
from IPython.terminal.interactiveshell import TerminalInteractiveShell
shell = TerminalInteractiveShell.instance()
shell.kernel = object()  # with a kernel, a standby is started too
started = time.perf_counter()
shell.run_line_magic("load_ext", "tune_magic")
seconds = time.perf_counter() - started
heavy = [name for name in ("torch", "transformers", "pydantic", "ipywidgets") if name in sys.modules]
shell.run_line_magic("unload_ext", "tune_magic")
print(json.dumps([1000 * seconds, heavy]))
"""


def main() -> None:
    """Print the table."""
    results = [
        json.loads(subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout)
        for _ in range(RUNS)
    ]
    times = [milliseconds for milliseconds, _ in results]
    print("| runs | median ms | slowest ms | heavy imports |")
    print("|---|---|---|---|")
    print(f"| {RUNS} | {statistics.median(times):.0f} | {max(times):.0f} | {results[0][1] or 'none'} |")


if __name__ == "__main__":
    main()
