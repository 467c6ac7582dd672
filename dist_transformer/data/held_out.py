"""Held-out data: every sample exactly once, in a fixed order, the same number of batches on every rank."""

from collections.abc import Iterator
from itertools import count, islice
from typing import Literal

import numpy as np

from dist_transformer.config.data import DataConfig
from dist_transformer.data.batch import Batch
from dist_transformer.data.lanes import RowPlan
from dist_transformer.data.manifest import Manifest, load_manifest
from dist_transformer.data.rows import COUNTS, PlacedRows, Rows, assemble
from dist_transformer.data.shards import read_shard
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.errors import DataError


def load_held_out(data: DataConfig) -> tuple[Manifest, Literal["train", "eval"]]:
    """The folder of `data.eval` and the split to read: `eval`, or `train` where the folder has no other.

    Raises:
        DataError: no folder is configured or it cannot be read, or it is the training folder without an eval
            split.
    """
    if data.eval is None:
        raise DataError("data.eval is not set: name a folder of shards to evaluate on")
    manifest = load_manifest(data.eval)
    if manifest.eval:
        return manifest, "eval"
    if manifest.root.resolve() == load_manifest(data.corpora()[0].train).root.resolve():
        raise DataError(
            f"{data.eval} has no held-out split: prepare it with --held-out N, name another folder in "
            "data.eval, or set "
            "data.eval=null"
        )
    return manifest, "train"


def eval_batches(
    data: DataConfig,
    *,
    seed: int,
    dp_rank: int,
    dp_size: int,
    micro_batch_size: int,
    max_rows: int | None = None,
) -> Iterator[Batch]:
    """Batches of the held-out split, read once, with the same noise every time.

    Row r goes to rank r mod dp_size. All ranks get the same number of batches; those at the end are filled
    with empty rows: PAD everywhere, segment 0, no target token.

    Args:
        data: The configuration's `data` section.
        seed: Decides the noise of span corruption.
        dp_rank: This rank among those that get different rows.
        dp_size: Their number.
        micro_batch_size: Rows of a batch.
        max_rows: Rows over all ranks; None: the whole split.

    Raises:
        DataError: the shards cannot be read or do not fit the objective.
    """
    rows = islice(_all_rows(data, seed), max_rows)
    for step in count():
        # Every rank reads all rows, so that all see the end at the same batch without talking to each other.
        batch_rows = list(islice(rows, dp_size * micro_batch_size))
        if not batch_rows:
            return
        mine = batch_rows[dp_rank::dp_size]
        missing = micro_batch_size - len(mine)
        packed = Rows.concatenate([*mine, *[_empty_like(batch_rows[0])] * missing])
        first = step * micro_batch_size
        numbers = (first + np.arange(micro_batch_size)) * dp_size + dp_rank
        no_lane = np.zeros(micro_batch_size, np.int64)
        placed = PlacedRows(packed, numbers, no_lane, np.zeros((micro_batch_size, 4), np.int64))
        bucketed = data.bucket_tokens is not None
        yield assemble(placed, data.max_source_len, data.max_target_len, bucketed=bucketed)


def _all_rows(data: DataConfig, seed: int) -> Iterator[Rows]:
    manifest, split = load_held_out(data)
    plan = RowPlan.build(data, manifest, split, seed, shuffle=False)
    for shard in range(len(plan.shards)):
        reader = plan.shards.open(shard)
        try:
            for _ in range(plan.count_windows(shard)):
                rows, _ = plan.build_rows(reader.read(plan.window), 0, shard)
                yield from (rows.select(np.array([i])) for i in range(len(rows)))
        finally:
            reader.close()


def _empty_like(rows: Rows) -> Rows:
    no_lengths = np.zeros(0, np.int64)
    n_samples, counts = np.zeros(1, np.int64), np.zeros((1, len(COUNTS)), np.int64)
    return Rows(rows.source_tokens[:0], rows.target_tokens[:0], no_lengths, no_lengths, n_samples, counts)


def held_out_texts(data: DataConfig, limit: int | None = None) -> list[tuple[str, str]]:
    """The first held-out samples as text, decoded with the shards' own tokenizer: for BLEU and for showing.

    Returns:
        (source, target) of pairs; (document, "") of plain text.
    """
    manifest, split = load_held_out(data)
    tokenizer = TextTokenizer.load(manifest.tokenizer_path)
    samples = (
        sample
        for shard in manifest.shards(split)
        for sample in read_shard(manifest.root / shard.file, manifest.kind, manifest.dtype)
    )
    texts = ([tokenizer.decode(tokens) for tokens in sample] for sample in islice(samples, limit))
    return [(sample[0], sample[1] if len(sample) > 1 else "") for sample in texts]
