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
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

# One thread a loader process, for us and for what we are compared with. Read when the libraries are imported.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from dist_transformer.config import DataConfig
from dist_transformer.data.batch import Batch
from dist_transformer.data.manifest import DTYPES, Manifest, ShardInfo, load_manifest, sha256_of
from dist_transformer.data.prepare import prepare_pairs, prepare_text
from dist_transformer.data.shards import write_shard
from dist_transformer.data.stream import TrainStream, merge_states
from dist_transformer.data.tokenizer import TextTokenizer

ROWS = 16
"""Rows of a micro-batch in all measurements."""
FILL_ROWS = 2000
"""Rows over which their filling is measured."""
BARE_BATCH = 128
"""Samples that the bare loop sends at a time: about as many as are in a packed micro-batch of ours."""
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Target:
    """What a figure should be."""

    bound: float
    is_least: bool

    def __str__(self) -> str:
        return f"{'>=' if self.is_least else '<='} {self.bound:,g}"

    def is_met(self, value: float) -> bool:
        return value >= self.bound if self.is_least else value <= self.bound


def at_least(bound: float) -> Target:
    return Target(bound, True)


def at_most(bound: float) -> Target:
    return Target(bound, False)


@dataclass(frozen=True)
class Figure:
    """One measured value."""

    what: str
    value: float
    unit: str
    target: Target | None

    def __str__(self) -> str:
        verdict = "    " if self.target is None else "met " if self.target.is_met(self.value) else "MISS"
        value = f"{self.value:,.0f}" if abs(self.value) >= 1000 else f"{self.value:,.2f}"
        return f"{verdict} {self.what:<78} {value:>12} {self.unit:<10} {self.target or ''}"


class Results:
    """What was measured."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []

    def add(self, what: str, value: float, unit: str, target: Target | None = None) -> None:
        """Record a figure and show it."""
        self.figures.append(Figure(what, value, unit, target))
        print(self.figures[-1], flush=True)


def main() -> None:
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


def stream(data: DataConfig, **options: Any) -> TrainStream:
    """The stream of a run on one rank."""
    return TrainStream(data, seed=1, dp_rank=0, dp_size=1, micro_batch_size=ROWS, **options)


def prepared(folder: Path, prepare: Callable[[], Any]) -> Path:
    """The folder of shards, prepared where it is not there yet."""
    if not (folder / "manifest.json").exists():
        prepare()
    return folder


# ---- fill ----------------------------------------------------------------------------------------------------


def fill(options: argparse.Namespace, results: Results) -> None:
    """Share of both sides of packed rows that holds tokens."""
    for name, data in corpora(options):
        tokens, n_rows = np.zeros(2), 0
        with stream(data) as batches:
            for batch in islice(batches, FILL_ROWS // ROWS):
                tokens += batch.n_source_tokens, batch.n_target_tokens
                n_rows += len(batch.rows)
        lengths = data.max_source_len, data.max_target_len
        for side, n_tokens, length in zip(("source", "target"), tokens, lengths, strict=True):
            what = f"{name}, rows of {lengths[0]} / {lengths[1]}: {side} side filled"
            # A window of UL2 holds few documents of its longest spans: nothing is promised.
            target = at_least(97) if data.objective != "ul2" else None
            results.add(what, 100 * n_tokens / (n_rows * length), "%", target)


def corpora(options: argparse.Namespace) -> Iterator[tuple[str, DataConfig]]:
    """The corpora that are there, with row lengths that suit them."""
    yield "documents of 250 to 750 tokens", documents(options)
    if options.corpora is None:
        return
    for name, sides, vocabulary, source_len in (
        ("Multi30k en-de", ("multi30k/train.en", "multi30k/train.de"), 6000, 128),
        ("E2E NLG", ("e2e/train.mr", "e2e/train.ref"), 2000, 256),
    ):
        files = [options.corpora / side for side in sides]
        if files[0].exists():
            folder = options.work / sides[0].split("/")[0]
            yield name, pairs_config(pair_shards(folder, files, vocab_size=vocabulary), source_len)
    if novels := sorted((options.corpora / "novels").glob("train*")):
        folder = options.work / "novels"
        prepared(folder, lambda: prepare_text(novels, folder, documents="paragraph", vocab_size=8000))
        lengths = {"max_source_len": 512, "max_target_len": 114}
        yield "novels, span corruption", DataConfig(train=str(folder), workers=0, **lengths)
        yield "novels, UL2", DataConfig(train=str(folder), workers=0, objective="ul2", max_target_len=248)


def pair_shards(folder: Path, files: list[Path], **options: Any) -> Path:
    """A source and a target file, prepared."""
    return prepared(folder, lambda: prepare_pairs([(files[0], files[1])], folder, **options))


def pairs_config(folder: Path, source_len: int) -> DataConfig:
    """Rows of so many source tokens, and of as many target tokens as stand against them in the corpus."""
    shards = load_manifest(folder).train
    n_source = sum(shard.n_source_tokens + shard.n_samples for shard in shards)
    n_target = sum(shard.n_target_tokens + shard.n_samples for shard in shards)
    lengths = {"max_source_len": source_len, "max_target_len": round(source_len * n_target / n_source)}
    return DataConfig(train=str(folder), objective="pairs", workers=0, **lengths)


def documents(options: argparse.Namespace, **changes: Any) -> DataConfig:
    """Tokenised documents of 250 to 750 random tokens: 24 shards, 24 M tokens, 4 windows a lane."""
    folder = options.work / "documents"
    prepared(folder, lambda: write_synthetic(folder, [2000] * 24))
    return DataConfig(train=str(folder), max_source_len=512, max_target_len=114, **{"workers": 0} | changes)


def write_synthetic(folder: Path, sizes: list[int], token_dtype: str = "u16", n_copies: int = 1) -> None:
    """A prepared folder of documents of 250 to 750 random tokens.

    Args:
        folder: To write.
        sizes: Documents of each shard.
        token_dtype: u16 or u32.
        n_copies: Names under which each shard is listed (hard links: only the first takes time and space).
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = TextTokenizer.train(iter(["some text for a tokenizer of bytes"]), 1000)
    tokenizer.save(folder / "tokenizer.json")
    infos: list[ShardInfo] = []
    for shard, n_documents in enumerate(sizes):
        random = np.random.default_rng(shard)
        lengths = random.integers(250, 751, n_documents)
        # Ids of bytes: those below are special, and those above may not exist.
        texts = ((random.integers(10, 250, n, dtype=np.uint16),) for n in lengths)
        info = write_shard(folder / f"train-{len(infos):05d}.tar", "text", DTYPES[token_dtype], texts)
        for _ in range(n_copies):
            infos.append(replace(info, file=f"train-{len(infos):05d}.tar"))
            if infos[-1].file != info.file:
                (folder / infos[-1].file).hardlink_to(folder / info.file)
    Manifest(
        root=folder,
        kind="text",
        train=tuple(infos),
        eval=(),
        tokenizer_sha256=sha256_of(folder / "tokenizer.json"),
        vocab_size=tokenizer.vocab_size,
        token_dtype=token_dtype,
    ).save()


# ---- speed ---------------------------------------------------------------------------------------------------


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


def raw_corpus(options: argparse.Namespace) -> tuple[str, Path, DataConfig]:
    """Raw shards of pairs: Multi30k where it is at hand, else made-up sentences."""
    name, files = "Multi30k", []
    if options.corpora is not None:
        files = [options.corpora / "multi30k" / f"train.{side}" for side in ("en", "de")]
    if not files or not files[0].exists():
        name, files = "made-up pairs", [options.work / f"raw.{side}" for side in ("source", "target")]
        for i, file in enumerate(files):
            file.write_text("\n".join(made_up_sentences(20000, seed=i)) + "\n", encoding="utf-8")
    folder = pair_shards(options.work / "raw", files, vocab_size=6000, raw=True)
    lengths = {"max_source_len": 128, "max_target_len": 128}
    return name, folder, DataConfig(train=str(folder), objective="pairs", workers=1, **lengths)


def made_up_sentences(n: int, seed: int) -> Iterator[str]:
    """Sentences of 5 to 20 words from a vocabulary of 5,000."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, 10, 5000)
    words = ["".join(chr(97 + c) for c in random.integers(0, 26, length)) for length in lengths]
    for length in random.integers(5, 20, n):
        yield " ".join(words[i] for i in random.zipf(1.5, length) % 5000)


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


def cpu_time_of(process: int) -> float:
    """Seconds that a process has run so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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
    return items


# ---- first batch ---------------------------------------------------------------------------------------------


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


def child(name: str, *arguments: Any) -> dict[str, Any]:
    """What a function of `CHILDREN` prints in a process of its own: nothing is warm there but the disk's cache."""
    command = [sys.executable, __file__, "--child", name, *map(str, arguments)]
    found: dict[str, Any] = json.loads(subprocess.check_output(command))
    return found


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


# ---- memory --------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Memory:
    """Bytes of a process."""

    rss: int = 0
    pss: int = 0


class MemoryWatch:
    """Looks twice a second at all processes below this one, which are loader workers and what starts them."""

    def __init__(self) -> None:
        self.largest = Memory()
        """The largest of each figure over processes and time."""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            for process in descendants(os.getpid()):
                seen = memory_of(process)
                self.largest = Memory(max(self.largest.rss, seen.rss), max(self.largest.pss, seen.pss))
            if self._done.wait(0.5):
                return


def descendants(process: int) -> list[int]:
    """Processes started by one, and by those."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # PID (NAME) STATE PPID ..., and a name may hold anything.
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        children.setdefault(parent, []).append(int(folder.name))
    found = list(children.get(process, ()))
    for each in found:
        found += children.get(each, ())
    return found


def memory_of(process: int) -> Memory:
    """Of one that runs; nothing of one that has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return Memory()
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines[1:])}
    return Memory(kib["Rss"] * 1024, kib["Pss"] * 1024)


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

if __name__ == "__main__":
    main()
