"""Seconds from `sbatch` to the first step, part by part, on a real Slurm cluster of two nodes on this machine.

    .venv/bin/python -m benchmarks.startup [--repeats 3] [--nodes 2]

Runs of two steps, started by torchrun and by srun in turn. On a cluster of your own the same figures are in
RUN_DIR/startup.jsonl, and in short in the log and in `dist-transformer status`. Two nodes share this machine's cores:
what is computed (CPU seconds of rank zero) says more than the clock.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.chaos import write_inputs
from dist_transformer.tracking.startup import STARTUP_NAME
from tests.e2e.conftest import environment
from tests.tools.slurm import Cluster, start_cluster, why_not

LAUNCHERS = ("torchrun", "srun")


def start_once(cluster: Cluster, config: Path, run_dir: Path, launcher: str, nodes: int) -> dict[str, Any]:
    """One job of two steps: its line of `startup.jsonl`."""
    cluster.submit(run_dir, config, "--launcher", launcher, nodes=str(nodes)).finish()
    (line,) = (run_dir / STARTUP_NAME).read_text(encoding="utf-8").splitlines()
    return dict(json.loads(line))


def table(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Medians by launcher: seconds, and CPU seconds of rank zero where it was there already."""
    names = dict.fromkeys(name for found in rows.values() for row in found for name in row["seconds"])
    lines = [f"{'':<15}" + "".join(f"{launcher:>20}" for launcher in rows)]
    for name in names:
        cells = []
        for found in rows.values():
            seconds = statistics.median(row["seconds"].get(name, 0.0) for row in found)
            cpu = [row["cpu_seconds"][name] for row in found if name in row["cpu_seconds"]]
            cells.append(f"{seconds:.2f} s" + (f" ({statistics.median(cpu):.2f} CPU)" if cpu else ""))
        lines.append(f"{name:<15}" + "".join(f"{cell:>20}" for cell in cells))
    totals = [statistics.median(sum(row["seconds"].values()) for row in found) for found in rows.values()]
    return [*lines, f"{'in all':<15}" + "".join(f"{total:>18.2f} s" for total in totals)]


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--nodes", type=int, default=2, choices=(1, 2))
    options = parser.parse_args()
    if reason := why_not("loopback"):
        print(reason, file=sys.stderr)
        return 1
    rows: dict[str, list[dict[str, Any]]] = {launcher: [] for launcher in LAUNCHERS}
    with (
        tempfile.TemporaryDirectory(prefix="startup-") as name,
        start_cluster("loopback", environment()) as cluster,
    ):
        config = write_inputs(Path(name), n_steps=2, dashboard=False)
        for repeat in range(options.repeats):
            for launcher in LAUNCHERS:
                run_dir = Path(name) / f"{launcher}-{repeat}"
                rows[launcher].append(start_once(cluster, config, run_dir, launcher, options.nodes))
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
