"""How long a process that resumes waits for its first batch, and for a row of every lane."""

import argparse
import json
import os
import time
from itertools import islice
from typing import Any

from benchmarks.data_parts.corpora import ROWS, prepared, stream, write_synthetic
from benchmarks.data_parts.processes import MIB, MemoryWatch, child, cpu_time_of, descendants
from benchmarks.data_parts.results import Results, at_most
from dist_transformer.config import DataConfig
from dist_transformer.data.manifest import load_manifest
from dist_transformer.data.stream import merge_states


def first_batch(options: argparse.Namespace, results: Results) -> None:
    """Seconds until a process that resumes in an epoch of 1,000 shards has its first batch."""
    folder = options.work / "thousand"
    prepared(folder, lambda: write_synthetic(folder, [3000] * 20, n_copies=50))
    for position in (0.0, 0.01, 0.33, 0.66, 0.99):
        found = [child("first_batch", folder, position) for _ in range(options.repeats)]
        for workers in ("0", "2"):
            seconds, cpu = (max(each[workers][i] for each in found) for i in (0, 1))
            what = f"1,000 shards, {position:.0%} of the epoch done, {workers} workers: first batch"
            results.add(what, seconds, "s", at_most(5))
            results.add(f"{what}, CPU time of all processes", cpu, "s")
    found = [child("every_lane", folder, 0.5) for _ in range(options.repeats)]
    what = "1,000 shards, half of the epoch done, 1 worker: the first row of every lane"
    results.add(what, max(each["seconds"] for each in found), "s")
    rss = max(each["rss"] for each in found)
    results.add("1,000 shards, 1 worker that holds all lanes: memory (RSS)", rss / MIB, "MiB", at_most(600))


def child_first_batch(folder: str, position: str) -> None:
    """Seconds, and CPU seconds of all processes, to the first batch by number of workers."""
    found = {}
    for workers in (0, 2):
        data = DataConfig(train=folder, max_source_len=512, max_target_len=114, workers=workers)
        state = state_at(data, float(position))
        start, own = time.perf_counter(), time.process_time()
        with stream(data, state=state) as batches:
            next(iter(batches))
            # The loader starts all processes that there are: none had run before.
            cpu = time.process_time() - own + sum(map(cpu_time_of, descendants(os.getpid())))
            found[str(workers)] = time.perf_counter() - start, cpu
    print(json.dumps(found))


def child_every_lane(folder: str, position: str) -> None:
    """Seconds until every lane gave a row, and the worker's memory then."""
    data = DataConfig(train=folder, max_source_len=512, max_target_len=114, workers=1)
    state = state_at(data, float(position))
    start = time.perf_counter()
    with stream(data, state=state) as batches, MemoryWatch() as watch:
        iterator = iter(batches)
        for _ in islice(iterator, -(-batches.n_lanes // ROWS)):
            pass
        seconds = time.perf_counter() - start
        # All windows exist now, and lanes build their next ones on the way.
        for _ in islice(iterator, 100 * batches.n_lanes // ROWS):
            pass
    print(json.dumps({"seconds": seconds, "rss": watch.largest.rss}))


def state_at(data: DataConfig, position: float) -> dict[str, Any]:
    """The state of a run that has each lane at a place of its first epoch: so far, and well inside a window."""
    fresh = stream(data)
    state = merge_states([fresh.state()])
    manifest = load_manifest(data.train or "")
    n_windows = fresh._plan.corpora[0].count_windows(0)
    assert fresh.n_lanes == len(manifest.train), "a lane has one shard, so that its place is a window of it"
    window = min(int(position * n_windows), n_windows - 1)
    # Rows are near the end of a window, where a lane builds the next one as well.
    cursor = [0, 0, window, 100 if position else 0]
    state["cursors"] = {"0": {str(lane): cursor for lane in range(fresh.n_lanes)}}
    state["rows"] = fresh.n_lanes * 1000 * window if position else 0
    return state
