"""Supervised pairs: the sample's own source and target."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from dist_transformer.config.data import TooLong
from dist_transformer.data.hashing import Int64
from dist_transformer.data.manifest import Kind
from dist_transformer.data.objectives.base import Pieces, Samples, Window
from dist_transformer.data.packing import pack
from dist_transformer.data.ragged import Tokens, ragged_indices, starts_of
from dist_transformer.errors import DataError


@dataclass(frozen=True)
class Pairs:
    """Supervised pairs: the sample's own source and target."""

    max_source_len: int
    max_target_len: int
    too_long: TooLong
    eos_id: int

    kind: ClassVar[Kind] = "pairs"

    def cut(self, window: Window) -> Pieces:
        """All pairs, after the policy for those longer than a row (EOS counted).

        Raises:
            DataError: a pair is too long and the policy is `error`.
        """
        (_, source_lengths), (_, target_lengths) = window.fields
        too_long = (source_lengths >= self.max_source_len) | (target_lengths >= self.max_target_len)
        sample = np.arange(len(window))
        if too_long.any() and self.too_long == "error":
            i = int(np.argmax(too_long))
            raise DataError(
                f"{window.location}: a pair of {source_lengths[i]} source and {target_lengths[i]} target tokens "
                f"(and EOS) exceeds rows of {self.max_source_len} and {self.max_target_len}: raise "
                "data.max_source_len or data.max_target_len, or set data.too_long to truncate or drop"
            )
        if self.too_long == "drop":
            sample = np.flatnonzero(~too_long)
        source = np.minimum(source_lengths[sample] + 1, self.max_source_len)
        target = np.minimum(target_lengths[sample] + 1, self.max_target_len)
        no_split = np.zeros(len(sample), np.bool_)
        return Pieces(sample, np.zeros_like(sample), source - 1, source, target, too_long[sample], no_split)

    def fill_rows(self, window: Window, order: Int64) -> tuple[Pieces, Int64]:
        """Whole pairs, packed; see `Objective`."""
        pieces = self.cut(window)
        place = np.empty(len(window), np.int64)
        place[order] = np.arange(len(window))
        pieces = pieces.select(np.argsort(place[pieces.sample]))
        packed, n_pieces = pack(
            pieces.source_lengths, pieces.target_lengths, self.max_source_len, self.max_target_len
        )
        return pieces.select(packed), n_pieces

    def write(self, window: Window, pieces: Pieces) -> Samples:
        """Both sides, ended by EOS."""
        (source, source_lengths), (target, target_lengths) = window.fields
        return Samples(
            self._end(source, starts_of(source_lengths)[pieces.sample], pieces.source_lengths),
            pieces.source_lengths,
            self._end(target, starts_of(target_lengths)[pieces.sample], pieces.target_lengths),
            pieces.target_lengths,
        )

    def expect(self, n_samples: int, n_source_tokens: int, n_target_tokens: int) -> tuple[int, int, int]:
        """The corpus's own counts; see `Objective`."""
        return n_samples, n_source_tokens + n_samples, n_target_tokens + n_samples

    def describe(self) -> dict[str, Any]:
        """What decides the pairs."""
        return {"objective": "pairs"} | asdict(self)

    def _end(self, flat: Tokens, starts: Int64, lengths: Int64) -> Tokens:
        ended = np.full(int(lengths.sum()), self.eos_id, flat.dtype)
        ended[ragged_indices(starts_of(lengths), lengths - 1)] = flat[ragged_indices(starts, lengths - 1)]
        return ended
