"""What all contestants of benchmarks/train.py share: shapes, the pairs of a prepared corpus, batches by length."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dist_transformer.config import DataConfig, ModelConfig
from dist_transformer.data.manifest import load_manifest
from dist_transformer.data.shards import ShardSet
from dist_transformer.data.token_ids import EOS_ID, PAD_ID
from dist_transformer.model.flops import Work, training_flops

TARGET_TOKENS = 4096
"""Target tokens of a step, padding counted."""


@dataclass(frozen=True)
class Shape:
    """A model's size, the same for everyone."""

    d_model: int
    n_heads: int
    d_ff: int
    n_layers: int
    """Of the encoder, and of the decoder."""

    def flops(self, vocab_size: int, work: Work) -> float:
        """Useful operations of a training step: the same formula for everyone."""
        model = ModelConfig.model_validate(
            {
                "preset": "vaswani2017_base",
                "d_model": self.d_model,
                "n_heads": self.n_heads,
                "head_dim": self.d_model // self.n_heads,
                "d_ff": self.d_ff,
                "n_encoder_layers": self.n_layers,
                "n_decoder_layers": self.n_layers,
                "vocab_size": vocab_size,
            }
        )
        return training_flops(model, work)


SHAPES = {"small": Shape(256, 4, 1024, 3), "base": Shape(512, 8, 2048, 6)}

Pair = tuple[list[int], list[int]]


def read_pairs(shards: Path) -> tuple[list[Pair], int]:
    """Token ids of all training pairs, ended by EOS, and the vocabulary's size."""
    data = DataConfig(train=str(shards), objective="pairs")
    manifest = load_manifest(shards)
    shard_set = ShardSet.build(manifest, "train", data)
    pairs = [
        ([*map(int, source), EOS_ID], [*map(int, target), EOS_ID])
        for shard in range(len(shard_set))
        for source, target in shard_set.samples(shard)
    ]
    return pairs, manifest.vocab_size


def target_len(pairs: list[Pair], source_len: int) -> int:
    """The length of a row's target side that is filled when its source side is."""
    n_source, n_target = (sum(len(pair[side]) for pair in pairs) for side in (0, 1))
    return round(source_len * n_target / n_source)


def batches_by_length(pairs: list[Pair], seed: int, n_tokens: int = TARGET_TOKENS) -> Iterator[list[Pair]]:
    """For ever: pairs of like lengths, as many as make n_tokens of the longer side; in random order.

    Sorted over the whole corpus, which gives the least padding that whole batches of pairs can have.
    """
    generator = random.Random(seed)
    while True:
        order = sorted(pairs, key=lambda pair: (len(pair[1]), len(pair[0]), generator.random()))
        batches: list[list[Pair]] = [[]]
        longest = 0
        for pair in order:
            longest = max(longest, len(pair[0]), len(pair[1]))
            if batches[-1] and longest * (len(batches[-1]) + 1) > n_tokens:
                batches.append([])
                longest = max(len(pair[0]), len(pair[1]))
            batches[-1].append(pair)
        generator.shuffle(batches)
        yield from batches


def padded(rows: list[list[int]]) -> Tensor:
    """[B, S] int64, padded behind."""
    width = max(map(len, rows))
    return torch.tensor([row + [PAD_ID] * (width - len(row)) for row in rows])


def work_of(pairs: list[Pair]) -> Work:
    """What the pairs are, without padding."""
    lengths = [(len(source), len(target)) for source, target in pairs]
    return Work(
        n_source=sum(s for s, _ in lengths),
        n_target=sum(t for _, t in lengths),
        source_pairs=sum(s * s for s, _ in lengths),
        target_pairs=sum(t * (t + 1) // 2 for _, t in lengths),
        cross_pairs=sum(s * t for s, t in lengths),
    )


__all__ = [
    "SHAPES",
    "TARGET_TOKENS",
    "Pair",
    "Shape",
    "batches_by_length",
    "padded",
    "read_pairs",
    "target_len",
    "work_of",
]
