"""Rows: packed samples in compact form, as they travel from loader workers, which do without torch."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from dist_transformer.data.hashing import Int64
from dist_transformer.data.objectives import Pieces, Samples
from dist_transformer.data.ragged import Tokens, ragged_gather, ragged_indices, starts_of


@dataclass(frozen=True)
class Rows:
    """R rows of N samples without padding: what a worker sends and a window holds."""

    source_tokens: Tokens
    """Flat, row by row, EOS included."""
    target_tokens: Tokens
    """Flat, row by row, EOS included."""
    source_lengths: Int64
    """[N]"""
    target_lengths: Int64
    """[N]"""
    n_samples: Int64
    """[R] samples of each row; 0 for a row of padding."""
    counts: Int64
    """[R, 4] samples truncated, documents split, samples dropped, samples lost; see `COUNTS`."""

    def __len__(self) -> int:
        return len(self.n_samples)

    @classmethod
    def concatenate(cls, parts: Sequence["Rows"]) -> "Rows":
        """The rows of all parts, one part after the other."""
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))

    @classmethod
    def build(cls, pieces: Pieces, samples: Samples, n_samples: Int64) -> "Rows":
        """Rows of samples.

        Args:
            pieces: N pieces in the order in which rows hold them.
            samples: Their tokens.
            n_samples: [R] how many belong to each row.
        """
        row = np.repeat(np.arange(len(n_samples)), n_samples)
        counts = np.zeros((len(n_samples), len(COUNTS)), np.int64)
        for column, is_counted in enumerate((pieces.is_truncated, pieces.is_split)):
            counts[:, column] = np.bincount(row[is_counted], minlength=len(n_samples))
        return cls(
            source_tokens=samples.source_tokens,
            target_tokens=samples.target_tokens,
            source_lengths=samples.source_lengths,
            target_lengths=samples.target_lengths,
            n_samples=n_samples,
            counts=counts,
        )

    def select(self, rows: Int64) -> "Rows":
        """Some of the rows, or all in another order."""
        samples = ragged_indices(starts_of(self.n_samples)[rows], self.n_samples[rows])
        return Rows(
            source_tokens=ragged_gather(self.source_tokens, self.source_lengths, samples),
            target_tokens=ragged_gather(self.target_tokens, self.target_lengths, samples),
            source_lengths=self.source_lengths[samples],
            target_lengths=self.target_lengths[samples],
            n_samples=self.n_samples[rows],
            counts=self.counts[rows],
        )


COUNTS = ("n_truncated", "n_split", "n_dropped", "n_bad")
"""Columns of `Rows.counts`."""


@dataclass(frozen=True)
class PlacedRows:
    """Rows together with where they stand in the run."""

    rows: Rows
    numbers: Int64
    """[R] place in the global order of rows."""
    lanes: Int64
    """[R]"""
    cursors: Int64
    """[R, 4] the lane's cursor after the row."""
    problems: tuple[str, ...] = ()
    """Sentences about samples that were lost before these rows or near them (policy `skip`)."""

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """All rows, one part after the other."""
        return cls(
            rows=Rows.concatenate([p.rows for p in parts]),
            numbers=np.concatenate([p.numbers for p in parts]),
            lanes=np.concatenate([p.lanes for p in parts]),
            cursors=np.concatenate([p.cursors for p in parts]),
            problems=tuple(problem for p in parts for problem in p.problems),
        )

    def select(self, rows: Int64) -> Self:
        """Some of the rows, or all in another order; with the problems of all."""
        arrays = self.numbers[rows], self.lanes[rows], self.cursors[rows]
        return type(self)(self.rows.select(rows), *arrays, self.problems)
