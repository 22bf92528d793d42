"""Where the time of a LoRA step goes, for our engine and for a plain padded loop, beside the machine's own limit.

    python benchmarks/where_time_goes.py [--shared half]

The rows, the model and the two sides are those of `sft.py`. Printed: milliseconds of one step by kind of work, as torch's
profiler counts them, the median of three steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

import sft

KINDS = (
    ("products of the layers", ("aten::mm", "aten::addmm")),
    ("products added in place (LoRA)", ("aten::addmm_",)),
    ("attention", ("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_flash_attention_for_cpu_backward")),
    ("softmax over the vocabulary", ("aten::_log_softmax", "aten::_log_softmax_backward_data")),
    ("filling and copying", ("aten::fill_", "aten::copy_", "aten::cat", "aten::index_select", "aten::index_add_")),
    ("optimizer", ("aten::_fused_adamw_",)),
)  # fmt: skip
REST = "everything else"
WARM_UP, MEASURED = 2, 3


def profile(side: str, shared: str) -> dict[str, float]:
    """Return milliseconds by kind of work."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    step = sft.stepper(*sft.LOOPS[side](), sft.rows(shared, (WARM_UP + MEASURED) * sft.BATCH))
    for _ in range(WARM_UP):
        step()
    found = {kind: [] for kind, _ in KINDS} | {REST: []}
    for _ in range(MEASURED):
        with profiler(activities=[ProfilerActivity.CPU]) as seen:
            step()
        times = {event.key: event.self_cpu_time_total / 1000 for event in seen.key_averages()}
        for kind, names in KINDS:
            found[kind].append(sum(times.pop(name, 0.0) for name in names))
        found[REST].append(sum(times.values()))
    return {kind: statistics.median(values) for kind, values in found.items()}


def main(shared: str = "half") -> None:
    """Print the table; each side in a process of its own."""
    results = {}
    for side in sft.LOOPS:
        done = subprocess.run(
            [sys.executable, __file__, "--side", side, "--shared", shared],
            capture_output=True, text=True, check=True, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        )  # fmt: skip
        results[side] = json.loads(done.stdout.splitlines()[-1])
    print(f"shared prompt: {shared}\n\n| kind of work, ms a step | ours | plain |\n|---|---|---|")
    for kind in results["ours"]:
        print(f"| {kind} | {results['ours'][kind]:.0f} | {results['plain'][kind]:.0f} |")
    print(f"| all | {sum(results['ours'].values()):.0f} | {sum(results['plain'].values()):.0f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", choices=sft.SHARED_TOKENS, default="half")
    parser.add_argument("--side", choices=sft.LOOPS)
    options = parser.parse_args()
    if options.side:
        print("\n" + json.dumps(profile(options.side, options.shared)))
    else:
        main(options.shared)
