"""How fast the loader is: beside a bare webdataset loop, by number of workers, and with the fingerprint."""

import argparse
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data_parts.corpora import ROWS, documents, raw_corpus, stream
from benchmarks.data_parts.processes import cpu_time_of, descendants
from benchmarks.data_parts.results import Results, Target, at_least
from dist_transformer.config import DataConfig
from dist_transformer.data.batch import Batch
from dist_transformer.data.manifest import load_manifest
from dist_transformer.data.tokenizer import TextTokenizer

BARE_BATCH = 128
"""Samples that the bare loop sends at a time: about as many as are in a packed micro-batch of ours."""


def speed(options: argparse.Namespace, results: Results) -> None:
    """Ours against a bare webdataset loop on the same shards; tokens a second; what the fingerprint costs."""
    name, folder, data = raw_corpus(options)
    pairs = [
        (samples_rate(data, options.windows), bare_samples_rate(folder, options.windows))
        for _ in range(options.repeats)
    ]
    what = f"{name}, raw text, 1 worker"
    for loop, rates in zip(("ours", "bare webdataset loop"), zip(*pairs, strict=True), strict=True):
        add_rate(results, f"{what}: {loop}", rates, "samples")
    ratio = statistics.median(ours.a_second / bare.a_second for ours, bare in pairs)
    results.add(f"{what}: ours / bare", ratio, "x", at_least(0.8))
    ratio = statistics.median(ours.a_cpu_second / bare.a_cpu_second for ours, bare in pairs)
    results.add(f"{what}: ours / bare, by the worker's CPU time", ratio, "x")
    for workers in (0, 1, 2):
        data = documents(options, workers=workers)
        found = [tokens_rate(data, options.windows) for _ in range(options.repeats)]
        target = at_least(1.5e6) if workers == 2 else None
        what = f"tokenised documents of 250 to 750, {workers} workers"
        add_rate(results, what, found, "tokens", target)
    plain = min(cpu_seconds(documents(options)) for _ in range(options.repeats))
    hashed = min(cpu_seconds(documents(options, fingerprint=True)) for _ in range(options.repeats))
    results.add("CPU time of the loader with data.fingerprint / without", hashed / plain, "x")


@dataclass(frozen=True)
class Rate:
    """An amount in a stretch of time."""

    a_second: float
    a_cpu_second: float
    """Of CPU time of the loader workers together; of this process where there are none."""


def add_rate(
    results: Results, what: str, rates: Iterable[Rate], unit: str, target: Target | None = None
) -> None:
    """Record the median of both figures: on a busy machine, CPU time says what a worker could do."""
    rates = list(rates)
    results.add(what, statistics.median(rate.a_second for rate in rates), f"{unit}/s", target)
    by_cpu = statistics.median(rate.a_cpu_second for rate in rates)
    results.add(f"{what}, by its own CPU time", by_cpu, f"{unit}/CPU s")


class Stopwatch:
    """Wall and CPU time from now on."""

    def __init__(self) -> None:
        self._workers = {process: cpu_time_of(process) for process in descendants(os.getpid())}
        self._own = time.process_time()
        self._start = time.perf_counter()

    def rate(self, amount: float) -> Rate:
        """Of what was done since."""
        seconds = time.perf_counter() - self._start
        cpu = sum(cpu_time_of(process) - before for process, before in self._workers.items())
        return Rate(amount / seconds, amount / (cpu or time.process_time() - self._own))


def samples_rate(data: DataConfig, n_windows: int) -> Rate:
    """Pairs that come out of the stream."""
    return steady_rate(data, lambda batch: batch.n_pairs, n_windows)


def tokens_rate(data: DataConfig, n_windows: int) -> Rate:
    """Tokens of documents that come out of the stream: sentinels and EOS are not counted."""
    tokenizer = TextTokenizer.load(load_manifest(data.train or "").tokenizer_path)
    is_text = np.ones(tokenizer.vocab_size, bool)
    is_text[[tokenizer.pad_id, tokenizer.eos_id, *tokenizer.sentinel_ids]] = False

    def count_text(batch: Batch) -> int:
        sides = (batch.encoder_input_tokens, batch.decoder_target_tokens)
        return sum(int(is_text[side.numpy()].sum()) for side in sides)

    return steady_rate(data, count_text, n_windows)


def steady_rate(data: DataConfig, size: Callable[[Batch], int], n_windows: int) -> Rate:
    """Amount in time while every lane delivers so many windows, after each has delivered its first.

    A lane builds a window at once and delivers its rows one by one, so a stretch must hold whole windows; and at the
    start, the windows of all lanes have to be built before there are rows of all.
    """
    n_delivered: Counter[int] = Counter()
    total, watch = 0, Stopwatch()
    with stream(data) as batches:
        for batch in batches:
            total += size(batch)
            n_delivered.update(
                lane for lane, cursor in zip(batch.lanes, batch.cursors, strict=True) if cursor.row == 0
            )
            if len(n_delivered) < batches.n_lanes:
                total, watch = 0, Stopwatch()
            elif min(n_delivered.values()) > n_windows:
                return watch.rate(total)
    raise AssertionError("a stream has no end")


def cpu_seconds(data: DataConfig) -> float:
    """CPU time of this process for 12,288 rows, which are about a window of every lane."""
    with stream(data) as batches:
        iterator = iter(batches)
        for _ in islice(iterator, 24 * 512 // ROWS):  # about a window of every lane
            pass
        start = time.process_time()
        for _ in islice(iterator, 24 * 512 // ROWS):
            pass
        return time.process_time() - start


def bare_samples_rate(folder: Path, n_windows: int) -> Rate:
    """A plain webdataset pipeline in one DataLoader worker: read, decode, tokenise; no packing, no state.

    As many samples as ours has: a window of Multi30k's shards is a whole shard.
    """
    import webdataset
    from torch.utils.data import DataLoader

    manifest = load_manifest(folder)
    tokenizer = TextTokenizer.load(manifest.tokenizer_path)

    def tokenise(sample: dict[str, Any]) -> list[list[int]]:
        return [tokenizer.encode(text) for name, text in sample.items() if not name.startswith("__")]

    urls = [str(folder / shard.file) for shard in manifest.train]
    pipeline = webdataset.WebDataset(urls, shardshuffle=False).decode().map(tokenise).repeat()
    pipeline = pipeline.batched(BARE_BATCH, collation_fn=as_is)
    loader = DataLoader(pipeline, batch_size=None, num_workers=1, multiprocessing_context="fork")
    n_samples = n_windows * sum(shard.n_samples for shard in manifest.train)
    samples = iter(loader)
    next(samples)
    n_seen, watch = 0, Stopwatch()
    while n_seen < n_samples:
        n_seen += len(next(samples))
    return watch.rate(n_seen)


def as_is(items: Any) -> Any:
    """A batch is the list of its samples: nothing is stacked."""
    return items
