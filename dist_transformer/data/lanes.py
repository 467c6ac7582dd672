"""Lanes at work: a lane of a corpus delivers rows from any cursor on."""

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from dist_transformer.data.cursor import Cursor
from dist_transformer.data.order import lane_shards
from dist_transformer.data.plan import CorpusPlan
from dist_transformer.data.rows import COUNTS, Rows
from dist_transformer.data.shards import RawWindow, ShardReader
from dist_transformer.errors import DataError

_PASSES, _PASSES_OVER_BAD_SHARDS = 2, 8
"""Passes over a lane's shards without a single row after which it gives up. Each pass deals it other shards, so a lane
that met unreadable ones may find readable ones in the next."""


class LaneRow(NamedTuple):
    """What a lane gives at a time."""

    row: Rows
    cursor: Cursor
    """Where the lane stands after it."""
    problem: str
    """A sentence about samples that were lost before it (policy `skip`); empty where none were."""


class _Built(NamedTuple):
    cursor: Cursor
    rows: Rows
    problem: str


class LaneReader:
    """One lane of a corpus: its rows in order, from a cursor on, forever.

    It holds the window that is being delivered, and builds the next one at a point of its progress that
    differs from lane to lane: built only when the last row is gone, the windows of all lanes would fall due
    at the same time, and the run would wait for all of them at once.
    """

    def __init__(self, plan: CorpusPlan, lane: int, n_lanes: int, cursor: Cursor) -> None:
        self.plan, self.lane, self.n_lanes = plan, lane, n_lanes
        self._shards: list[int] = []
        self._shards_epoch = -1
        self._reader: ShardReader | None = None
        self._reader_place = Cursor(-1)
        """The window that the reader stands before."""
        self._ahead_at = 0.25 + 0.75 * (lane + 1) / n_lanes
        self._ahead: _Built | None = None
        place = replace(cursor, row=0)
        self._begin(self._build_from(place))
        self._next = cursor.row if self._cursor == place else 0

    @property
    def window(self) -> Cursor:
        """Where the window begins that the row given last is from."""
        return self._cursor

    def next_row(self) -> LaneRow:
        """The next row, and where the lane stands after it.

        Raises:
            DataError: a shard is damaged or unreachable (policy `error`), or no shard gives any row.
        """
        if self._next >= len(self._rows):
            ahead, self._ahead = self._ahead, None
            self._begin(ahead or self._build_from(self._following(self._cursor)))
        row, problem = self._slice(self._next), "" if self._next else self._problem
        self._next += 1
        if self._ahead is None and self._next >= math.ceil(len(self._rows) * self._ahead_at):
            self._ahead = self._build_from(self._following(self._cursor))
        if self._next < len(self._rows):
            return LaneRow(row, replace(self._cursor, row=self._next), problem)
        return LaneRow(row, self._following(self._cursor), problem)

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

    def _begin(self, window: _Built) -> None:
        self._cursor, self._rows, self._problem = window
        self._next = 0
        self._sample_starts = np.append(0, np.cumsum(self._rows.n_samples))
        self._source_starts = np.append(0, np.cumsum(self._rows.source_lengths))
        self._target_starts = np.append(0, np.cumsum(self._rows.target_lengths))

    def _build_from(self, place: Cursor) -> _Built:
        """The first window from `place` on that has rows."""
        first_epoch, n_dropped, n_bad, problem = place.epoch, 0, 0, ""
        while place.epoch < first_epoch + (_PASSES_OVER_BAD_SHARDS if n_bad else _PASSES):
            shard = self._epoch_shards(place.epoch)[place.shard]
            if place.window < self.plan.count_windows(shard):
                raw = self._read_window(place, shard)
                n_bad, problem = n_bad + raw.n_bad, problem or raw.problem
                rows, newly_dropped = self.plan.build_rows(raw, place.epoch, shard)
                n_dropped += newly_dropped
                if len(rows):
                    rows.counts[0, COUNTS.index("n_dropped")] = n_dropped
                    rows.counts[0, COUNTS.index("n_bad")] = n_bad
                    return _Built(place, rows, problem)
            place = self._following(place)
        raise self._nothing_found(problem)

    def _nothing_found(self, problem: str) -> DataError:
        first = self.plan.shards.location(self._shards[0])
        shards = f"the shards of {self.plan.name} that lane {self.lane} reads ({first} and others)"
        if problem:
            return DataError(
                f"nothing can be read of {shards} in {_PASSES_OVER_BAD_SHARDS} passes over them, with "
                f"data.on_bad_shard=skip: {problem}"
            )
        return DataError(
            f"no sample of {shards} fits a row: raise data.max_source_len and data.max_target_len, or set "
            "data.too_long=truncate"
        )

    def _read_window(self, place: Cursor, shard: int) -> RawWindow:
        if self._reader is None or self._reader_place != place:
            if self._reader is not None:
                self._reader.close()
            self._reader = self.plan.shards.open(shard)
            self.plan.shards.prefetch(self._shard_after(place))
            self._reader.skip(place.window * self.plan.window)
        self._reader_place = replace(place, window=place.window + 1)
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

    def _shard_after(self, place: Cursor) -> int:
        """The shard that the lane reads after the one at `place`."""
        if place.shard + 1 < len(self._shards):
            return self._shards[place.shard + 1]
        return dealt_shards(self.plan, self.lane, self.n_lanes, place.epoch + 1)[0]

    def _epoch_shards(self, epoch: int) -> list[int]:
        if epoch != self._shards_epoch:
            self._shards = dealt_shards(self.plan, self.lane, self.n_lanes, epoch)
            self._shards_epoch = epoch
        return self._shards


def dealt_shards(plan: CorpusPlan, lane: int, n_lanes: int, epoch: int) -> list[int]:
    """The shards of a lane in an epoch, in the order in which it reads them."""
    return lane_shards(len(plan.shards), n_lanes, lane, plan.windows.seed, epoch, plan.windows.shuffle)
