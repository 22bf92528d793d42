"""Measure sides in turns: each in a process of its own, one step of each, again and again.

A machine's speed drifts; steps taken one after the other see the same machine. A side is a script that prints
``ready``, answers each line on standard input with one JSON line, and ends when the input does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

_QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def take_turns(commands: Mapping[str, Sequence[str]], rounds: int) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Run `rounds` steps of every side in turn.

    Args:
        commands: Arguments for Python, by side.
        rounds: Steps of each.

    Returns:
        The answers of each side, and the last thing each said after its input ended.
    """
    processes = {side: _start(arguments) for side, arguments in commands.items()}
    answers: dict[str, list[Any]] = {side: [] for side in commands}
    for side, process in processes.items():
        _expect_ready(side, process)
    for _ in range(rounds):
        for side, process in processes.items():
            process.stdin.write("\n")
            process.stdin.flush()
            answers[side].append(json.loads(_line(side, process)))
    last = {}
    for side, process in processes.items():
        process.stdin.close()
        last[side] = json.loads(_line(side, process))
        process.wait()
    return answers, last


def asked() -> bool:
    """Wait for the next turn; False when there is none. For the script of a side."""
    return bool(sys.stdin.readline())


def answer(value: Any) -> None:
    """Answer a turn. For the script of a side."""
    print(json.dumps(value), flush=True)


def _start(arguments: Sequence[str]) -> Any:
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **_QUIET},
    )  # fmt: skip


def _expect_ready(side: str, process: Any) -> None:
    while (line := process.stdout.readline()) != "ready\n":
        if not line:
            raise SystemExit(f"The side {side} ended before it was ready.")


def _line(side: str, process: Any) -> str:
    """Return the next line that is JSON; libraries print what they like in between."""
    while line := process.stdout.readline():
        if line[0] in "[{0123456789":
            return line
    raise SystemExit(f"The side {side} ended early.")
