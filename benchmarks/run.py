"""Run every benchmark and print its table: ``make bench``."""

from __future__ import annotations

import first_step
import load_ext
import sft
import where_time_goes

if __name__ == "__main__":
    for benchmark in (load_ext, first_step, sft, where_time_goes):
        print(f"\n## {benchmark.__doc__.splitlines()[0]}\n")
        benchmark.main()
