"""How rows become a batch of padded tensors."""

import numpy as np
import torch
from numpy.typing import NDArray

from dist_transformer.data.batch import Batch
from dist_transformer.data.cursor import Cursor
from dist_transformer.data.hashing import Int64, hash_array, mix64
from dist_transformer.data.ragged import ragged_indices, starts_of
from dist_transformer.data.rows import COUNTS, PlacedRows
from dist_transformer.data.token_ids import PAD_ID


def assemble(
    placed: PlacedRows,
    max_source_len: int,
    max_target_len: int,
    *,
    bucketed: bool = False,
    fingerprint: bool = False,
) -> Batch:
    """Padded tensors of rows, with segment ids, positions and the decoder's shifted input.

    Args:
        placed: Rows and where they stand in the run.
        max_source_len: Positions of a packed row on the encoder's side.
        max_target_len: Positions of a packed row on the decoder's side.
        bucketed: Rows are buckets: each sample gets a tensor row of its own, as wide as the longest of all.
        fingerprint: Compute `Batch.fingerprint`.
    """
    rows, n_samples = placed.rows, placed.rows.n_samples
    if bucketed:
        # A batch without any sample, at the end of an evaluation, is one row of padding.
        n_samples = np.ones(len(rows.source_lengths), np.int64) if n_samples.any() else np.zeros(1, np.int64)
        max_source_len = int(rows.source_lengths.max(initial=1))
        max_target_len = int(rows.target_lengths.max(initial=1))
    source = _Layout(n_samples, rows.source_lengths, max_source_len)
    target = _Layout(n_samples, rows.target_lengths, max_target_len)
    shifted = np.empty_like(rows.target_tokens)
    shifted[1:] = rows.target_tokens[:-1]
    shifted[starts_of(rows.target_lengths)] = PAD_ID
    totals = dict(zip(COUNTS, rows.counts.sum(0).tolist(), strict=True))
    return Batch(
        encoder_input_tokens=source.place(rows.source_tokens, np.int64),
        encoder_segment_ids=source.place(source.segment_ids, np.int32),
        encoder_positions=source.place(source.positions, np.int32),
        decoder_input_tokens=target.place(shifted, np.int64),
        decoder_target_tokens=target.place(rows.target_tokens, np.int64),
        decoder_segment_ids=target.place(target.segment_ids, np.int32),
        decoder_positions=target.place(target.positions, np.int32),
        n_source_tokens=len(rows.source_tokens),
        n_target_tokens=len(rows.target_tokens),
        n_pairs=len(rows.source_lengths),
        lanes=placed.lanes.tolist(),
        cursors=[Cursor(*cursor) for cursor in placed.cursors.tolist()],
        rows=placed.numbers.tolist(),
        fingerprint=_fingerprint(placed) if fingerprint else 0,
        problems=list(placed.problems),
        **totals,
    )


class _Layout:
    """Where the tokens of one side go in a padded array."""

    def __init__(self, n_samples: Int64, lengths: Int64, width: int) -> None:
        self._shape = (len(n_samples), width)
        row = np.repeat(np.arange(len(n_samples)), n_samples)
        starts = starts_of(lengths)
        row_starts = np.append(starts, lengths.sum())[starts_of(n_samples)]
        self._target = np.repeat(row * width - row_starts[row], lengths) + np.arange(int(lengths.sum()))
        self.positions = ragged_indices(np.zeros_like(lengths), lengths)
        self.segment_ids = np.repeat(ragged_indices(np.ones_like(n_samples), n_samples), lengths)

    def place(self, flat: NDArray[np.integer], dtype: type[np.integer]) -> torch.Tensor:
        """[rows, width] with 0 where there is no token."""
        padded = np.zeros(self._shape, dtype)
        padded.reshape(-1)[self._target] = flat
        return torch.from_numpy(padded)


def _fingerprint(placed: PlacedRows) -> int:
    """A hash of rows that adds up: the sum over ranks and micro-batches identifies a step's global batch.

    Each row gives a 40-bit hash of its number in the run and of its samples' tokens; sums of up to 2^23 rows
    fit the int64 of an all-reduce. Padding has no part in it: neither the width of the tensors nor the rows
    that share a batch matter. Rows of padding at the end of an evaluation count as empty rows.
    """
    rows = placed.rows
    total = mix64(placed.numbers.astype(np.uint64) + np.uint64(1))
    sides = (rows.source_tokens, rows.source_lengths), (rows.target_tokens, rows.target_lengths)
    for salt, (tokens, lengths) in enumerate(sides, start=1):
        ends = np.append(0, np.cumsum(lengths))[np.append(0, np.cumsum(rows.n_samples))]
        # EOS ends every sample, so tokens and their places in the row tell where samples begin.
        place = ragged_indices(np.zeros(len(rows), np.int64), np.diff(ends))
        factors = hash_array(salt, np.arange(int(np.diff(ends).max(initial=0)))) | np.uint64(1)
        sums = np.append(np.uint64(0), np.cumsum((tokens.astype(np.uint64) + np.uint64(1)) * factors[place]))
        total = mix64(total ^ (sums[ends[1:]] - sums[ends[:-1]]))
    return int((total >> np.uint64(24)).sum())
