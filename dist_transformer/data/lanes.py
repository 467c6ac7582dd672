"""Lanes at work: a window of a shard becomes rows, and a lane delivers rows from any cursor on."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dist_transformer.config.schema import DataConfig
from dist_transformer.data.batch import Cursor
from dist_transformer.data.hashing import permutation
from dist_transformer.data.manifest import Kind, Manifest, ShardInfo
from dist_transformer.data.objectives import Pairs, Samples, SpanCorruption
from dist_transformer.data.order import count_windows, lane_shards, noise_key, row_key, window_key
from dist_transformer.data.packing import pack
from dist_transformer.data.rows import COUNTS, Rows
from dist_transformer.data.shards import RawWindow, ShardReader
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.errors import DataError


@dataclass(frozen=True)
class RowPlan:
    """All that decides the rows of a split: plain values, so that it travels to loader workers."""

    root: Path
    kind: Kind
    shards: tuple[ShardInfo, ...]
    dtype: "np.dtype[np.unsignedinteger[Any]]"
    vocab_size: int
    seed: int
    window: int
    shuffle: bool
    packing: bool
    objective: SpanCorruption | Pairs

    @classmethod
    def build(cls, data: DataConfig, manifest: Manifest, split: str, seed: int, shuffle: bool) -> "RowPlan":
        """The plan of a split of a prepared folder.

        Raises:
            DataError: the objective does not fit the kind of shards, or the rows are too short for it.
        """
        tokenizer = TextTokenizer.load(manifest.tokenizer_path)
        return cls(
            root=manifest.root,
            kind=manifest.kind,
            shards=manifest.train if split == "train" else manifest.eval,
            dtype=manifest.dtype,
            vocab_size=manifest.vocab_size,
            seed=seed,
            window=data.window,
            shuffle=shuffle,
            packing=data.packing,
            objective=_build_objective(data, manifest, tokenizer),
        )

    def open_shard(self, shard: int) -> ShardReader:
        """A reader at the start of a shard."""
        info = self.shards[shard]
        return ShardReader(self.root / info.file, self.kind, self.dtype, self.vocab_size, info.n_samples)

    def count_windows(self, shard: int) -> int:
        """Windows of a shard."""
        return count_windows(self.shards[shard].n_samples, self.window)

    def build_rows(self, raw: RawWindow, epoch: int, shard: int) -> tuple[Rows, int]:
        """The rows of a window in the order of training, and how many samples were dropped."""
        samples = self._build_samples(raw, epoch, shard)
        return self._order_rows(samples, epoch, shard, raw.first // self.window), samples.n_dropped

    def _order_rows(self, samples: Samples, epoch: int, shard: int, window: int) -> Rows:
        order = np.arange(len(samples))
        if self.shuffle:
            order = permutation(len(order), window_key(self.seed, epoch, shard, window))
        if not self.packing:
            return Rows.build(samples, order, np.ones_like(order))
        sides = samples.source_lengths[order], samples.target_lengths[order]
        packed, n_samples = pack(*sides, self.objective.max_source_len, self.objective.max_target_len)
        rows = Rows.build(samples, order[packed], n_samples)
        if self.shuffle:
            # Packing leaves rows sorted by the size of their samples.
            row_order = permutation(len(rows), row_key(self.seed, epoch, shard, window))
        else:
            row_order = np.argsort(packed[np.cumsum(n_samples) - n_samples], kind="stable")
        return rows.select(row_order)

    def _build_samples(self, raw: RawWindow, epoch: int, shard: int) -> Samples:
        if isinstance(self.objective, SpanCorruption):
            tokens, lengths = raw.fields[0]
            indices = raw.first + np.arange(len(raw))
            return self.objective(tokens, lengths, indices, noise_key(self.seed, epoch, shard))
        (source, source_lengths), (target, target_lengths) = raw.fields
        path = str(self.root / self.shards[shard].file)
        return self.objective(source, source_lengths, target, target_lengths, path)

    def order_options(self) -> dict[str, Any]:
        """What besides the shards decides the rows: a resume must find the same values."""
        options: dict[str, Any] = {
            "seed": self.seed,
            "window": self.window,
            "shuffle": self.shuffle,
            "packing": self.packing,
        }
        objective = asdict(self.objective)
        objective.pop("sentinel_ids", None)
        return options | {"objective": type(self.objective).__name__} | objective


def _build_objective(
    data: DataConfig, manifest: Manifest, tokenizer: TextTokenizer
) -> SpanCorruption | Pairs:
    wanted = "pairs" if data.objective == "pairs" else "text"
    if manifest.kind != wanted:
        fitting = "pairs" if manifest.kind == "pairs" else "span_corruption"
        raise DataError(
            f"data.objective={data.objective} needs {wanted} shards, {manifest.root} holds "
            f"{manifest.kind}: set "
            f"data.objective={fitting} or prepare with `dist-transformer prepare {wanted}`"
        )
    if data.objective == "pairs":
        return Pairs(data.max_source_len, data.max_target_len, data.too_long, tokenizer.eos_id)
    objective = SpanCorruption(
        density=data.noise_density,
        mean_span=data.mean_noise_span,
        max_source_len=data.max_source_len,
        max_target_len=data.max_target_len,
        eos_id=tokenizer.eos_id,
        sentinel_ids=tokenizer.sentinel_ids,
    )
    objective.longest_piece()  # raises where the rows are too short
    return objective


class LaneReader:
    """One lane: its rows in order, from a cursor on, forever.

    It holds the window that is being delivered, and builds the next one at a point of its progress that
    differs from lane to lane: built only when the last row is gone, the windows of all lanes would fall due
    at the same time, and the run would wait for all of them at once.
    """

    def __init__(self, plan: RowPlan, lane: int, n_lanes: int, cursor: Cursor) -> None:
        self.plan, self.lane, self.n_lanes = plan, lane, n_lanes
        self._shards: list[int] = []
        self._shards_epoch = -1
        self._reader: ShardReader | None = None
        self._reader_place = (-1, -1)
        self._ahead_at = 0.25 + 0.75 * (lane + 1) / n_lanes
        self._ahead: tuple[Cursor, Rows] | None = None
        place = replace(cursor, row=0)
        self._cursor, self._rows = self._build_from(place)
        self._next = cursor.row if self._cursor == place else 0
        self._locate()

    def next_row(self) -> tuple[Rows, Cursor]:
        """The next row and the cursor after it."""
        if self._next >= len(self._rows):
            self._cursor, self._rows = self._take_ahead()
            self._next = 0
            self._locate()
        row = self._slice(self._next)
        self._next += 1
        if self._ahead is None and self._next >= math.ceil(len(self._rows) * self._ahead_at):
            self._ahead = self._build_from(self._following(self._cursor))
        if self._next < len(self._rows):
            return row, replace(self._cursor, row=self._next)
        return row, self._following(self._cursor)

    def _slice(self, i: int) -> Rows:
        rows = self._rows
        samples = slice(int(self._sample_starts[i]), int(self._sample_starts[i + 1]))
        return Rows(
            rows.source_tokens[self._source_starts[samples.start] : self._source_starts[samples.stop]],
            rows.target_tokens[self._target_starts[samples.start] : self._target_starts[samples.stop]],
            rows.source_lengths[samples],
            rows.target_lengths[samples],
            rows.n_samples[i : i + 1],
            rows.counts[i : i + 1],
        )

    def _locate(self) -> None:
        self._sample_starts = np.append(0, np.cumsum(self._rows.n_samples))
        self._source_starts = np.append(0, np.cumsum(self._rows.source_lengths))
        self._target_starts = np.append(0, np.cumsum(self._rows.target_lengths))

    def _take_ahead(self) -> tuple[Cursor, Rows]:
        ahead, self._ahead = self._ahead, None
        return ahead or self._build_from(self._following(self._cursor))

    def _build_from(self, place: Cursor) -> tuple[Cursor, Rows]:
        """The first window from `place` on that has rows, and where it is."""
        first_epoch, n_dropped = place.epoch, 0
        while place.epoch < first_epoch + 2:
            shard = self._epoch_shards(place.epoch)[place.shard]
            if place.window < self.plan.count_windows(shard):
                rows, newly_dropped = self.plan.build_rows(
                    self._read_window(place, shard), place.epoch, shard
                )
                n_dropped += newly_dropped
                if len(rows):
                    rows.counts[0, COUNTS.index("n_dropped")] = n_dropped
                    return place, rows
            place = self._following(place)
        raise DataError(
            f"no sample of the shards in {self.plan.root} that lane {self.lane} reads fits a row: raise "
            "data.max_source_len and data.max_target_len, or set data.too_long=truncate"
        )

    def _read_window(self, place: Cursor, shard: int) -> RawWindow:
        begin = place.window * self.plan.window
        if (
            self._reader is None
            or self._reader_place != (place.epoch, place.shard)
            or self._reader.position != begin
        ):
            if self._reader is not None:
                self._reader.close()
            self._reader, self._reader_place = self.plan.open_shard(shard), (place.epoch, place.shard)
            self._reader.skip(begin)
        return self._reader.read(self.plan.window)

    def _following(self, place: Cursor) -> Cursor:
        """The cursor at the start of the window after this one: the next shard's, the next epoch's at the
        end.
        """
        shards = self._epoch_shards(place.epoch)
        if place.window + 1 < self.plan.count_windows(shards[place.shard]):
            return Cursor(place.epoch, place.shard, place.window + 1)
        if place.shard + 1 < len(shards):
            return Cursor(place.epoch, place.shard + 1)
        return Cursor(place.epoch + 1)

    def _epoch_shards(self, epoch: int) -> list[int]:
        if epoch != self._shards_epoch:
            n_shards, plan = len(self.plan.shards), self.plan
            self._shards = lane_shards(n_shards, self.n_lanes, self.lane, plan.seed, epoch, plan.shuffle)
            self._shards_epoch = epoch
        return self._shards
