"""Ragged arrays: many short sequences in one flat array, handled without a loop over the sequences."""

import numpy as np
from numpy.typing import NDArray

from dist_transformer.data.hashing import Int64

Tokens = NDArray[np.unsignedinteger]
"""Flat token ids, uint16 or uint32 as the shards store them."""


def starts_of(lengths: Int64) -> Int64:
    """Where each sequence begins in the flat array."""
    starts = np.cumsum(lengths)
    starts -= lengths
    return starts


def ragged_indices(starts: Int64, lengths: Int64) -> Int64:
    """The flat indices of sequences that begin at `starts`, one sequence after the other."""
    return np.repeat(starts - starts_of(lengths), lengths) + np.arange(int(lengths.sum()))


def ragged_gather(flat: Tokens, lengths: Int64, order: Int64) -> Tokens:
    """The sequences of `flat` in another order (or a selection of them)."""
    return flat[ragged_indices(starts_of(lengths)[order], lengths[order])]
