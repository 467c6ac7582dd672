"""Counter-based randomness: every random choice is a hash of a few integers, never the state of a generator.

That makes each choice (a permutation, a noise mask) computable anywhere from (seed, epoch, shard, ...) alone,
whole windows at a time in numpy, and independent of the numpy version: numpy promises no stable streams from
`Generator`, and a resumed run must see the same order after an upgrade.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

UInt64 = NDArray[np.uint64]
Int64 = NDArray[np.int64]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def mix64(values: UInt64) -> UInt64:
    """SplitMix64's finaliser (Steele et al. 2014): a bijection of uint64 with full avalanche."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_MIX_1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_MIX_2)
    return values ^ (values >> np.uint64(31))


def hash_key(*values: int) -> int:
    """One 64-bit key from a few integers; the order of the integers matters."""
    key = 0
    for value in values:
        key = (key ^ (value & _MASK)) + _GOLDEN & _MASK
        key = (key ^ key >> 30) * _MIX_1 & _MASK
        key = (key ^ key >> 27) * _MIX_2 & _MASK
        key ^= key >> 31
    return key


def hash_array(keys: UInt64 | int, counters: ArrayLike) -> UInt64:
    """A uint64 for each counter under its key (one key, or one a counter): the vectorised `hash_key`."""
    if isinstance(keys, int):
        keys = np.full(1, keys, np.uint64)
    return mix64((keys ^ np.asarray(counters).astype(np.uint64)) + np.uint64(_GOLDEN))


def permutation(n: int, *values: int) -> Int64:
    """The permutation of `range(n)` that belongs to a few integers."""
    return np.argsort(hash_array(hash_key(*values), np.arange(n)), kind="stable")


class Shuffle:
    """A bijection of `range(n)` computed element by element, so that no list of n numbers is held.

    A four-round Feistel network over the smallest even number of bits that holds n, with cycle walking:
    values outside the range are encrypted again until they fall inside (fewer than 4 times on average).
    """

    def __init__(self, n: int, *values: int) -> None:
        self.n = n
        self._half_bits = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
        self._keys = [hash_key(*values, i) for i in range(4)]

    def __call__(self, indices: ArrayLike) -> Int64:
        """The image of each index, an int64 array."""
        values = self._encrypt(np.asarray(indices, np.int64).astype(np.uint64))
        while (outside := values >= np.uint64(self.n)).any():
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64)

    def _encrypt(self, values: UInt64) -> UInt64:
        bits, mask = np.uint64(self._half_bits), np.uint64((1 << self._half_bits) - 1)
        left, right = values >> bits, values & mask
        for key in self._keys:
            left, right = right, left ^ (hash_array(key, right) & mask)
        return (left << bits) | right
