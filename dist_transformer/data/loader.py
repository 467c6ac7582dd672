"""Loader workers: each owns the lanes of its residue and sends chunks of rows; the chunks interleave to one
order.

Workers are started from a fork server. Fork copies a process that may hold CUDA contexts and the threads of gloo, NCCL
and OpenMP, whose locks can be taken at that instant; with spawn each worker imports everything anew; the fork server
imports it once, for all, and its children share that memory.
"""

import resource
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from dist_transformer.data.cursor import Cursor, as_numbers
from dist_transformer.data.lanes import LaneReader, LaneRow, dealt_shards
from dist_transformer.data.plan import RunPlan
from dist_transformer.data.producer import Producer
from dist_transformer.data.rows import PlacedRows, Rows
from dist_transformer.errors import DataError

_FIRST_ROWS = 64
"""Rows whose remote shards are asked for before the first is delivered."""


@dataclass(frozen=True)
class RankRows:
    """The rows of one data-parallel rank from a point of the run on: plain values, sent to workers."""

    plan: RunPlan
    dp_rank: int
    dp_size: int
    first_row: int
    """Rows of the run, over all ranks, that came before."""
    cursors: dict[tuple[int, int], Cursor] = field(default_factory=dict)
    """Where (corpus, lane) stand; those not named are at their start."""

    @property
    def first_local_row(self) -> int:
        """This rank's first row: it has the rows n with n mod dp_size = dp_rank, and this is the n div
        dp_size.
        """
        return -((self.dp_rank - self.first_row) // self.dp_size)

    def iterate(self, worker: int, n_workers: int) -> Iterator[tuple[int, int, LaneRow]]:
        """(row number, lane, row with the cursor after it) of every n_workers-th row of the rank, forever.

        With n_workers dividing the rank's lanes, a worker meets only the lanes of its residue.
        """
        # Made when their first row is due: the first batch waits for its own lanes only.
        readers: dict[tuple[int, int], LaneReader] = {}
        n_lanes = self.plan.n_lanes
        local = self.first_local_row + worker
        self._prefetch(range(local, local + _FIRST_ROWS * n_workers, n_workers))
        while True:
            number = local * self.dp_size + self.dp_rank
            lane, corpus = number % n_lanes, self.plan.mixture.corpus_of(number)
            place = corpus, lane
            if place not in readers:
                cursor = self.cursors.get(place, Cursor())
                readers[place] = LaneReader(self.plan.corpora[corpus], lane, n_lanes, cursor)
            yield number, lane, readers[place].next_row()
            local += n_workers

    def _prefetch(self, local_rows: range) -> None:
        """Have the shards that these rows come from fetched together, not one after the other as rows fall due."""
        for local in local_rows:
            number = local * self.dp_size + self.dp_rank
            lane, corpus = number % self.plan.n_lanes, self.plan.mixture.corpus_of(number)
            plan = self.plan.corpora[corpus]
            if plan.shards.is_remote:
                cursor = self.cursors.get((corpus, lane), Cursor())
                plan.shards.prefetch(dealt_shards(plan, lane, self.plan.n_lanes, cursor.epoch)[cursor.shard])

    def chunks(self, worker: int, n_workers: int, n_rows: int) -> Generator[PlacedRows, None, None]:
        """`iterate` in chunks of n_rows."""
        rows = self.iterate(worker, n_workers)
        while True:
            chunk = [next(rows) for _ in range(n_rows)]
            yield PlacedRows(
                rows=Rows.concatenate([row.row for _, _, row in chunk]),
                numbers=np.array([number for number, _, _ in chunk], np.int64),
                lanes=np.array([lane for _, lane, _ in chunk], np.int64),
                cursors=np.array([as_numbers(row.cursor) for _, _, row in chunk], np.int64),
                problems=tuple(row.problem for _, _, row in chunk if row.problem),
            )


class LoadedRows(Iterator[PlacedRows], Protocol):
    """Chunks of rows; whoever asks for them closes it, which ends what prepares them."""

    def close(self) -> None: ...


def load_rows(rank_rows: RankRows, n_workers: int, n_rows: int, prefetch: int) -> LoadedRows:
    """The rank's rows in order, in chunks. Workers start now, and not when the first chunk is asked for.

    Args:
        rank_rows: Which rows.
        n_workers: Processes; 0 reads in this one.
        n_rows: Rows wanted at a time; chunks are at least about as large.
        prefetch: Multiples of `n_rows` that each worker prepares ahead.

    Raises:
        DataError: by the iterator: bad data, or a worker that died; the same sentence whichever process met it.
    """
    if rank_rows.plan.n_lanes * len(rank_rows.plan.corpora) > 200:
        raise_open_file_limit()
    if n_workers == 0:
        return rank_rows.chunks(0, 1, n_rows)
    per_worker = -(-n_rows // n_workers)
    return _InOrder(
        [
            Producer(_chunks, rank_rows, worker, n_workers, per_worker, ahead=prefetch * n_workers)
            for worker in range(n_workers)
        ],
        per_worker,
    )


class _InOrder:
    """The workers' chunks, one of each in turn, as rows in the run's order."""

    def __init__(self, workers: list[Producer], per_worker: int) -> None:
        self._workers = workers
        # A chunk of each worker: together they are consecutive rows, column by column.
        self._by_turns = np.arange(len(workers) * per_worker).reshape(len(workers), per_worker).T.ravel()

    def __iter__(self) -> Iterator[PlacedRows]:
        return self

    def __next__(self) -> PlacedRows:
        if not self._workers:
            raise StopIteration
        try:
            turn: list[PlacedRows] = [worker.next() for worker in self._workers]
        except DataError:
            self.close()
            raise
        return PlacedRows.concatenate(turn).select(self._by_turns)

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.close()
        self._workers = []


def _chunks(rank_rows: RankRows, worker: int, n_workers: int, n_rows: int) -> Iterator[PlacedRows]:
    """What runs in a worker process."""
    raise_open_file_limit()
    return rank_rows.chunks(worker, n_workers, n_rows)


def raise_open_file_limit() -> None:
    """Every lane keeps its shard open: lift the soft limit on open files (often 1024) to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
