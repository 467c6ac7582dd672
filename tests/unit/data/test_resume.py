"""Going on where a run stopped: the same order whatever happened, and refusal where that cannot be."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_transformer.data.batch import Batch
from dist_transformer.data.shards import ShardSet
from dist_transformer.data.stream import TrainStream, check_data, merge_states
from dist_transformer.errors import DataError
from tests.unit.data.conftest import MakeShards, numbered_pairs
from tests.unit.data.streaming import pairs_config, rows_of, run, seen_by_epoch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_shards: MakeShards) -> Path:
    """9 shards, so 8 lanes."""
    path = tmp_path_factory.mktemp("pairs")
    make_shards(path, numbered_pairs(9, lambda shard: 30 + 3 * shard), "pairs")
    return path


def test_prefetched_rows_are_not_in_the_state(folder: Path) -> None:
    data = pairs_config(folder)
    stream = TrainStream(data, seed=5, dp_rank=0, dp_size=1, micro_batch_size=4)
    batches = iter(stream)
    taken = [next(batches) for _ in range(5)]
    stream.advance(taken[0])
    resumed = TrainStream(
        data, seed=5, dp_rank=0, dp_size=1, micro_batch_size=4, state=merge_states([stream.state()])
    )
    assert next(iter(resumed)).fingerprint == taken[1].fingerprint != 0
    with pytest.raises(ValueError, match="begins with row 4"):
        stream.advance(taken[2])
    # A new iterator of the same stream goes on behind what was consumed.
    assert next(iter(stream)).rows == [4, 5, 6, 7]


HISTORY = st.tuples(st.sampled_from([1, 2, 4]), st.integers(0, 9), st.sampled_from([1, 2]))
"""Ranks, steps until the run is killed, and rows of a micro-batch."""


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n_shards=st.integers(1, 14),
    sizes=st.lists(st.integers(1, 40), min_size=14, max_size=14),
    seed=st.integers(0, 2**40),
    window=st.integers(1, 50),
    packing=st.booleans(),
    kills=st.lists(HISTORY, min_size=1, max_size=3),
)
def test_exactly_once_per_epoch_whatever_happens(
    tmp_path_factory: pytest.TempPathFactory,
    make_shards: MakeShards,
    n_shards: int,
    sizes: list[int],
    seed: int,
    window: int,
    packing: bool,
    kills: list[tuple[int, int, int]],
) -> None:
    path = tmp_path_factory.mktemp("any")
    make_shards(path, numbered_pairs(n_shards, lambda shard: sizes[shard]), "pairs")
    data = pairs_config(path, window=window, packing=packing)
    n_lanes = check_data(data, dp_size=1, workers=1).n_lanes
    state: dict[str, Any] | None = None
    batches: list[Batch] = []
    steps: list[int] = []
    for wanted, n_steps, micro in kills:
        dp_size = wanted if n_lanes % wanted == 0 else 1
        found = run(data, dp_size, n_steps, state, micro, seed)
        state, batches, steps = found.state, batches + found.batches, steps + found.steps
    # Enough rows that every lane is through its first epoch.
    while state is None or not _is_through(state, n_lanes):
        found = run(data, 1, 10, state, 8, seed)
        state, batches, steps = found.state, batches + found.batches, steps + found.steps
    assert steps == run(data, 1, len(steps), seed=seed).steps
    rows = rows_of(batches)
    assert [row.number for row in rows] == list(range(len(rows)))
    assert all(row.lane == row.number % n_lanes for row in rows)
    assert sorted(seen_by_epoch(rows)[0].elements()) == list(range(sum(sizes[:n_shards])))


def _is_through(state: dict[str, Any], n_lanes: int) -> bool:
    lanes = state["cursors"].get("0", {})
    return len(lanes) == n_lanes and all(cursor[0] >= 1 for cursor in lanes.values())


def test_resume_in_a_thousand_shards_opens_only_the_lanes_it_needs(
    tmp_path: Path, make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shards(tmp_path, numbered_pairs(1000, lambda _: 3), "pairs")
    data = pairs_config(tmp_path, packing=False)
    # Every lane is in the middle of its first shard.
    before = run(data, 2, 150, micro=4)
    opened: list[int] = []
    plain = ShardSet.open

    def counting(shards: ShardSet, shard: int) -> Any:
        opened.append(shard)
        return plain(shards, shard)

    monkeypatch.setattr(ShardSet, "open", counting)
    after = run(data, 4, 1, before.state, micro=2)
    # Some of the 8 lanes build their next window after this first row.
    assert 8 <= len(opened) <= 16
    assert after.steps == run(data, 1, 151).steps[150:]


def test_resume_refuses_other_shards_and_other_options(
    folder: Path, tmp_path: Path, make_shards: MakeShards
) -> None:
    state = run(pairs_config(folder), 1, 2).state
    make_shards(tmp_path, numbered_pairs(9, lambda _: 20, seed=3), "pairs")
    with pytest.raises(DataError, match="not the ones this run was trained on"):
        run(pairs_config(tmp_path), 1, 1, state)
    with pytest.raises(DataError, match=r"window was 16 and is 32.*max_source_len was 32 and is 40"):
        run(pairs_config(folder, window=32, max_source_len=40), 1, 1, state)
    with pytest.raises(DataError, match="seed was 5 and is 6"):
        run(pairs_config(folder), 1, 1, state, seed=6)
    del state["corpora"][0]["options"]["packer"]  # as before packers were counted
    with pytest.raises(DataError, match="packed samples into other rows: resume with it"):
        run(pairs_config(folder), 1, 1, state)


def test_states_of_missing_or_disagreeing_ranks_are_refused(folder: Path) -> None:
    def part(rank: int, n_batches: int) -> dict[str, Any]:
        stream = TrainStream(pairs_config(folder), seed=5, dp_rank=rank, dp_size=2, micro_batch_size=4)
        batches = iter(stream)
        for _ in range(n_batches):
            stream.advance(next(batches))
        return stream.state()

    with pytest.raises(DataError, match=r"ranks \[1\] of 2 are missing"):
        merge_states([part(0, 1)])
    with pytest.raises(DataError, match="n_advanced"):
        merge_states([part(0, 1), part(1, 2)])
    # Tensor-parallel peers hold equal parts.
    assert merge_states([part(0, 1), part(0, 1), part(1, 1), part(1, 1)])["rows"] == 8
