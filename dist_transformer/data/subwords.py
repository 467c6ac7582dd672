"""Subword dropout: training tokens fall apart at random, so that a model meets a word in many spellings.

Every token of a byte-level BPE but the bytes was merged from two. Here each is split into those two with a small
probability, and so are its parts. BPE-dropout (Provilkov et al. 2020) leaves out merges while text is being
tokenised; splitting tokens afterwards (Sims et al. 2025, StochasTok) needs no text, so that shards of tokens serve.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dist_transformer.data.hashing import Int64, hash_array, hash_key
from dist_transformer.data.objectives import Fields, Window
from dist_transformer.data.ragged import Tokens, ragged_indices, starts_of

Parents = NDArray[np.int32]
"""[V, 2] the two tokens that each token was merged from, -1 where it was not."""

_SALT = 0x5B


@dataclass(frozen=True)
class SubwordDropout:
    """Splits the tokens of windows; what it does to a sample is decided by (seed, epoch, shard, index) alone."""

    probability: float
    parents: Parents
    target_probability: float | None = None
    """Of a pair's targets, if another."""

    def __call__(self, window: Window) -> Window:
        """The window with some of its tokens split: as many samples, longer ones."""
        fields: Fields = tuple(
            self._split(flat, lengths, hash_array(hash_key(window.key, _SALT, number), window.indices), p)
            for number, ((flat, lengths), p) in enumerate(
                zip(window.fields, self._probabilities, strict=False)
            )
        )
        return Window(fields, window.indices, window.key, window.location)

    @property
    def _probabilities(self) -> tuple[float, float]:
        """Of a sample's first field, and of a pair's second."""
        target = self.target_probability
        return self.probability, self.probability if target is None else target

    def _split(
        self, flat: Tokens, lengths: Int64, keys: NDArray[np.uint64], probability: float
    ) -> tuple[Tokens, Int64]:
        """Split tokens, then those that came of it, until a round splits none.

        Args:
            flat: Tokens of N samples.
            lengths: [N]
            keys: [N] of each sample's random numbers.
            probability: Of each token that was merged.
        """
        threshold = np.uint64(probability * 2.0**64)
        is_new = np.ones(len(flat), np.bool_)
        n_rounds = 0
        while True:
            sample = np.repeat(np.arange(len(lengths)), lengths)
            place = ragged_indices(np.zeros_like(lengths), lengths)
            drawn = hash_array(keys[sample], (n_rounds << 32) + place)
            is_split = is_new & (drawn < threshold) & (self.parents[flat, 0] >= 0)
            if not is_split.any():
                return flat, lengths
            n_parts = 1 + is_split.astype(np.int64)
            firsts = starts_of(n_parts)[is_split]
            parts = np.repeat(flat, n_parts)
            parts[firsts], parts[firsts + 1] = self.parents[flat[is_split]].T
            lengths = lengths + np.bincount(sample[is_split], minlength=len(lengths))
            flat, is_new = parts, np.repeat(is_split, n_parts)
            n_rounds += 1
