"""Save in each layout, go on in every other: the largest relative difference of the next ten losses, as a table.

    .venv/bin/python -m benchmarks.reshard [--stages 1 2 3] [--precision fp32]

{tp 1 dp 2, tp 2 dp 1, tp 2 dp 2, dp 4} x stages on CPU ranks (gloo); exit code 1 if a difference is 1e-4 or more.
"""

import argparse
import sys
import tempfile
import time

from tests.dist.harness import run_ranks
from tests.dist.resharding import Place, largest_difference, resume_all, save_all

LIMIT = 1e-4
LAYOUTS = [(1, 2), (2, 1), (2, 2), (1, 4)]
PRESETS = ("modern_small", "t5_v1_1_small", "vaswani2017_base")


def main() -> int:
    """Run all crossings and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--preset", choices=PRESETS, default=PRESETS[0])
    parser.add_argument("--limit-s", type=float, default=3600.0, help="for each of the four starts of ranks")
    options = parser.parse_args()
    places = [Place(tp, dp, stage, preset=options.preset) for tp, dp in LAYOUTS for stage in options.stages]
    crossings = [(source, target) for source in places for target in places if source != target]
    began = time.perf_counter()
    expected: dict[str, list[float]] = {}
    found: dict[tuple[Place, Place], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in (2, 4):
            here = [place for place in places if place.world_size == size]
            expected |= run_ranks(size, save_all, here, folder, limit_s=options.limit_s)[0]
        for size in (2, 4):
            into = [pair for pair in crossings if pair[1].world_size == size]
            losses = run_ranks(size, resume_all, into, folder, limit_s=options.limit_s)[0]
            found |= dict(zip(into, losses, strict=True))
    differences = {
        (source, target): largest_difference(expected[f"{source.preset}-{source}"], losses)
        for (source, target), losses in found.items()
    }
    print_table(places, differences)
    worst = max(differences.values())
    print(
        f"{len(differences)} crossings of {options.preset}, largest relative difference {worst:.1e}, "
        f"{sum(d >= LIMIT for d in differences.values())} at or above {LIMIT:.0e}, "
        f"{time.perf_counter() - began:.0f} s"
    )
    return int(worst >= LIMIT)


def print_table(places: list[Place], differences: dict[tuple[Place, Place], float]) -> None:
    """Rows: saved in; columns: resumed in."""
    names = [str(place) for place in places]
    width = max(map(len, names))
    print(f"| {'saved in'.ljust(width)} | " + " | ".join(names) + " |")
    print(f"|{'-' * (width + 2)}|" + "".join(f"{'-' * (len(name) + 2)}|" for name in names))
    for source in places:
        cells = [f"{differences[source, target]:.1e}" if source != target else "" for target in places]
        row = " | ".join(cell.ljust(len(name)) for cell, name in zip(cells, names, strict=True))
        print(f"| {str(source).ljust(width)} | {row} |")


if __name__ == "__main__":
    sys.exit(main())
