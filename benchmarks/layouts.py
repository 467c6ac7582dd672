"""Twenty steps in every layout that fits on four CPU ranks, against one rank: the whole grid as a table.

    .venv/bin/python -m benchmarks.layouts [--presets modern_small] [--stages 0 1 2 3]

tp 1, 2, 4 x dp 1, 2, 4 x ZeRO stages x sequence parallelism on and off (gloo). For each: the largest relative
difference of a loss and of a clipped gradient norm, and whether the first weights are the same bits. Exit code 1 if a
loss differs by 1e-4 or more, or a bit of the first weights.
"""

import argparse
import sys
import time

import torch

from tests.dist.harness import run_ranks
from tests.dist.layouts import PRESETS, Case, Course, courses

LIMIT = 1e-4
LAYOUTS = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)]


def largest(found: list[float], expected: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def main() -> int:
    """Run the grid and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=PRESETS)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--limit-s", type=float, default=7200.0, help="for each start of ranks")
    options = parser.parse_args()
    began, n_runs, n_failed = time.perf_counter(), 0, 0
    [alone] = run_ranks(1, courses, [Case(preset) for preset in options.presets], limit_s=options.limit_s)
    expected: dict[str, Course] = dict(zip(options.presets, alone, strict=True))
    print("| tp x dp | stage | sequence parallel | model | loss | gradient norm | first weights |")
    print("|---|---|---|---|---|---|---|")
    for tp, dp in LAYOUTS:
        cases = [
            Case(preset, zero_stage=stage, sequence_parallel=sequence)
            for stage in options.stages
            for sequence in ((True, False) if tp > 1 else (False,))
            for preset in options.presets
        ]
        found = run_ranks(tp * dp, courses, cases, tp_degree=tp, limit_s=options.limit_s)[0]
        for case, mine in zip(cases, found, strict=True):
            whole = expected[case.preset]
            loss, norm = largest(mine.losses, whole.losses), largest(mine.norms, whole.norms)
            same = all(torch.equal(mine.initial[name], value) for name, value in whole.initial.items())
            n_runs, n_failed = n_runs + 1, n_failed + (loss >= LIMIT or not same)
            sequence = "yes" if case.sequence_parallel else "no"
            print(
                f"| {tp} x {dp} | {case.zero_stage} | {sequence if tp > 1 else '-'} | {case.preset} | {loss:.1e} | "
                f"{norm:.1e} | {'same bits' if same else 'DIFFER'} |",
                flush=True,
            )
    print(f"{n_runs} runs, {n_failed} failed, {time.perf_counter() - began:.0f} s")
    return int(n_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
