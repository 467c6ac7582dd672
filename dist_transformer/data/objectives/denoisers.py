"""Denoisers: how many tokens a piece of text loses, in how many spans, and how long its two sides then are.

A span denoiser is T5's span corruption (Raffel et al. 2020, section 3.1.4; `random_spans_noise_mask` of its
code). A prefix denoiser (no mean span) cuts a text once and predicts the second part: T5's prefix language
modelling and UL2's S denoiser.
"""

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from dist_transformer.data.hashing import Int64, UInt64, hash_array, hash_key

DRAW_BITS = 32
"""Bits of the number that is drawn for a prefix denoiser's cut."""

MIDDLE_DRAW = 1 << (DRAW_BITS - 1)
"""The draw that a prefix denoiser makes a cut of mean length of."""
LONGEST_PIECE = (1 << 16) - 1
"""Tokens; see `spans`."""

_DRAW = 3
"""Numbers the draw among the random choices of a piece; `spans` has 1 and 2."""


def draws_of(document_keys: UInt64, begins: Int64) -> UInt64:
    """[P] the draws of pieces that begin at these tokens of their documents."""
    return hash_array(hash_array(document_keys, begins), _DRAW) >> np.uint64(64 - DRAW_BITS)


def draw_of(document_key: int, begin: int) -> int:
    """`draws_of` one piece."""
    return hash_key(hash_key(document_key ^ begin) ^ _DRAW) >> (64 - DRAW_BITS)


@dataclass(frozen=True)
class Denoiser:
    """One way to corrupt a piece of text."""

    density: float
    """Share of tokens that are lost; of a prefix denoiser, its mean."""
    mean_span: float | None
    """Mean tokens of a lost span; None: the one span that is lost is the end, and no sentinel marks it."""
    mode_id: int | None = None
    """Token that begins each source."""
    weight: float = 1.0
    """Share of documents, relative to the other denoisers'."""

    @property
    def has_sentinels(self) -> bool:
        """Whether a sentinel stands for each span."""
        return self.mean_span is not None

    def plan(self, lengths: Int64, draws: UInt64) -> tuple[Int64, Int64]:
        """(lost tokens, spans) of pieces of these lengths, each at least 1.

        n tokens lose round(n * density) in round(lost / mean_span) spans, as in T5. A prefix denoiser draws
        the length of its shorter part (on average) uniformly from 1 to 2 * density * n - 1, whose mean is
        density * n; at the density 0.5 that is T5's `random_prefix_noise_mask`: a prefix of 1 to n - 1 tokens.

        Args:
            lengths: [P] tokens of each piece.
            draws: [P] random numbers of `DRAW_BITS` bits; a span denoiser's counts do not depend on them.
        """
        if self.mean_span is None:
            drawn = 1 + (draws * self.choices(lengths).astype(np.uint64) >> np.uint64(DRAW_BITS)).astype(
                np.int64
            )
            n_noise = drawn if self.density <= 0.5 else lengths - np.minimum(drawn, lengths - 1)
            return n_noise, np.ones_like(lengths)
        n_noise = np.clip(np.rint(lengths * self.density).astype(np.int64), 1, np.maximum(lengths - 1, 1))
        n_spans = np.rint(n_noise / self.mean_span).astype(np.int64)
        return n_noise, np.clip(n_spans, 1, np.maximum(np.minimum(n_noise, lengths - n_noise), 1))

    def sizes(self, lengths: Int64, draws: UInt64) -> tuple[Int64, Int64]:
        """[P] source and target tokens of pieces, with mode token, sentinels and EOS; see `plan`."""
        n_noise, n_spans = self.plan(lengths, draws)
        n_sentinels = n_spans * self.has_sentinels
        return (
            lengths - n_noise + n_sentinels + 1 + (self.mode_id is not None),
            n_noise + n_sentinels + 1,
        )

    def choices(self, lengths: Int64) -> Int64:
        """Of how many lengths a prefix denoiser draws that of its shorter part."""
        shorter = min(self.density, 1 - self.density)
        return np.maximum((2 * shorter * lengths).astype(np.int64) - 1, 1)


class PieceSizes:
    """The sizes of one denoiser's pieces, one at a time: what cutting asks for again and again.

    Args:
        denoiser: Whose.
        max_source_len: Tokens of a row's source.
        max_target_len: Tokens of a row's target.
        n_sentinels: Spans that a piece may have at most.
    """

    def __init__(
        self, denoiser: Denoiser, max_source_len: int, max_target_len: int, n_sentinels: int
    ) -> None:
        self.denoiser = denoiser
        self._source, self._target, self._choices = [0], [0], [0]
        # A piece has at least as many tokens on its two sides together as it is long.
        lengths = np.arange(1, min(max_source_len + max_target_len, LONGEST_PIECE) + 1)
        if denoiser.mean_span is None:
            self._is_late = denoiser.density > 0.5
            self._extra = 1 + (denoiser.mode_id is not None)
            self._choices += denoiser.choices(lengths).tolist()
            return
        draws = np.zeros(len(lengths), np.uint64)
        source, target = denoiser.sizes(lengths, draws)
        fits = (source <= max_source_len) & (target <= max_target_len)
        fits &= denoiser.plan(lengths, draws)[1] <= n_sentinels
        # Both sides grow with the piece, so all that fits comes first.
        n_fit = len(lengths) if fits.all() else int(np.argmin(fits))
        self._source += source[:n_fit].tolist()
        self._target += target[:n_fit].tolist()

    def of(self, length: int, draw: int) -> tuple[int, int]:
        """Source and target tokens of a piece, as `Denoiser.sizes`."""
        if self.denoiser.mean_span is not None:
            return self._source[length], self._target[length]
        n_noise = 1 + (draw * self._choices[length] >> DRAW_BITS)
        if self._is_late:
            n_noise = length - min(n_noise, length - 1)
        return length - n_noise + self._extra, n_noise + 1

    def longest(self, source: int, target: int, draw: int) -> int:
        """Tokens of the longest piece that fits so many source and target tokens; 0 if none does."""
        if self.denoiser.mean_span is not None:
            return min(bisect_right(self._source, source), bisect_right(self._target, target)) - 1
        # The two sides together have length + 1 + extra tokens, and neither shrinks where the piece grows.
        low, high = 0, min(source + target - 1 - self._extra, len(self._choices) - 1)
        while low < high:
            middle = (low + high + 1) // 2
            n_source, n_target = self.of(middle, draw)
            if n_source <= source and n_target <= target:
                low = middle
            else:
                high = middle - 1
        return max(low, 0)
