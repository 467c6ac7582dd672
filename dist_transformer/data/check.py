"""All that can be known to be wrong with the data before training starts."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_transformer.config.data import DataConfig
from dist_transformer.data.held_out import load_held_out
from dist_transformer.data.lanes import RowPlan
from dist_transformer.data.manifest import Kind, Manifest, load_manifest
from dist_transformer.data.objectives import SpanCorruption
from dist_transformer.data.order import check_lanes
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.errors import DataError

PACKED_FILL = 0.97
"""Share of the fuller side that packing usually fills; for estimates only."""


@dataclass(frozen=True)
class DataSummary:
    """What a run's data is."""

    kind: Kind
    n_lanes: int
    n_shards: int
    vocab_size: int
    tokenizer_path: Path
    n_samples: int
    n_source_tokens: int
    """Tokens of the sources, or of the documents, without EOS."""
    n_target_tokens: int
    """Tokens of the targets; 0 for plain text."""
    rows_per_epoch: int
    """An estimate: exact figures need packing."""
    n_eval_samples: int
    """0 where nothing is held out."""


def check_data(data: DataConfig, *, dp_size: int, workers: int) -> DataSummary:
    """Check everything that a run reads before any rank starts to train.

    Args:
        data: The configuration's `data` section.
        dp_size: Data-parallel ranks.
        workers: Loader processes per rank.

    Raises:
        DataError: folders missing, empty or half-written, a tokenizer that is not the shards', an objective
            that does not fit them, ranks and workers that the lanes do not divide into, or train and eval
            folders that do not belong together.
    """
    manifest = load_manifest(data.corpora()[0].train)
    if not manifest.train:
        raise DataError(f"{manifest.root} has no train split: name a folder with one in data.train")
    n_lanes = check_lanes(len(manifest.train), dp_size, workers)
    plan = RowPlan.build(data, manifest, "train", seed=0, shuffle=data.shuffle)
    _check_tokenizer(manifest)
    n_eval = 0
    if data.eval is not None:
        held_out, split = load_held_out(data)
        if held_out.tokenizer_sha256 != manifest.tokenizer_sha256:
            raise DataError(
                f"{data.eval} was prepared with another tokenizer than {data.train}: prepare it again with "
                f"--tokenizer {manifest.tokenizer_path}"
            )
        RowPlan.build(data, held_out, split, seed=0, shuffle=False)
        n_eval = sum(shard.n_samples for shard in held_out.shards(split))
    return DataSummary(
        kind=manifest.kind,
        n_lanes=n_lanes,
        n_shards=len(manifest.train),
        vocab_size=manifest.vocab_size,
        tokenizer_path=manifest.tokenizer_path,
        n_samples=sum(shard.n_samples for shard in manifest.train),
        n_source_tokens=sum(shard.n_source_tokens for shard in manifest.train),
        n_target_tokens=sum(shard.n_target_tokens for shard in manifest.train),
        rows_per_epoch=_estimate_rows(data, manifest, plan),
        n_eval_samples=n_eval,
    )


def _check_tokenizer(manifest: Manifest) -> None:
    tokenizer = TextTokenizer.load(manifest.tokenizer_path)
    if tokenizer.vocab_size != manifest.vocab_size:
        raise DataError(
            f"the tokenizer does not match the shards: {manifest.tokenizer_path} has "
            f"{tokenizer.vocab_size} ids, the "
            f"manifest says {manifest.vocab_size}: prepare again with --overwrite"
        )


def _estimate_rows(data: DataConfig, manifest: Manifest, plan: RowPlan) -> int:
    n_samples = sum(shard.n_samples for shard in manifest.train)
    n_source = sum(shard.n_source_tokens for shard in manifest.train) + n_samples
    n_target = sum(shard.n_target_tokens for shard in manifest.train) + n_samples
    objective = plan.windows.objective
    if isinstance(objective, SpanCorruption):
        # As if all documents had the mean length.
        longest = objective.longest_piece()
        mean = max(1, round((n_source - n_samples) / n_samples))
        pieces = np.array([longest] * (mean // longest) + [mean % longest] * (mean % longest > 0))
        n_noise, n_spans, n_kept = objective.plan(pieces)
        n_source = n_samples * int((n_kept + n_spans + 1).sum())
        n_target = n_samples * int((n_noise + n_spans + 1).sum())
        n_samples *= len(pieces)
    if not data.packing:
        return n_samples
    return int(max(n_source / data.max_source_len, n_target / data.max_target_len) / PACKED_FILL) + 1
