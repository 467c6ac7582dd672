"""Lanes at work: a window of a shard becomes rows, and a lane delivers rows from any cursor on."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dist_transformer.config.data import DataConfig
from dist_transformer.data.batch import Cursor
from dist_transformer.data.manifest import Kind, Manifest, Split
from dist_transformer.data.order import count_windows, lane_shards
from dist_transformer.data.rows import COUNTS, Rows
from dist_transformer.data.shards import RawWindow, ShardReader, ShardSet
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.data.window import WindowPlan
from dist_transformer.errors import DataError


@dataclass(frozen=True)
class RowPlan:
    """All that decides the rows of a split: plain values, so that it travels to loader workers."""

    shards: ShardSet
    windows: WindowPlan
    window: int
    """Samples in a window."""

    @classmethod
    def build(cls, data: DataConfig, manifest: Manifest, split: Split, seed: int, shuffle: bool) -> "RowPlan":
        """The plan of a split of a prepared folder.

        Raises:
            DataError: the objective does not fit the kind of shards, or the rows are too short for it.
        """
        tokenizer = TextTokenizer.load(manifest.tokenizer_path)
        windows = WindowPlan.build(data, data.corpora()[0], tokenizer, seed, shuffle)
        _check_kind(data, manifest, windows.objective.kind)
        return cls(ShardSet.build(manifest, split, data), windows, data.window)

    def count_windows(self, shard: int) -> int:
        """Windows of a shard."""
        return count_windows(self.shards.infos[shard].n_samples, self.window)

    def build_rows(self, raw: RawWindow, epoch: int, shard: int) -> tuple[Rows, int]:
        """The rows of a window in the order of training, and how many samples were dropped."""
        window, location = raw.first // self.window, self.shards.location(shard)
        return self.windows.build_rows(raw, epoch=epoch, shard=shard, window=window, location=location)

    def order_options(self) -> dict[str, Any]:
        """What besides the shards decides the rows: a resume must find the same values."""
        return {"window": self.window} | self.windows.describe()


def _check_kind(data: DataConfig, manifest: Manifest, wanted: Kind) -> None:
    if manifest.kind != wanted:
        fitting = "pairs" if manifest.kind == "pairs" else "span_corruption"
        raise DataError(
            f"data.objective={data.objective} needs {wanted} shards, {manifest.root} holds "
            f"{manifest.kind}: set "
            f"data.objective={fitting} or prepare with `dist-transformer prepare {wanted}`"
        )


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
            f"no sample of the shards in {self.plan.shards.root} that lane {self.lane} reads fits a row: raise "
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
            self._reader, self._reader_place = self.plan.shards.open(shard), (place.epoch, place.shard)
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
            n_shards, plan = len(self.plan.shards), self.plan.windows
            self._shards = lane_shards(n_shards, self.n_lanes, self.lane, plan.seed, epoch, plan.shuffle)
            self._shards_epoch = epoch
        return self._shards
