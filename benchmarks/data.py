"""The data layer measured: how full rows are, loader speed, time to the first batch, memory of a loader worker.

    python benchmarks/data.py [fill] [speed] [first_batch] [memory] [--corpora DIR] [--work DIR] [--json FILE]

Without a name, all four. `--corpora` is a folder with multi30k/train.{en,de}, e2e/train.{mr,ref} and novels/train*;
without it, the figures that need them are left out, and made-up sentences stand in for the comparison of speed.
All that is written lies under `--work` (a temporary folder by default) and is removed at the end; `--keep` leaves
shards there for the next time. Speeds are compared with others of the same run: the noise of a busy machine is on
both sides. The first column of the last table says whether a figure is what docs/data.md promises.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

# One thread a loader process, for us and for what we are compared with. Read when the libraries are imported.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.data_parts.fill import fill
from benchmarks.data_parts.first_batch import child_every_lane, child_first_batch, first_batch
from benchmarks.data_parts.memory import child_memory, memory
from benchmarks.data_parts.results import Results
from benchmarks.data_parts.speed import speed

PARTS: dict[str, Callable[[argparse.Namespace, Results], None]] = {
    "fill": fill,
    "speed": speed,
    "first_batch": first_batch,
    "memory": memory,
}
CHILDREN: dict[str, Callable[..., None]] = {
    "first_batch": child_first_batch,
    "every_lane": child_every_lane,
    "memory": child_memory,
}


def main() -> None:
    """Measure what the command line names; with `--child`, the one function that a part asked for."""
    if sys.argv[1:2] == ["--child"]:
        CHILDREN[sys.argv[2]](*sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"{', '.join(PARTS)}; none: all")
    parser.add_argument("--corpora", type=Path, help="folder with multi30k/, e2e/ and novels/")
    parser.add_argument("--work", type=Path, help="folder for shards (default: a temporary one)")
    parser.add_argument("--keep", action="store_true", help="leave the shards in --work")
    parser.add_argument("--windows", type=int, default=2, help="of each lane in a timed stretch (default: 2)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed stretches of each, in turns (default: 3)"
    )
    parser.add_argument(
        "--memory-gb", type=float, default=4.0, help="streamed by the memory part (default: 4)"
    )
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    chosen = options.parts or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if options.keep and options.work is None:
        parser.error("--keep needs --work")
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
    if not options.keep:
        options.work = Path(tempfile.mkdtemp(prefix="data-benchmark-", dir=options.work))
    results = Results()
    try:
        for part in chosen:
            print(f"\n{part}", flush=True)
            PARTS[part](options, results)
    finally:
        if not options.keep:
            shutil.rmtree(options.work)
    print("\nall", *results.figures, sep="\n", flush=True)
    if options.json:
        rows = [asdict(figure) | {"target": str(figure.target or "")} for figure in results.figures]
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
