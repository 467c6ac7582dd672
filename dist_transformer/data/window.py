"""A window of a shard becomes rows: samples in an order of their own, made into pairs by the objective, laid out."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_transformer.config.data import CorpusConfig, DataConfig
from dist_transformer.data.hashing import Int64, permutation
from dist_transformer.data.objectives import Objective, Pieces, Window, build_objective
from dist_transformer.data.order import noise_key, row_key, window_key
from dist_transformer.data.packing import PACKER, bucket
from dist_transformer.data.ragged import ragged_indices, starts_of
from dist_transformer.data.reader import RawWindow
from dist_transformer.data.rows import Rows
from dist_transformer.data.subwords import SubwordDropout
from dist_transformer.data.tokenizer import TextTokenizer


@dataclass(frozen=True)
class WindowPlan:
    """All that decides which rows a window gives: plain values, so that it travels to loader workers."""

    objective: Objective
    seed: int
    shuffle: bool
    packing: bool
    bucket_tokens: int | None = None
    subword_dropout: SubwordDropout | None = None

    @classmethod
    def build(
        cls, data: DataConfig, corpus: CorpusConfig, tokenizer: TextTokenizer, seed: int, shuffle: bool
    ) -> "WindowPlan":
        """The plan of a corpus.

        Raises:
            DataError: the rows are too short for the objective, or the tokenizer lacks tokens that it needs, or
                merges.
        """
        objective = build_objective(data, corpus, tokenizer)
        p, p_target = data.subword_dropout, data.subword_dropout_target
        dropout = SubwordDropout(p, tokenizer.parents(), p_target) if p or p_target else None
        return cls(objective, seed, shuffle, data.packing, data.bucket_tokens, dropout)

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
        samples = Window(raw.fields, raw.indices, noise_key(self.seed, epoch, shard), location)
        if self.subword_dropout is not None:
            samples = self.subword_dropout(samples)
        pieces, n_pieces = self._lay_out(samples, window_key(self.seed, epoch, shard, window))
        if self.shuffle:
            # Rows come out with what fits easily first, buckets in the order of length.
            order = permutation(len(n_pieces), row_key(self.seed, epoch, shard, window))
        else:
            order = np.argsort(np.minimum.reduceat(pieces.sample, starts_of(n_pieces)), kind="stable")
        pieces = pieces.select(ragged_indices(starts_of(n_pieces)[order], n_pieces[order]))
        n_dropped = len(samples) - len(np.unique(pieces.sample))
        return Rows.build(pieces, self.objective.write(samples, pieces), n_pieces[order]), n_dropped

    def _lay_out(self, samples: Window, key: int) -> tuple[Pieces, Int64]:
        """The pieces row by row, and how many each row has."""
        if self.packing:
            order = permutation(len(samples), key) if self.shuffle else np.arange(len(samples))
            return self.objective.fill_rows(samples, order)
        pieces = self.objective.cut(samples)
        if self.shuffle:
            pieces = pieces.select(permutation(len(pieces), key))
        if self.bucket_tokens is None:
            return pieces, np.ones(len(pieces), np.int64)
        order, n_pieces = bucket(pieces.source_lengths, pieces.target_lengths, self.bucket_tokens)
        return pieces.select(order), n_pieces

    def describe(self) -> dict[str, Any]:
        """What decides the rows, as plain JSON: a resume must find the same values."""
        dropout, spelling = self.subword_dropout, {}
        if dropout is not None:
            spelling["subword_dropout"] = dropout.probability
            if dropout.target_probability is not None:
                spelling["subword_dropout_target"] = dropout.target_probability
        return {
            "seed": self.seed,
            "shuffle": self.shuffle,
            "packing": self.packing,
            "packer": PACKER if self.packing else None,
            "bucket_tokens": self.bucket_tokens,
            **spelling,
            **self.objective.describe(),
        }
