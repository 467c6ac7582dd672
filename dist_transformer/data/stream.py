"""The stream of training batches: what the trainer iterates, and the state that a checkpoint keeps."""

from collections.abc import Generator, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from dist_transformer.config.data import DataConfig
from dist_transformer.data.batch import Batch, Cursor
from dist_transformer.data.check import DataSummary, check_data
from dist_transformer.data.held_out import eval_batches, held_out_texts
from dist_transformer.data.lanes import RowPlan
from dist_transformer.data.loader import RankRows, load_rows
from dist_transformer.data.manifest import load_manifest
from dist_transformer.data.order import check_lanes
from dist_transformer.data.rows import COUNTS, PlacedRows, assemble
from dist_transformer.errors import DataError

__all__ = [
    "DataSummary",
    "TrainStream",
    "check_data",
    "eval_batches",
    "held_out_texts",
    "merge_states",
]

STATE_FORMAT = 1


class TrainStream:
    """Micro-batches of one data-parallel rank, forever: epochs follow each other without a gap.

    Row n of the run comes from lane n mod n_lanes and goes to rank n mod dp_size, whatever the number of
    ranks and loader workers, so a run may be resumed with any of both that divide the lanes.

    Args:
        data: The configuration's `data` section.
        seed: Decides order and noise.
        dp_rank: This rank among those that get different rows.
        dp_size: Their number.
        micro_batch_size: Rows of a batch.
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
        manifest = load_manifest(data.corpora()[0].train)
        self.n_lanes = check_lanes(len(manifest.train), dp_size, data.workers)
        self.micro_batch_size = micro_batch_size
        self._data, self._dp_rank, self._dp_size = data, dp_rank, dp_size
        self._plan = RowPlan.build(data, manifest, "train", seed, data.shuffle)
        self._identity: dict[str, Any] = {
            "shards": manifest.fingerprint(),
            "options": self._plan.order_options(),
        }
        self._first_row, self._n_advanced = 0, 0
        self._cursors: dict[int, Cursor] = {}
        self.counts = {"n_pairs": 0} | dict.fromkeys(COUNTS, 0)
        """This rank's samples consumed since the stream was made, and how many were truncated, split or
        dropped.
        """
        self._counts_before = dict(self.counts)
        self._batches: Generator[Batch, None, None] | None = None
        if state is not None:
            self._restore(merge_states([state]) if "dp_rank" in state else state)

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the first row that was not consumed (see `advance`); an earlier iterator ends."""
        self.close()
        self._batches = self._generate()
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

    def _generate(self) -> Generator[Batch, None, None]:
        rank_rows = RankRows(
            plan=self._plan,
            n_lanes=self.n_lanes,
            dp_rank=self._dp_rank,
            dp_size=self._dp_size,
            first_row=self._first_row + self._n_advanced * self._dp_size,
            cursors=self._cursors,
        )
        size, rest = self.micro_batch_size, None
        for chunk in load_rows(rank_rows, self._data.workers, size, self._data.prefetch):
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
        self._cursors.update(zip(batch.lanes, batch.cursors, strict=True))
        for name in self.counts:
            self.counts[name] += getattr(batch, name)

    def state(self) -> dict[str, Any]:
        """This rank's part of the run's position, for `merge_states`; plain values that fit JSON."""
        return {
            "format": STATE_FORMAT,
            "n_lanes": self.n_lanes,
            **self._identity,
            "dp_rank": self._dp_rank,
            "dp_size": self._dp_size,
            "first_row": self._first_row,
            "n_advanced": self._n_advanced,
            "counts": self.counts,
            "counts_before": self._counts_before,
            "cursors": {
                str(lane): [c.epoch, c.shard, c.window, c.row] for lane, c in sorted(self._cursors.items())
            },
        }

    def _restore(self, state: dict[str, Any]) -> None:
        _check_format(state)
        if state["shards"] != self._identity["shards"]:
            raise DataError(
                f"the shards in {self._data.train} are not the ones this run was trained on: give "
                "data.train the "
                "folder it began with, or start a new run in another run.dir"
            )
        mine = self._identity["options"]
        if changed := [name for name in mine if mine[name] != state["options"].get(name)]:
            listing = ", ".join(
                f"{name} was {state['options'].get(name)} and is {mine[name]}" for name in changed
            )
            raise DataError(
                f"the order of data changed ({listing}), so rows already seen cannot be told from new "
                "ones: set it back, "
                "or start a new run (train.init_from keeps the weights)"
            )
        if state["n_lanes"] != self.n_lanes:
            raise DataError(
                f"the run was trained with {state['n_lanes']} lanes, this version gives {self.n_lanes}: "
                "resume it "
                "with the version that wrote the checkpoint"
            )
        self._first_row = int(state["rows"])
        self._counts_before = dict(state["counts"])
        self._cursors = {
            int(lane): Cursor(*cursor)
            for lane, cursor in state["cursors"].items()
            if int(lane) % self._dp_size == self._dp_rank
        }


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run's position from the parts of all ranks; what `TrainStream` resumes from under any layout.

    Ranks that share rows (tensor parallelism) may all be given.

    Returns:
        `format`, `n_lanes`, `shards` (identity of the data), `options` (that decide the order), `rows`
        consumed by all ranks, `counts`, and `cursors`: lane to [epoch, shard, window, row].

    Raises:
        DataError: parts are missing, or do not belong together.
    """
    for state in states:
        _check_format(state)
    parts = {state["dp_rank"]: state for state in states}
    first = states[0]
    same = ("n_lanes", "shards", "options", "dp_size", "first_row", "n_advanced", "counts_before")
    for state in states:
        if differing := [key for key in same if state[key] != first[key]]:
            raise DataError(
                f"the ranks' data positions do not belong together: they differ in {', '.join(differing)}"
            )
    if missing := sorted(set(range(first["dp_size"])) - set(parts)):
        raise DataError(
            f"the data positions of data-parallel ranks {missing} of {first['dp_size']} are missing"
        )
    counts = {
        name: n + sum(part["counts"][name] for part in parts.values())
        for name, n in first["counts_before"].items()
    }
    cursors = {lane: cursor for part in parts.values() for lane, cursor in part["cursors"].items()}
    return {
        "format": STATE_FORMAT,
        "n_lanes": first["n_lanes"],
        "shards": first["shards"],
        "options": first["options"],
        "rows": first["first_row"] + first["n_advanced"] * first["dp_size"],
        "counts": counts,
        "cursors": dict(sorted(cursors.items(), key=lambda item: int(item[0]))),
    }


def _check_format(state: dict[str, Any]) -> None:
    if state.get("format") != STATE_FORMAT:
        raise DataError(
            f"the checkpoint's data position has format {state.get('format')}, this version reads "
            f"{STATE_FORMAT}: "
            "resume with the version that wrote it"
        )
