"""The stream of training batches: what the trainer iterates, and the state that a checkpoint keeps."""

from collections.abc import Generator, Iterator
from types import TracebackType
from typing import Any, Self

import numpy as np

from dist_transformer.config.data import DataConfig
from dist_transformer.data.assemble import assemble
from dist_transformer.data.batch import Batch
from dist_transformer.data.check import DataSummary, check_data, summarise
from dist_transformer.data.cursor import Cursor
from dist_transformer.data.held_out import eval_batches, held_out_texts
from dist_transformer.data.loader import LoadedRows, RankRows, load_rows
from dist_transformer.data.order import check_lanes
from dist_transformer.data.plan import RunPlan, load_corpora, shards_of
from dist_transformer.data.position import (
    check_state,
    cursors_of,
    describe_run,
    merge_states,
    part_of_state,
)
from dist_transformer.data.rows import COUNTS, PlacedRows

__all__ = [
    "DataSummary",
    "TrainStream",
    "check_data",
    "eval_batches",
    "held_out_texts",
    "merge_states",
]


class TrainStream:
    """Micro-batches of one data-parallel rank, forever: epochs follow each other without a gap.

    Row n of the run comes from lane n mod n_lanes of the corpus whose turn it is (see `Mixture`), and goes to
    rank n mod dp_size, whatever the number of ranks and loader workers, so a run may be resumed with any of
    both that divide the lanes.

    Args:
        data: The configuration's `data` section.
        seed: Decides order and noise.
        dp_rank: This rank among those that get different rows.
        dp_size: Their number.
        micro_batch_size: Rows of a batch; a bucket is a row.
        state: From `merge_states`, to go on behind the rows that a run consumed.

    Raises:
        DataError: the shards cannot be read or do not fit the objective, lanes do not divide, or the state
            belongs to other shards or other options.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        seed: int,
        dp_rank: int,
        dp_size: int,
        micro_batch_size: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        corpora = load_corpora(data)
        self.n_lanes = check_lanes(shards_of(corpora), dp_size, data.workers)
        self.micro_batch_size = micro_batch_size
        self._data, self._dp_rank, self._dp_size = data, dp_rank, dp_size
        self._plan = RunPlan.build(data, corpora, n_lanes=self.n_lanes, seed=seed)
        self.corpora = summarise(data, corpora, self._plan)
        """What the rows are drawn from."""
        self._identity = describe_run(self._plan, corpora, seed)
        self._first_row, self._n_advanced = 0, 0
        self._cursors: dict[tuple[int, int], Cursor] = {}
        self.counts = {"n_pairs": 0} | dict.fromkeys(COUNTS, 0)
        """This rank's samples consumed since the stream was made, and how many were truncated, split, dropped or
        lost.
        """
        self._counts_before = dict(self.counts)
        self._batches: Generator[Batch, None, None] | None = None
        self._rows: LoadedRows | None = None
        if state is not None:
            self._restore(merge_states([state]) if "dp_rank" in state else state)

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the first row that was not consumed (see `advance`); an earlier iterator ends.

        Loader workers start at once, and prepare the first rows while the caller does something else.
        """
        self.close()
        self._rows = self._load()
        self._batches = self._generate(self._rows)
        return self._batches

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; the state stays."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
        if self._rows is not None:
            self._rows.close()
            self._rows = None

    def _load(self) -> LoadedRows:
        rank_rows = RankRows(
            plan=self._plan,
            dp_rank=self._dp_rank,
            dp_size=self._dp_size,
            first_row=self._first_row + self._n_advanced * self._dp_size,
            cursors=self._cursors,
        )
        return load_rows(rank_rows, self._data.workers, self.micro_batch_size, self._data.prefetch)

    def _generate(self, chunks: Iterator[PlacedRows]) -> Generator[Batch, None, None]:
        size, rest = self.micro_batch_size, None
        for chunk in chunks:
            rows = chunk if rest is None else PlacedRows.concatenate([rest, chunk])
            begin = 0
            while len(rows) - begin >= size:
                micro = rows if len(rows) == size else rows.select(np.arange(begin, begin + size))
                yield assemble(
                    micro,
                    self._data.max_source_len,
                    self._data.max_target_len,
                    bucketed=self._data.bucket_tokens is not None,
                    fingerprint=self._data.fingerprint,
                )
                begin += size
            rest = rows.select(np.arange(begin, len(rows))) if begin < len(rows) else None

    def advance(self, batch: Batch) -> None:
        """Record that a batch was trained on: only what is recorded is in `state`.

        Raises:
            ValueError: the batch is not the one that follows those recorded before.
        """
        next_local = -((self._dp_rank - self._first_row) // self._dp_size) + self._n_advanced
        expected = next_local * self._dp_size + self._dp_rank
        if not batch.rows or batch.rows[0] != expected:
            raise ValueError(
                f"advance: expected the batch that begins with row {expected}, got {batch.rows[:1]}"
            )
        self._n_advanced += len(batch.rows)
        corpora = map(self._plan.mixture.corpus_of, batch.rows)
        self._cursors.update(zip(zip(corpora, batch.lanes, strict=True), batch.cursors, strict=True))
        for name in self.counts:
            self.counts[name] += getattr(batch, name)

    def state(self) -> dict[str, Any]:
        """This rank's part of the run's position, for `merge_states`; plain values that fit JSON."""
        return part_of_state(
            self._identity,
            dp_rank=self._dp_rank,
            dp_size=self._dp_size,
            first_row=self._first_row,
            n_advanced=self._n_advanced,
            counts=self.counts,
            counts_before=self._counts_before,
            cursors=self._cursors,
        )

    def _restore(self, state: dict[str, Any]) -> None:
        check_state(state, self._identity)
        self._first_row = int(state["rows"])
        self._counts_before = dict(state["counts"])
        self._cursors = {
            place: cursor
            for place, cursor in cursors_of(state).items()
            if place[1] % self._dp_size == self._dp_rank
        }
