"""How much memory a loader worker takes while it streams large shards."""

import argparse
import json
import time

from benchmarks.data_parts.corpora import prepared, stream, write_synthetic
from benchmarks.data_parts.processes import MIB, MemoryWatch, child
from benchmarks.data_parts.results import Results, at_most
from dist_transformer.config import DataConfig
from dist_transformer.data.manifest import load_manifest


def memory(options: argparse.Namespace, results: Results) -> None:
    """The largest memory of a loader worker while it streams shards of 1 GB once."""
    folder = options.work / "large"
    n_shards = max(1, round(options.memory_gb))
    # A document of 500 tokens of 4 bytes, its tar header and padding.
    per_shard = int(options.memory_gb * 1e9 / n_shards / (2000 + 512 + 256))
    print(f"writing {n_shards} shards of {per_shard:,} documents", flush=True)
    prepared(folder, lambda: write_synthetic(folder, [per_shard] * n_shards, token_dtype="u32"))
    n_bytes = sum(shard.bytes for shard in load_manifest(folder).train)
    workers = 2 if n_shards % 2 == 0 else 1
    found = child("memory", folder, workers)
    what = f"{n_bytes / 1e9:.1f} GB in {n_shards} shards, {workers} workers: memory of a worker"
    results.add(f"{what} (RSS)", found["rss"] / MIB, "MiB", at_most(600))
    results.add(f"{what} (PSS)", found["pss"] / MIB, "MiB")
    results.add(f"{what} at the end of the first window (RSS)", found["early_rss"] / MIB, "MiB")
    results.add(f"{n_bytes / 1e9:.1f} GB streamed", found["tokens"] / found["seconds"], "tokens/s")


def child_memory(folder: str, workers: str) -> None:
    """Stream an epoch and watch the workers."""
    data = DataConfig(train=folder, max_source_len=512, max_target_len=114, workers=int(workers))
    n_tokens, start, early = 0, time.perf_counter(), 0
    at_their_end: set[int] = set()
    with stream(data) as batches, MemoryWatch() as watch:
        for i, batch in enumerate(batches):
            n_tokens += batch.n_source_tokens + batch.n_target_tokens
            at_their_end.update(
                lane for lane, cursor in zip(batch.lanes, batch.cursors, strict=True) if cursor.epoch
            )
            early = early or (watch.largest.rss if i == 100 else 0)
            if len(at_their_end) == batches.n_lanes:
                break
    seconds = time.perf_counter() - start
    figures = {"rss": watch.largest.rss, "pss": watch.largest.pss, "early_rss": early}
    print(json.dumps(figures | {"tokens": n_tokens, "seconds": seconds}))
