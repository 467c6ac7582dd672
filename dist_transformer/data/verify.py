"""Every shard of a folder read from its first byte to its last, and everything wrong with it found."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from dist_transformer.config.data import DataConfig
from dist_transformer.data.manifest import SPLITS, Manifest, ShardInfo, Split, load_manifest
from dist_transformer.data.pool import Workers
from dist_transformer.data.reader import ShardReader
from dist_transformer.data.shards import ShardSet
from dist_transformer.errors import DataError

_WINDOW = 1000


@dataclass(frozen=True)
class ShardReport:
    """What was found in a shard."""

    split: Split
    info: ShardInfo
    problem: str
    """The first thing that is wrong, a sentence; empty: nothing is."""
    n_bad: int
    """Samples that cannot be used."""


def verify(
    location: str, data: DataConfig, n_workers: int, advance: Callable[[int], Any]
) -> Iterator[ShardReport]:
    """Check all shards of a prepared folder, in the order in which they are done.

    Args:
        location: As `data.train`.
        data: Says where remote shards are kept.
        n_workers: Processes.
        advance: Called with the bytes of each shard that is done.

    Raises:
        DataError: the manifest or the tokenizer is missing or damaged; nothing of the shards.
    """
    # What is wrong with shards is to be reported, not raised.
    data = data.model_copy(update={"on_bad_shard": "skip"})
    manifest = load_manifest(location, data)
    tasks = [(split, number) for split in SPLITS for number in range(len(manifest.shards(split)))]
    with Workers(n_workers) as workers:
        for report in workers.run(partial(_verify_shard, manifest=manifest, data=data), tasks):
            advance(report.info.bytes)
            yield report


def n_bytes_of(location: str, data: DataConfig) -> int:
    """Bytes of all shards of a folder, as its manifest says."""
    manifest = load_manifest(location, data.model_copy(update={"on_bad_shard": "skip"}))
    return sum(info.bytes for split in SPLITS for info in manifest.shards(split))


def _verify_shard(task: tuple[Split, int], manifest: Manifest, data: DataConfig) -> ShardReport:
    split, number = task
    shards = ShardSet.build(manifest, split, data)
    info = shards.infos[number]
    try:
        with shards.open_file(number) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            n_bytes = file.tell()
            reader = ShardReader(info.location, file, shards.layout, skip_bad=True)
            problem, n_bad, n_tokens = _read_all(reader)
            marks = ShardReader(info.location, file, shards.layout, skip_bad=True).scan().marks
    except (DataError, OSError) as error:
        return ShardReport(split, info, str(error), info.n_samples)
    counted = (n_tokens + [0])[:2] == [info.n_source_tokens, info.n_target_tokens]
    lost, wrong = n_bad + max(0, info.n_samples - reader.position), ""
    if n_bytes != info.bytes:
        wrong = f"it has {n_bytes} bytes, the manifest says {info.bytes}"
    elif problem:
        return ShardReport(split, info, problem, lost)
    elif reader.position != info.n_samples:
        wrong = f"it has {reader.position} samples, the manifest says {info.n_samples}"
    elif digest != info.sha256:
        wrong = f"its sha256 is {digest}, the manifest says {info.sha256}"
    elif not counted and not manifest.fields:  # of shards that others wrote, tokens are an estimate
        wrong = f"it has {' and '.join(map(str, n_tokens))} tokens, the manifest says otherwise"
    elif marks != info.marks and info.marks:
        wrong = "its samples begin elsewhere than the manifest says"
    return ShardReport(split, info, f"shard {info.location}: {wrong}" if wrong else "", lost)


def _read_all(reader: ShardReader) -> tuple[str, int, list[int]]:
    """The first problem, the number of bad samples, and the tokens of each field."""
    problem, n_bad = "", 0
    n_tokens = [0] * len(reader.layout.fields)
    position = -1
    while reader.position > position:
        position = reader.position
        window = reader.read(_WINDOW)
        problem, n_bad = problem or window.problem, n_bad + window.n_bad
        for i, (flat, _) in enumerate(window.fields):
            n_tokens[i] += len(flat)
    return problem or reader.problem, n_bad, n_tokens
