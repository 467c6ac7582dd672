"""What every objective does: a window of tokenised samples becomes (source, target) pairs, each ended by EOS.

Everything works on whole windows of flat arrays: a Python loop over samples would be the loader's bottleneck.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dist_transformer.data.hashing import Int64
from dist_transformer.data.manifest import Kind
from dist_transformer.data.ragged import Tokens

Fields = tuple[tuple[Tokens, Int64], ...]
"""For each field of a sample, flat tokens without EOS and the lengths of the window's samples."""


@dataclass(frozen=True)
class Samples:
    """N (source, target) pairs as flat arrays; EOS included in tokens and lengths."""

    source_tokens: Tokens
    """Flat, all sources one after the other."""
    source_lengths: Int64
    """[N]"""
    target_tokens: Tokens
    """Flat, all targets one after the other."""
    target_lengths: Int64
    """[N]"""
    is_truncated: NDArray[np.bool_]
    """[N] the pair was cut to fit a row."""
    is_split: NDArray[np.bool_]
    """[N] the first piece of a document that was cut into several."""
    n_dropped: int = 0
    """Samples that gave no pair: too long (policy `drop`) or empty."""

    def __len__(self) -> int:
        return len(self.source_lengths)


class Objective(Protocol):
    """How samples of one kind of shards become pairs. A frozen dataclass of plain values."""

    @property
    def kind(self) -> Kind:
        """The kind of shards that it reads."""

    @property
    def max_source_len(self) -> int:
        """Tokens of the longest source, EOS counted."""

    @property
    def max_target_len(self) -> int:
        """Tokens of the longest target, EOS counted."""

    def __call__(self, fields: Fields, indices: Int64, key: int, shard: str) -> Samples:
        """The pairs of a window.

        Args:
            fields: As `RawWindow.fields`.
            indices: [N] place of each sample in its shard: with `key` it decides all that is random.
            key: From (seed, epoch, shard); see `order.noise_key`.
            shard: What messages call the shard.
        """

    def describe(self) -> dict[str, Any]:
        """What decides the pairs, as plain JSON: a resume must find the same values."""
