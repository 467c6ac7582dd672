"""What every objective does: a window of tokenised samples becomes (source, target) pairs, each ended by EOS.

It happens in two steps. First it is decided, from lengths and hashes alone, which parts of which samples become
pairs and which of them share a row; then the tokens of these pairs are written, in the order of the rows.

Almost everything works on whole windows of flat arrays: a Python loop over tokens would be the loader's bottleneck.
"""

from dataclasses import dataclass, fields
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from dist_transformer.data.hashing import Int64
from dist_transformer.data.manifest import Kind
from dist_transformer.data.ragged import Tokens

Fields = tuple[tuple[Tokens, Int64], ...]
"""For each field of a sample, flat tokens without EOS and the lengths of the window's samples."""


@dataclass(frozen=True)
class Window:
    """N tokenised samples, and what decides all that is random about them."""

    fields: Fields
    indices: Int64
    """[N] place of each sample in its shard."""
    key: int
    """From (seed, epoch, shard); see `order.noise_key`."""
    location: str = ""
    """What messages call the shard."""

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class Pieces:
    """P parts of a window's samples; each becomes one (source, target) pair."""

    sample: Int64
    """[P] its sample's place in the window."""
    begin: Int64
    """[P] its first token in the sample; 0 for pairs."""
    length: Int64
    """[P] its tokens; of the source, for pairs."""
    source_lengths: Int64
    """[P] tokens of the pair's source, EOS counted."""
    target_lengths: Int64
    """[P] tokens of the pair's target, EOS counted."""
    is_truncated: NDArray[np.bool_]
    """[P] the pair was cut to fit a row; what was cut off is lost."""
    is_split: NDArray[np.bool_]
    """[P] the first piece of a document that was cut into several."""

    def __len__(self) -> int:
        return len(self.sample)

    def select(self, order: Int64) -> Self:
        """Some of the pieces, or all in another order."""
        return type(self)(*(getattr(self, f.name)[order] for f in fields(self)))


@dataclass(frozen=True)
class Samples:
    """P (source, target) pairs as flat arrays, in the order of the pieces; EOS included in tokens and lengths."""

    source_tokens: Tokens
    """Flat, all sources one after the other."""
    source_lengths: Int64
    """[P]"""
    target_tokens: Tokens
    """Flat, all targets one after the other."""
    target_lengths: Int64
    """[P]"""

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

    def cut(self, window: Window) -> Pieces:
        """Every sample by itself, in as few pieces as fit a row; samples that give no pair are left out.

        Raises:
            DataError: a sample does not fit and the configuration says that this is an error.
        """

    def fill_rows(self, window: Window, order: Int64) -> tuple[Pieces, Int64]:
        """The pieces of row 0, row 1, ..., so that both sides of rows are full, and how many each row has.

        Args:
            window: N samples.
            order: [N] the order in which samples are taken.
        """

    def write(self, window: Window, pieces: Pieces) -> Samples:
        """The tokens of the pieces' pairs."""

    def expect(self, n_samples: int, n_source_tokens: int, n_target_tokens: int) -> tuple[int, int, int]:
        """About how many pairs, source tokens and target tokens (EOS counted) it makes of a corpus, unpacked."""

    def describe(self) -> dict[str, Any]:
        """What decides the pairs, as plain JSON: a resume must find the same values."""
