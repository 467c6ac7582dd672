"""Loader workers: each owns the lanes of its residue and sends chunks of rows; the chunks interleave to one
order.

Workers are `torch.utils.data.DataLoader` processes started from a fork server. Measured on 2 busy cores,
until two workers are ready: fork 0.05 s, but it copies a process that may hold CUDA contexts and the threads
of gloo, NCCL and OpenMP, whose locks can be taken at that instant; spawn 6 s, since each worker imports
torch; fork server 3.4 s the first time and 0.1 s after, since it imports torch once, for all, and its
children share that memory.
"""

import os
import resource
import signal
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from multiprocessing import sharedctypes
from multiprocessing.context import ForkServerContext
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dist_transformer.data.batch import Cursor, as_numbers
from dist_transformer.data.fork_server import SHIELDED, start_fork_server
from dist_transformer.data.lanes import LaneReader, LaneRow, dealt_shards
from dist_transformer.data.plan import RunPlan
from dist_transformer.data.pool import exit_with_parent
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


class Flag:
    """A switch that processes share, without a lock.

    `multiprocessing.Event` takes a lock even to be read: a worker that is killed at that instant keeps it, and
    whoever asks next waits for ever. The loader asks it whenever it finds a worker dead.
    """

    def __init__(self) -> None:
        self._value = sharedctypes.RawValue("b", 0)

    def is_set(self) -> bool:
        return bool(self._value.value)

    def set(self) -> None:
        self._value.value = 1


class _WorkerContext(ForkServerContext):
    """The fork server's processes and queues, with flags that a killed process cannot hold."""

    def Event(self) -> Flag:  # type: ignore[override]  # noqa: N802  # the library's name
        return Flag()


class _WorkerRows(IterableDataset[Any]):
    """What runs in a worker process."""

    def __init__(self, rank_rows: RankRows, n_rows: int) -> None:
        self._rank_rows, self._n_rows = rank_rows, n_rows

    def __iter__(self) -> Iterator[PlacedRows | DataError]:
        info = get_worker_info()
        assert info is not None
        try:
            yield from self._rank_rows.chunks(info.id, info.num_workers, self._n_rows)
        except DataError as error:
            # Raised here, it would reach the main process wrapped in the text of a traceback.
            yield DataError(str(error))


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
    start_fork_server()
    per_worker = -(-n_rows // n_workers)
    loader: DataLoader[Any] = DataLoader(
        _WorkerRows(rank_rows, per_worker),
        batch_size=None,
        num_workers=n_workers,
        collate_fn=_as_is,
        prefetch_factor=prefetch * n_workers,
        multiprocessing_context=_WorkerContext(),
        worker_init_fn=_prepare_worker,
        # Its own: drawing the workers' seed from the default one would shift dropout after a resume.
        generator=torch.Generator(),
    )
    return _InOrder(iter(loader), n_workers, per_worker)


class _InOrder:
    """The workers' chunks, which come in turn, as rows in the run's order.

    The loader ends its workers when its iterator is gone, so this is its only owner, until it is closed or has failed.
    At the interpreter's end it would be too late: workers block the signal that they would be ended with then.
    """

    def __init__(self, chunks: Iterator[Any], n_workers: int, per_worker: int) -> None:
        self._chunks: Iterator[Any] | None = chunks
        self._n_workers = n_workers
        # DataLoader asks its workers in turn, so n_workers chunks together are consecutive rows, column by column.
        self._by_turns = np.arange(n_workers * per_worker).reshape(n_workers, per_worker).T.ravel()

    def __iter__(self) -> Iterator[PlacedRows]:
        return self

    def __next__(self) -> PlacedRows:
        if self._chunks is None:
            raise StopIteration
        turn = _next_turn(self._chunks, self._n_workers)
        if isinstance(turn, DataError):
            self.close()
            raise turn
        return PlacedRows.concatenate(turn).select(self._by_turns)

    def close(self) -> None:
        """End the workers."""
        self._chunks = None


def _next_turn(chunks: Iterator[Any], n_workers: int) -> list[PlacedRows] | DataError:
    """A chunk of each worker; or what went wrong, as a value: raised here, it would keep the loader's frames."""
    turn: list[PlacedRows] = []
    try:
        for _ in range(n_workers):
            chunk = next(chunks)
            if isinstance(chunk, DataError):
                return DataError(str(chunk))
            turn.append(chunk)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        return DataError(
            f"a loader worker died ({reason}); if the machine ran out of memory, lower data.workers or "
            "data.window_tokens"
        )
    return turn


def _prepare_worker(_: int) -> None:
    """Another library may have started the fork server before us, without the mask. Threads are set to 1 by
    torch.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED)
    # Of raw shards, text is tokenised here: a worker is one core's work.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    exit_with_parent()
    raise_open_file_limit()


def raise_open_file_limit() -> None:
    """Every lane keeps its shard open: lift the soft limit on open files (often 1024) to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _as_is(chunk: Any) -> Any:
    return chunk
