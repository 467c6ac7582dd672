"""Samples for benchmarks/gpu.py, packed or padded: made up, with lengths as text has them, or a corpus's pairs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu_sections.plan import Setting
from dist_transformer.data.assemble import assemble
from dist_transformer.data.batch import Batch
from dist_transformer.data.hashing import Int64
from dist_transformer.data.packing import bucket, pack
from dist_transformer.data.ragged import ragged_gather
from dist_transformer.data.rows import COUNTS, PlacedRows, Rows
from dist_transformer.data.token_ids import EOS_ID, UNK_ID
from dist_transformer.model.flops import Work, useful_work

WINDOW = 4096
"""Samples that are packed together, as `data.window` has it."""
_SPREAD, _TARGET_SHARE, _TARGET_SPREAD = 0.9, 0.24, 0.35


@dataclass(frozen=True)
class Side:
    """Sources or targets: all tokens in one array, and each one's length."""

    tokens: NDArray[np.uint16] | NDArray[np.uint32]
    lengths: Int64

    def take(self, order: Int64) -> "Side":
        """Some of them, in this order."""
        return Side(ragged_gather(self.tokens, self.lengths, order), self.lengths[order])


class Pool:
    """Samples, packed rows and buckets of them: the same for everyone who trains.

    Source lengths are log-normal, targets a quarter as long with some spread, so that rows of 512 and 128 fill on
    both sides; token ids follow Zipf's law. The generator is seeded: every section sees the same samples.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.vocab_size = setting.vocab_size
        sides = _made_up(setting) if setting.shards is None else self._read(Path(setting.shards))
        self.source, self.target = sides
        self._rows: Rows | None = None

    def __len__(self) -> int:
        return len(self.source.lengths)

    @property
    def rows(self) -> Rows:
        """All samples, packed."""
        if self._rows is None:
            n = len(self)
            windows = [np.arange(start, min(start + WINDOW, n)) for start in range(0, n, WINDOW)]
            rows = Rows.concatenate([self._pack(window) for window in windows])
            # As the loader does: packing leaves what fits worst for the end of a window.
            self._rows = rows.select(np.random.default_rng(2).permutation(len(rows)))
        return self._rows

    def batches(self, n_rows: int, count: int) -> list[Batch]:
        """So many batches of packed rows; they begin again at the first row where there are no more."""
        numbers = np.arange(n_rows * count) % len(self.rows)
        return [
            self._assemble(self.rows.select(part), bucketed=False) for part in numbers.reshape(count, n_rows)
        ]

    def unpacked(self, n_rows: int) -> Batch:
        """The samples of the first packed rows, each in a row of its own."""
        return self._assemble(self.rows.select(np.arange(n_rows)), bucketed=True)

    def buckets(self, n_tokens: int) -> Iterator[Batch]:
        """For ever: samples of like lengths, a row each, at most `n_tokens` positions on a side; in random order.

        The one with the most positions comes first, so that what does not fit memory is known at once.
        """
        order, n_samples = bucket(self.source.lengths, self.target.lengths, n_tokens)
        parts = np.split(order, np.cumsum(n_samples)[:-1])
        # What is left over, where it is a single sample: torch's compiler would make a graph for it alone.
        parts = [part for part in parts if len(part) > 1] or parts
        parts.sort(key=lambda part: -len(part) * int(self.source.lengths[part].max()))
        generator = np.random.default_rng(3)
        yield self._assemble(self._rows_of(parts[0], np.ones(len(parts[0]), np.int64)), bucketed=True)
        while True:
            for index in generator.permutation(len(parts)):
                part = parts[int(index)]
                yield self._assemble(self._rows_of(part, np.ones(len(part), np.int64)), bucketed=True)

    def _pack(self, window: Int64) -> Rows:
        lengths = self.source.lengths[window], self.target.lengths[window]
        order, n_samples = pack(*lengths, self.setting.source_len, self.setting.target_len)
        return self._rows_of(window[order], n_samples)

    def _rows_of(self, order: Int64, n_samples: Int64) -> Rows:
        source, target = self.source.take(order), self.target.take(order)
        counts = np.zeros((len(n_samples), len(COUNTS)), np.int64)
        return Rows(source.tokens, target.tokens, source.lengths, target.lengths, n_samples, counts)

    def _assemble(self, rows: Rows, *, bucketed: bool) -> Batch:
        numbers = np.arange(len(rows))
        placed = PlacedRows(rows, numbers, np.zeros_like(numbers), np.zeros((len(rows), 4), np.int64))
        return assemble(placed, self.setting.source_len, self.setting.target_len, bucketed=bucketed)

    def _read(self, shards: Path) -> tuple[Side, Side]:
        """A corpus's pairs, cut where they are longer than a row."""
        from benchmarks.shapes import read_pairs

        pairs, self.vocab_size = read_pairs(shards)
        chosen = pairs[: self.setting.n_samples]
        limits = self.setting.source_len, self.setting.target_len
        sides = [
            [np.asarray([*pair[side][:-1][: limit - 1], EOS_ID], np.uint32) for pair in chosen]
            for side, limit in enumerate(limits)
        ]
        source, target = (
            Side(np.concatenate(side), np.asarray([len(tokens) for tokens in side], np.int64))
            for side in sides
        )
        return source, target


def _made_up(setting: Setting) -> tuple[Side, Side]:
    generator = np.random.default_rng(1)
    n = setting.n_samples
    source = setting.median_source_len * np.exp(_SPREAD * generator.standard_normal(n))
    target = source * _TARGET_SHARE * np.exp(_TARGET_SPREAD * generator.standard_normal(n))
    sides = [
        np.clip(np.rint(lengths), 3, limit).astype(np.int64)
        for lengths, limit in ((source, setting.source_len), (target, setting.target_len))
    ]
    first, last = (side for side in (_tokens(generator, lengths, setting.vocab_size) for lengths in sides))
    return first, last


def _tokens(generator: np.random.Generator, lengths: Int64, vocab_size: int) -> Side:
    """Ids of which the r-th is 1/r as frequent as the first one; each sample ends with EOS."""
    n_ids = vocab_size - UNK_ID - 1
    tokens = UNK_ID + np.exp(generator.random(int(lengths.sum())) * np.log(n_ids)).astype(np.uint32)
    tokens[np.cumsum(lengths) - 1] = EOS_ID
    return Side(tokens, lengths)


def work_of(batch: Batch) -> Work:
    """What a batch holds, without padding."""
    return useful_work(batch.encoder_segment_ids, batch.decoder_segment_ids)
