"""Held-out data: every sample exactly once, in a fixed order, the same number of batches on every rank."""

from collections.abc import Iterator
from itertools import count, islice

import numpy as np

from dist_transformer.config.data import CorpusConfig, DataConfig
from dist_transformer.data.assemble import assemble
from dist_transformer.data.batch import Batch
from dist_transformer.data.manifest import Manifest, Split, load_manifest
from dist_transformer.data.plan import CorpusPlan
from dist_transformer.data.rows import COUNTS, PlacedRows, Rows
from dist_transformer.data.shards import RawWindow, ShardSet
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.errors import DataError


def load_held_out(data: DataConfig, corpus: CorpusConfig) -> tuple[Manifest, Split]:
    """The folder of a corpus's `eval` and the split to read: `eval`, or `train` where the folder has no other.

    Raises:
        DataError: no folder is configured or it cannot be read, or it is what the run trains on and has no eval
            split.
    """
    if corpus.eval is None:
        raise DataError(f"corpus {corpus.name} has no eval: name a folder of shards to evaluate on")
    manifest = load_manifest(corpus.eval, data)
    if manifest.eval:
        return manifest, "eval"
    if manifest.shares_shards_with(load_manifest(corpus.train, data)):
        raise DataError(
            f"{corpus.eval} has no held-out split: prepare it with --held-out N, name another folder as eval, or set "
            "eval to null"
        )
    return manifest, "train"


def eval_batches(
    data: DataConfig,
    corpus: CorpusConfig,
    *,
    seed: int,
    dp_rank: int,
    dp_size: int,
    micro_batch_size: int,
    max_rows: int | None = None,
) -> Iterator[Batch]:
    """The held-out split of a corpus, read once, with the same noise every time.

    Row r goes to rank r mod dp_size. All ranks get the same number of batches; those at the end are filled
    with empty rows: PAD everywhere, segment 0, no target token. Bad shards are an error here whatever
    `data.on_bad_shard` says: a loss over what happened to be readable is not comparable, and ranks that read
    different samples would get different numbers of batches.

    Args:
        data: The configuration's `data` section.
        corpus: One of `data.corpora()`, with an `eval`.
        seed: Decides the noise of denoising objectives.
        dp_rank: This rank among those that get different rows.
        dp_size: Their number.
        micro_batch_size: Rows of a batch; a bucket is a row.
        max_rows: Rows over all ranks; None: the whole split.

    Raises:
        DataError: the shards cannot be read or do not fit the objective.
    """
    rows = islice(_all_rows(data, corpus, seed), max_rows)
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


def held_out_plan(data: DataConfig, corpus: CorpusConfig, seed: int, section: str = "data") -> CorpusPlan:
    """The plan of a corpus's held-out split: nothing is permuted."""
    manifest, split = load_held_out(data, corpus)
    return CorpusPlan.build(_strict(data), corpus, manifest, split, seed=seed, shuffle=False, section=section)


def held_out_texts(data: DataConfig, corpus: CorpusConfig, limit: int | None = None) -> list[tuple[str, str]]:
    """The first held-out samples as text, decoded with the shards' own tokenizer: for BLEU and for showing.

    Returns:
        (source, target) of pairs; (document, "") of plain text.
    """
    manifest, split = load_held_out(data, corpus)
    tokenizer = TextTokenizer.load(manifest.tokenizer_path)
    windows = _windows(ShardSet.build(manifest, split, _strict(data)), data.window)
    samples = (sample for _, window in windows for sample in _samples(window))
    texts = ([tokenizer.decode(tokens) for tokens in sample] for sample in islice(samples, limit))
    return [(sample[0], sample[1] if len(sample) > 1 else "") for sample in texts]


def _strict(data: DataConfig) -> DataConfig:
    whole = {"subword_dropout": 0.0, "subword_dropout_target": None}
    return data.model_copy(update={"on_bad_shard": "error", **whole})


def _all_rows(data: DataConfig, corpus: CorpusConfig, seed: int) -> Iterator[Rows]:
    plan = held_out_plan(data, corpus, seed)
    for shard, window in _windows(plan.shards, plan.window):
        rows, _ = plan.build_rows(window, 0, shard)
        yield from (rows.select(np.array([i])) for i in range(len(rows)))


def _windows(shards: ShardSet, size: int) -> Iterator[tuple[int, RawWindow]]:
    """(shard, window) of all shards, in the order written."""
    for shard, info in enumerate(shards.infos):
        reader = shards.open(shard)
        try:
            for _ in range(0, info.n_samples, size):
                yield shard, reader.read(size)
        finally:
            reader.close()


def _samples(window: RawWindow) -> Iterator[list[list[int]]]:
    """The token ids of each sample's fields."""
    ends = [np.cumsum(lengths) for _, lengths in window.fields]
    for i in range(len(window)):
        yield [
            tokens[end[i] - lengths[i] : end[i]].tolist()
            for (tokens, lengths), end in zip(window.fields, ends, strict=True)
        ]


def _empty_like(rows: Rows) -> Rows:
    no_lengths = np.zeros(0, np.int64)
    n_samples, counts = np.zeros(1, np.int64), np.zeros((1, len(COUNTS)), np.int64)
    return Rows(rows.source_tokens[:0], rows.target_tokens[:0], no_lengths, no_lengths, n_samples, counts)
