"""What a server holds: many clients at once against one at a time, some of which leave in the middle of their answers.

    python benchmarks/serve.py [--model tiny] [--clients 48] [--requests 4] [--tokens 32] [--concurrent 16]

A run of two steps is served by a worker; this process is its clients. Each asks greedily, streamed, and its answers must be
those that were given to one client alone. Then the same again while every fourth client leaves after its first pieces.
Printed: tokens a second against one client alone, the median and the 99th percentile of the time to a whole answer, and
how many answers were lost, or another text.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

TINY = "tiny"
LEAVES = 4  # every fourth client
PIECES = 3  # after so many pieces
LIMIT_S = 600.0


@dataclass
class Told:
    """What clients saw."""

    texts: dict[int, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    left: int = 0
    errors: list[str] = field(default_factory=list)
    whole_s: float = 0.0


def write_rows(path: Path) -> None:
    """Write generated rows."""
    rows = [{"prompt": f"Count from {i}", "completion": f"{i}, {i + 1}, {i + 2}"} for i in range(64)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prompt(number: int) -> str:
    """Return a text that a language model goes on from for long; they differ, and in length."""
    return "".join(f"{number + step}, " for step in range(3 + number % 7))


async def ask(session: httpx.AsyncClient, number: int, tokens: int, told: Told, *, leaves: bool) -> None:
    """Ask once and read the answer as it comes."""
    body = {
        "model": "served", "prompt": prompt(number), "max_tokens": tokens, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    began, text, pieces = time.perf_counter(), "", 0
    async with session.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            told.errors.append(str(response.status_code))
            return
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                told.texts[number] = text
                told.seconds.append(time.perf_counter() - began)
                return
            if not line:
                continue
            part = json.loads(line.removeprefix("data: "))
            text += "".join(choice["text"] for choice in part["choices"])
            told.tokens += (part["usage"] or {}).get("completion_tokens", 0)
            pieces += 1
            if leaves and pieces == PIECES:
                told.left += 1
                return
    told.errors.append("the answer ended early")


async def clients(url: str, token: str, count: int, requests: int, tokens: int, *, leave: bool) -> Told:
    """Let clients ask at the same time, each one question after the other."""
    told = Told()
    limits = httpx.Limits(max_connections=None)
    headers = {"Authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=LIMIT_S, limits=limits) as session:

        async def client(place: int) -> None:
            for number in range(place, count * requests, count):
                await ask(session, number, tokens, told, leaves=leave and place % LEAVES == 0)

        began = time.perf_counter()
        await asyncio.gather(*map(client, range(count)))
        told.whole_s = time.perf_counter() - began
    return told


def main(
    *,
    model: str = TINY,
    num_clients: int = 48,
    requests: int = 4,
    tokens: int = 32,
    concurrent: int = 16,
    alone: int = 32,
) -> None:
    """Print the table."""
    import tune_magic
    from tune_magic.testing.models import make_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl")
        chosen = str(make_model(folder / TINY)) if model == TINY else model
        run = tune_magic.finetune(
            name="served", model=chosen, data={"train": str(folder / "rows.jsonl"), "held_out": 0}, max_steps=2,
            batch_size=2, method={"name": "lora", "r": 4}, eval={"samples": 0}, output=str(folder / "runs"),
        )  # fmt: skip
        with tune_magic.serve(run, max_concurrent=concurrent) as server:
            server.wait()
            url, token = server.url, str(server.token)
            asyncio.run(clients(url, token, 1, 2, tokens, leave=False))  # the first answers warm it up
            by_one = asyncio.run(clients(url, token, 1, alone, tokens, leave=False))
            by_many = asyncio.run(clients(url, token, num_clients, requests, tokens, leave=False))
            with_leavers = asyncio.run(clients(url, token, num_clients, requests, tokens, leave=True))
    leavers = len(range(0, num_clients, LEAVES)) * requests
    print("| clients | answers | tokens a second | against one | p50, s | p99, s | lost | another text |")
    print("|---|---|---|---|---|---|---|---|")
    rows = (("1", by_one, alone), (f"{num_clients}", by_many, num_clients * requests),
            (f"{num_clients}, {leavers // requests} of them leave", with_leavers, num_clients * requests - leavers))  # fmt: skip
    speed = by_one.tokens / by_one.whole_s
    for title, told, expected in rows:
        others = sum(by_many.texts.get(number, text) != text for number, text in told.texts.items())
        missing = expected - len(told.texts)
        own = told.tokens / told.whole_s
        slowest = statistics.quantiles(told.seconds, n=100)[98]
        print(
            f"| {title} | {len(told.texts)} | {own:.0f} | {own / speed:.2f} | {statistics.median(told.seconds):.2f} "
            f"| {slowest:.2f} | {max(0, missing)} | {others} |"
        )
    print(f"\nerrors: {[*by_one.errors, *by_many.errors, *with_leavers.errors] or 'none'}; left: {with_leavers.left}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=TINY)
    parser.add_argument("--clients", type=int, default=48)
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--concurrent", type=int, default=16)
    parser.add_argument("--alone", type=int, default=32)
    options = parser.parse_args()
    main(
        model=options.model, num_clients=options.clients, requests=options.requests, tokens=options.tokens,
        concurrent=options.concurrent, alone=options.alone,
    )  # fmt: skip
