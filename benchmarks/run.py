"""Run every benchmark and print its table: ``make bench``."""

from __future__ import annotations

import time

import choose
import classify
import compress
import first_step
import generate
import load_ext
import many_runs
import peak_memory
import quantised
import serve
import sft
import tokenise
import view
import where_time_goes

ALL = (
    load_ext, many_runs, first_step, sft, where_time_goes, classify, generate, choose, peak_memory, quantised, compress, serve,
    tokenise, view,
)  # fmt: skip

if __name__ == "__main__":
    for benchmark in ALL:
        print(f"\n## {benchmark.__doc__.splitlines()[0]}\n")
        started = time.perf_counter()
        benchmark.main()
        print(f"\n({time.perf_counter() - started:.0f} s)", flush=True)
