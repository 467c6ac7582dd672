"""Span corruption: T5's denoising of plain text."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from dist_transformer.data.hashing import Int64, UInt64, hash_array
from dist_transformer.data.manifest import Kind
from dist_transformer.data.objectives.base import Fields, Samples
from dist_transformer.data.ragged import Tokens, ragged_indices, starts_of
from dist_transformer.errors import DataError

_POSITION_BITS, _PIECE_BITS = 16, 20
_MAX_PIECES = 1 << (_PIECE_BITS - 1)


@dataclass(frozen=True)
class SpanCorruption:
    """T5's span corruption (Raffel et al. 2020, section 3.1.4; `random_spans_noise_mask` of its code).

    A document of n tokens loses round(n * density) tokens in round(lost / mean_span) spans; both the lost and
    the kept tokens are cut at random into that many parts, and a kept part comes first. The source has a
    sentinel for each span, the target is sentinel, span, sentinel, span, ..., EOS. There is no last sentinel
    before EOS: the paper's figure 2 shows one, but T5's code (`nonnoise_span_to_unique_sentinel`) and Hugging
    Face's `FlaxDataCollatorForT5MLM` write none, because a document always ends in a lost span.

    Documents whose corrupted form exceeds a row are cut first into pieces of the longest length that fits
    (T5's `random_spans_helper`), which also keeps the number of spans within the sentinels. A document of one
    token becomes a source of just the sentinel and a target of sentinel and token; an empty one is dropped.
    """

    density: float
    mean_span: float
    max_source_len: int
    max_target_len: int
    eos_id: int
    sentinel_ids: tuple[int, ...]
    kind: ClassVar[Kind] = "text"

    def plan(self, lengths: Int64) -> tuple[Int64, Int64, Int64]:
        """(lost tokens, spans, kept tokens) for documents of these lengths."""
        n_noise = np.clip(np.rint(lengths * self.density).astype(np.int64), 1, np.maximum(lengths - 1, 1))
        n_kept = lengths - n_noise
        n_spans = np.rint(n_noise / self.mean_span).astype(np.int64)
        return n_noise, np.clip(n_spans, 1, np.maximum(np.minimum(n_noise, n_kept), 1)), n_kept

    def longest_piece(self) -> int:
        """Tokens of the longest document that, as every shorter one, fits a row and the sentinels."""
        # Whichever side fills first bounds the search; the + 8 covers rounding.
        limit = min(self.max_source_len / (1 - self.density), self.max_target_len / self.density)
        lengths = np.arange(1, min(int(limit) + 8, (1 << _POSITION_BITS) - 1) + 1)
        n_noise, n_spans, n_kept = self.plan(lengths)
        fits = (n_kept + n_spans + 1 <= self.max_source_len) & (n_noise + n_spans + 1 <= self.max_target_len)
        fits &= n_spans <= len(self.sentinel_ids)
        longest = len(lengths) if fits.all() else int(np.argmin(fits))
        if longest < 2:
            raise DataError(
                f"span corruption does not fit rows of {self.max_source_len} source and "
                f"{self.max_target_len} target "
                f"tokens with {len(self.sentinel_ids)} sentinels: use a tokenizer with <extra_id_N> tokens "
                "and at "
                "least data.max_source_len=3 and data.max_target_len=3"
            )
        return longest

    def __call__(self, fields: Fields, indices: Int64, key: int, shard: str = "") -> Samples:
        """Corrupt a window of documents; see `Objective`."""
        tokens, lengths = fields[0]
        longest, filled = self.longest_piece(), lengths > 0
        n_pieces = -(-lengths[filled] // longest)
        piece_of = ragged_indices(np.zeros_like(n_pieces), n_pieces)
        piece_lengths = np.minimum(np.repeat(lengths[filled], n_pieces) - piece_of * longest, longest)
        keys = hash_array(key, np.repeat(indices[filled], n_pieces))
        keys = hash_array(keys, piece_of)
        is_split = (piece_of == 0) & np.repeat(n_pieces > 1, n_pieces)
        parts = []
        starts = starts_of(piece_lengths)
        for i in range(0, len(keys), _MAX_PIECES):
            chunk = slice(i, i + _MAX_PIECES)
            end = int(starts[chunk][-1] + piece_lengths[chunk][-1])
            parts.append(self._corrupt(tokens[starts[i] : end], piece_lengths[chunk], keys[chunk]))
        empty = (tokens[:0], np.zeros(0, np.int64), tokens[:0], np.zeros(0, np.int64))
        columns = tuple(map(np.concatenate, zip(*parts, strict=True))) if parts else empty
        source, source_lengths, target, target_lengths = columns
        n_dropped, is_truncated = int(len(lengths) - filled.sum()), np.zeros(len(keys), np.bool_)
        return Samples(source, source_lengths, target, target_lengths, is_truncated, is_split, n_dropped)

    def describe(self) -> dict[str, Any]:
        """What decides the pairs."""
        options = asdict(self)
        del options["sentinel_ids"]
        return {"objective": "SpanCorruption"} | options

    def _corrupt(self, tokens: Tokens, lengths: Int64, keys: UInt64) -> tuple[Tokens, Int64, Tokens, Int64]:
        """Sources and targets of P pieces that lie one after the other in `tokens`."""
        n_noise, n_spans, n_kept = self.plan(lengths)
        noise = _random_segments(n_noise, n_spans, hash_array(keys, 1))
        kept = _random_segments(n_kept, n_spans, hash_array(keys, 2))
        # In each piece kept and lost spans alternate, so with spans counted over the whole window the flat
        # input is kept[0], noise[0], kept[1], noise[1], ... and each output is the input's tokens moved up by
        # the sentinels and EOS written before them.
        piece = np.repeat(np.arange(len(lengths)), n_spans)
        span = np.arange(len(piece))
        is_noise = np.repeat(np.tile([False, True], len(piece)), np.stack([kept, noise], 1).ravel())
        sentinels = np.asarray(self.sentinel_ids, tokens.dtype)[span - np.repeat(starts_of(n_spans), n_spans)]

        source = np.full(int((n_kept + n_spans + 1).sum()), self.eos_id, tokens.dtype)
        source[np.arange(int(kept.sum())) + np.repeat(span + piece, kept)] = tokens[~is_noise]
        source[np.cumsum(kept) + span + piece] = sentinels
        target = np.full(int((n_noise + n_spans + 1).sum()), self.eos_id, tokens.dtype)
        target[np.arange(int(noise.sum())) + np.repeat(span + piece + 1, noise)] = tokens[is_noise]
        target[starts_of(noise) + span + piece] = sentinels
        return source, n_kept + n_spans + 1, target, n_noise + n_spans + 1


def _random_segments(n_items: Int64, n_segments: Int64, keys: UInt64) -> Int64:
    """Cut each n_items into n_segments parts of at least 1, uniformly over all cuts (T5's
    `_random_segmentation`).

    Returns:
        The parts' lengths, flat: n_segments[0] of them, then n_segments[1], ...
    """
    n_places = np.maximum(n_items - 1, 0)
    item = np.repeat(np.arange(len(n_items)), n_places)
    place = ragged_indices(np.ones_like(n_places), n_places)
    # One sort for the whole window: piece, then random bits, then the place itself; the first places of
    # each piece are its cuts. The widths are constants so that noise never depends on the rest of the window.
    random = hash_array(keys[item], place) >> np.uint64(_PIECE_BITS + _POSITION_BITS)
    code = np.sort(_pack_bits(item, random, place))
    chosen = code[ragged_indices(starts_of(n_places), n_segments - 1)] & np.uint64((1 << _POSITION_BITS) - 1)
    is_cut = np.ones(int(n_segments.sum()), np.bool_)
    is_cut[starts_of(n_segments)] = False
    begins = np.zeros(len(is_cut), np.uint64)
    item = np.repeat(np.arange(len(n_items)), n_segments)
    begins[is_cut] = chosen
    begins = np.sort((item.astype(np.uint64) << np.uint64(_POSITION_BITS)) | begins)
    begins &= np.uint64((1 << _POSITION_BITS) - 1)
    ends = np.append(begins[1:], np.uint64(0)).astype(np.int64)
    ends[np.cumsum(n_segments) - 1] = n_items
    return ends - begins.astype(np.int64)


def _pack_bits(item: Int64, random: UInt64, place: Int64) -> UInt64:
    code = item.astype(np.uint64) << np.uint64(64 - _PIECE_BITS)
    code |= random << np.uint64(_POSITION_BITS)
    code |= place.astype(np.uint64)
    return code
