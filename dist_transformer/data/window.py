"""A window of a shard becomes rows: samples in an order of their own, corrupted by the objective, packed."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_transformer.config.data import CorpusConfig, DataConfig
from dist_transformer.data.hashing import permutation
from dist_transformer.data.objectives import Objective, build_objective
from dist_transformer.data.order import noise_key, row_key, window_key
from dist_transformer.data.packing import pack
from dist_transformer.data.rows import Rows
from dist_transformer.data.shards import RawWindow
from dist_transformer.data.tokenizer import TextTokenizer


@dataclass(frozen=True)
class WindowPlan:
    """All that decides which rows a window gives: plain values, so that it travels to loader workers."""

    objective: Objective
    seed: int
    shuffle: bool
    packing: bool

    @classmethod
    def build(
        cls, data: DataConfig, corpus: CorpusConfig, tokenizer: TextTokenizer, seed: int, shuffle: bool
    ) -> "WindowPlan":
        """The plan of a corpus.

        Raises:
            DataError: the rows are too short for the objective, or the tokenizer lacks tokens that it needs.
        """
        return cls(build_objective(data, corpus, tokenizer), seed, shuffle, data.packing)

    def build_rows(
        self, raw: RawWindow, *, epoch: int, shard: int, window: int, location: str
    ) -> tuple[Rows, int]:
        """The rows of a window in the order of training, and how many samples were dropped.

        Args:
            raw: The samples.
            epoch: Pass over the shards.
            shard: Number of the shard among its corpus's.
            window: Number of the window in the shard.
            location: What messages call the shard.
        """
        samples = self.objective(raw.fields, raw.indices, noise_key(self.seed, epoch, shard), location)
        order = np.arange(len(samples))
        if self.shuffle:
            order = permutation(len(order), window_key(self.seed, epoch, shard, window))
        if not self.packing:
            return Rows.build(samples, order, np.ones_like(order)), samples.n_dropped
        sides = samples.source_lengths[order], samples.target_lengths[order]
        packed, n_samples = pack(*sides, self.objective.max_source_len, self.objective.max_target_len)
        rows = Rows.build(samples, order[packed], n_samples)
        if self.shuffle:
            # Packing leaves rows sorted by the size of their samples.
            row_order = permutation(len(rows), row_key(self.seed, epoch, shard, window))
        else:
            row_order = np.argsort(packed[np.cumsum(n_samples) - n_samples], kind="stable")
        return rows.select(row_order), samples.n_dropped

    def describe(self) -> dict[str, Any]:
        """What decides the rows: a resume must find the same values."""
        return {
            "seed": self.seed,
            "shuffle": self.shuffle,
            "packing": self.packing,
            **self.objective.describe(),
        }
