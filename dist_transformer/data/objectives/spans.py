"""Writing corrupted text: where spans are lost, and the two sides of every piece, whole windows at a time."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dist_transformer.data.hashing import Int64, UInt64, hash_array
from dist_transformer.data.ragged import Tokens, ragged_indices, starts_of

_POSITION_BITS, _PIECE_BITS = 16, 20
MAX_PIECES = 1 << (_PIECE_BITS - 1)
"""Pieces that can be corrupted at once."""


@dataclass(frozen=True)
class Corruption:
    """What P pieces lose, and what marks it."""

    n_noise: Int64
    """[P] tokens that are lost."""
    n_spans: Int64
    """[P] spans in which they are lost."""
    has_sentinels: NDArray[np.bool_]
    """[P] whether a sentinel stands for each span on both sides."""
    mode_ids: Int64
    """[P] the token that begins the source; -1 for none."""


def corrupt(
    tokens: Tokens, lengths: Int64, keys: UInt64, plan: Corruption, sentinel_ids: tuple[int, ...], eos_id: int
) -> tuple[Tokens, Tokens]:
    """Flat sources and targets of P pieces that lie one after the other in `tokens`.

    Both the lost and the kept tokens of a piece are cut at random into as many parts as it has spans; they
    alternate, and a kept part comes first. The source has a sentinel for each span, the target is sentinel,
    span, sentinel, span, ..., EOS. There is no last sentinel before EOS: the T5 paper's figure 2 shows one, but
    T5's code (`nonnoise_span_to_unique_sentinel`) and Hugging Face's `FlaxDataCollatorForT5MLM` write none,
    because a piece always ends in a lost span.

    Args:
        tokens: Flat; an unsigned type that holds all special ids.
        lengths: [P]
        keys: [P] decide the cuts.
        plan: What each piece loses.
        sentinel_ids: As many as the most spans that are marked.
        eos_id: Ends both sides.
    """
    n_kept = lengths - plan.n_noise
    noise = _random_segments(plan.n_noise, plan.n_spans, hash_array(keys, 1))
    kept = _random_segments(n_kept, plan.n_spans, hash_array(keys, 2))
    # With spans counted over the whole window the flat input is kept[0], noise[0], kept[1], noise[1], ..., and
    # each output is the input's tokens moved up by what is written between them: mode tokens, sentinels, EOS.
    piece = np.repeat(np.arange(len(lengths)), plan.n_spans)
    is_noise = np.repeat(np.tile([False, True], len(piece)), np.stack([kept, noise], 1).ravel())
    is_marked = plan.has_sentinels[piece]
    marks_before: Int64 = np.cumsum(is_marked) - is_marked
    has_mode = plan.mode_ids >= 0
    number = (np.arange(len(piece)) - np.repeat(starts_of(plan.n_spans), plan.n_spans))[is_marked]
    sentinels = np.asarray(sentinel_ids, tokens.dtype)[number]

    source = np.full(int((n_kept + has_mode + 1).sum() + is_marked.sum()), eos_id, tokens.dtype)
    shift = marks_before + piece + np.cumsum(has_mode)[piece]
    source[np.arange(int(kept.sum())) + np.repeat(shift, kept)] = tokens[~is_noise]
    source[(np.cumsum(kept) + shift)[is_marked]] = sentinels
    first = starts_of(n_kept + has_mode + 1 + plan.n_spans * plan.has_sentinels)
    source[first[has_mode]] = plan.mode_ids[has_mode].astype(tokens.dtype)

    target = np.full(int((plan.n_noise + 1).sum() + is_marked.sum()), eos_id, tokens.dtype)
    shift = marks_before + is_marked + piece
    target[np.arange(int(noise.sum())) + np.repeat(shift, noise)] = tokens[is_noise]
    target[(starts_of(noise) + shift)[is_marked] - 1] = sentinels
    return source, target


def _random_segments(n_items: Int64, n_segments: Int64, keys: UInt64) -> Int64:
    """Cut each n_items into n_segments parts of at least 1, uniformly over all cuts (T5's
    `_random_segmentation`); a single part may be empty.

    Returns:
        The parts' lengths, flat: n_segments[0] of them, then n_segments[1], ...
    """
    n_places = np.where(n_segments > 1, n_items - 1, 0)
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
