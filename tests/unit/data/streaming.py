"""Streams of small corpora, run on any number of ranks in one process, that the tests of their order share."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from dist_transformer.config.data import DataConfig
from dist_transformer.data.batch import Batch
from dist_transformer.data.cursor import Cursor
from dist_transformer.data.stream import TrainStream, merge_states
from tests.unit.data.conftest import numbers_in

ROWS_A_STEP = 8


def pairs_config(folder: Path | None, **changes: Any) -> DataConfig:
    """Rows of 32 and 32 tokens from windows of 16 pairs; without a folder, give `mixture`."""
    values: dict[str, Any] = {
        "train": None if folder is None else str(folder),
        "objective": "pairs",
        "max_source_len": 32,
        "max_target_len": 32,
        "window": 16,
        "workers": 0,
        "fingerprint": True,
    }
    return DataConfig(**(values | changes))


class Found(NamedTuple):
    """What some steps gave."""

    steps: list[int]
    """Fingerprint of each step."""
    batches: list[Batch]
    state: dict[str, Any]
    """As a checkpoint would give it back."""


def run(
    data: DataConfig,
    dp_size: int,
    n_steps: int,
    state: dict[str, Any] | None = None,
    micro: int = 2,
    seed: int = 5,
) -> Found:
    """Some steps of `ROWS_A_STEP` rows over all ranks, from a state on."""
    streams = [
        TrainStream(data, seed=seed, dp_rank=rank, dp_size=dp_size, micro_batch_size=micro, state=state)
        for rank in range(dp_size)
    ]
    iterators, steps, batches = [iter(stream) for stream in streams], [], []
    try:
        for _ in range(n_steps):
            total = 0
            for stream, iterator in zip(streams, iterators, strict=True):
                for _ in range(ROWS_A_STEP // (dp_size * micro)):
                    batch = next(iterator)
                    total += batch.fingerprint
                    stream.advance(batch)
                    batches.append(batch)
            steps.append(total)
    finally:
        for stream in streams:
            stream.close()
    merged = merge_states([stream.state() for stream in streams])
    return Found(steps, batches, json.loads(json.dumps(merged)))


class Row(NamedTuple):
    """One row of a run."""

    number: int
    lane: int
    cursor: Cursor
    samples: list[int]
    """Numbers of its samples; see `numbered_pairs`."""

    @property
    def epoch(self) -> int:
        """The pass of its lane that it belongs to; behind the last row of a pass stands the next one's start."""
        return self.cursor.epoch - (self.cursor == Cursor(self.cursor.epoch))


def rows_of(batches: Iterable[Batch]) -> list[Row]:
    """All rows in the order of the run; of packed rows or of one sample each, not of buckets."""
    rows = []
    for batch in batches:
        for i, number in enumerate(batch.rows):
            tokens, segments = batch.encoder_input_tokens[i].numpy(), batch.encoder_segment_ids[i].numpy()
            rows.append(Row(number, batch.lanes[i], batch.cursors[i], numbers_in(tokens, segments)))
    return sorted(rows, key=lambda row: row.number)


def seen_by_epoch(rows: Iterable[Row]) -> dict[int, Counter[int]]:
    """How often each sample was used in each pass of its lane over its shards; of a run with one corpus."""
    seen: dict[int, Counter[int]] = {}
    for row in rows:
        seen.setdefault(row.epoch, Counter()).update(row.samples)
    return seen
