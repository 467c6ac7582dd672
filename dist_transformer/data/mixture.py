"""Which corpus each row of a run comes from, where it has several. A pure function of small integers."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Self

from dist_transformer.data.hashing import hash_key
from dist_transformer.data.order import MIXTURE

UNIT = 1 << 32
"""Shares of corpora are whole numbers of 1 / UNIT, so that rows are dealt by integer arithmetic."""

_MASK = (1 << 64) - 1
# 2**64 times the fractions of the golden ratio and of the square root of 2: multiples of either spread over [0, 1) as
# evenly as multiples of a number can (their continued fractions are the smallest there are).
_LANE_STEP = 0x9E3779B97F4A7C15
_TURN_STEP = 0x6A09E667F3BCC909


@dataclass(frozen=True)
class Mixture:
    """How the corpora of a run take turns.

    Row n is turn n div L of lane n mod L. Each has a point in [0, 1), start + lane * golden ratio + turn * square
    root of 2, modulo 1 (a Kronecker sequence), and the corpus in whose interval the point falls gives the row. So
    after any number of turns every lane, and in every turn all lanes together, are within a few rows of each
    corpus's share, where drawing at random would be off by the square root of the number of rows.
    """

    shares: tuple[int, ...]
    """Of each corpus, in units of 1 / UNIT; at least 1 each, UNIT in sum."""
    n_lanes: int
    seed: int

    @classmethod
    def build(cls, weights: Sequence[float], temperature: float, n_lanes: int, seed: int) -> Self:
        """The mixture in which corpora have shares in proportion to weight ** (1 / temperature).

        Args:
            weights: Of each corpus, above 0.
            temperature: 1: shares are the weights; larger ones approach equal shares (Raffel et al. 2020, section
                3.5.2).
            n_lanes: Lanes of the run.
            seed: Of the run.
        """
        largest = max(weights)
        powers = [(weight / largest) ** (1 / temperature) for weight in weights]
        total = math.fsum(powers)
        shares = [max(1, int(UNIT * power / total)) for power in powers]
        shares[powers.index(1.0)] += UNIT - sum(shares)
        return cls(tuple(shares), n_lanes, seed)

    def corpus_of(self, row: int) -> int:
        """The number of the corpus that a row of the run comes from."""
        if len(self.shares) == 1:
            return 0
        turn, lane = divmod(row, self.n_lanes)
        point = (self._start + lane * _LANE_STEP + turn * _TURN_STEP) & _MASK
        # The last bound is UNIT, above every point.
        return bisect_right(self._bounds, point >> 32)

    @cached_property
    def _start(self) -> int:
        return hash_key(self.seed, MIXTURE)

    @cached_property
    def _bounds(self) -> tuple[int, ...]:
        return tuple(accumulate(self.shares))
