"""Supervised pairs: the sample's own source and target."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from dist_transformer.config.data import TooLong
from dist_transformer.data.hashing import Int64
from dist_transformer.data.manifest import Kind
from dist_transformer.data.objectives.base import Fields, Samples
from dist_transformer.data.ragged import Tokens, ragged_gather, ragged_indices, starts_of
from dist_transformer.errors import DataError


@dataclass(frozen=True)
class Pairs:
    """Supervised pairs: the sample's own source and target."""

    max_source_len: int
    max_target_len: int
    too_long: TooLong
    eos_id: int

    kind: ClassVar[Kind] = "pairs"

    def __call__(self, fields: Fields, indices: Int64, key: int, shard: str = "") -> Samples:
        """End both sides with EOS and apply the policy for pairs longer than a row (EOS counted).

        Raises:
            DataError: a pair is too long and the policy is `error`.
        """
        (source, source_lengths), (target, target_lengths) = fields
        too_long = (source_lengths >= self.max_source_len) | (target_lengths >= self.max_target_len)
        n_dropped, is_truncated = 0, too_long
        if too_long.any():
            if self.too_long == "error":
                i = int(np.argmax(too_long))
                raise DataError(
                    f"{shard}: a pair of {source_lengths[i]} source and {target_lengths[i]} target tokens "
                    "(and EOS) "
                    f"exceeds rows of {self.max_source_len} and {self.max_target_len}: raise "
                    "data.max_source_len or "
                    "data.max_target_len, or set data.too_long to truncate or drop"
                )
            if self.too_long == "drop":
                keep = np.flatnonzero(~too_long)
                n_dropped, is_truncated = int(too_long.sum()), np.zeros(len(keep), np.bool_)
                source, target = (
                    ragged_gather(source, source_lengths, keep),
                    ragged_gather(target, target_lengths, keep),
                )
                source_lengths, target_lengths = source_lengths[keep], target_lengths[keep]
        source, source_lengths = self._end(source, source_lengths, self.max_source_len)
        target, target_lengths = self._end(target, target_lengths, self.max_target_len)
        is_split = np.zeros(len(source_lengths), np.bool_)
        return Samples(source, source_lengths, target, target_lengths, is_truncated, is_split, n_dropped)

    def describe(self) -> dict[str, Any]:
        """What decides the pairs."""
        return {"objective": "Pairs"} | asdict(self)

    def _end(self, flat: Tokens, lengths: Int64, longest: int) -> tuple[Tokens, Int64]:
        kept = np.minimum(lengths, longest - 1)
        ended = np.full(int(kept.sum()) + len(kept), self.eos_id, flat.dtype)
        ended[ragged_indices(starts_of(kept + 1), kept)] = flat[ragged_indices(starts_of(lengths), kept)]
        return ended, kept + 1
