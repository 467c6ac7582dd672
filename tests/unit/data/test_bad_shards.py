"""Shards that are damaged or missing: an error, or left out and counted (policy `skip`); never another order."""

from collections import Counter
from pathlib import Path

import pytest

from dist_transformer.data.manifest import load_manifest
from dist_transformer.data.stream import TrainStream, merge_states
from dist_transformer.errors import DataError
from tests.unit.data.conftest import MakeShards, numbered_pairs
from tests.unit.data.streaming import pairs_config, rows_of, run, seen_by_epoch

SIZES = [30 + 3 * shard for shard in range(8)]
MISSING, TRUNCATED, KEPT = 2, 5, 11
"""Shard 2 is gone, and of shard 5 the first samples are left; every lane has one shard."""


def starts() -> list[int]:
    return [sum(SIZES[:shard]) for shard in range(8)]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, make_shards: MakeShards) -> Path:
    path = tmp_path_factory.mktemp("damaged")
    make_shards(path, numbered_pairs(8, SIZES.__getitem__), "pairs")
    (path / f"train-{MISSING:05d}.tar").unlink()
    shard = path / f"train-{TRUNCATED:05d}.tar"
    # Two members of a header and a block of content each.
    shard.write_bytes(shard.read_bytes()[: KEPT * 4 * 512 + 700])
    return path


def lost() -> set[int]:
    gone = set(range(starts()[MISSING], starts()[MISSING] + SIZES[MISSING]))
    return gone | set(range(starts()[TRUNCATED] + KEPT, starts()[TRUNCATED] + SIZES[TRUNCATED]))


def test_what_is_lost_is_left_out_and_counted(damaged: Path) -> None:
    data = pairs_config(damaged, on_bad_shard="skip", packing=False)
    found = run(data, 2, 100)
    seen = seen_by_epoch(rows_of(found.batches))
    assert sorted(seen[0].elements()) == sorted(set(range(sum(SIZES))) - lost())
    n_epochs = min(cursor[0] for cursor in found.state["cursors"]["0"].values())
    assert n_epochs >= 1
    # Counted where the lane goes on behind the loss; each epoch anew.
    n_bad = found.state["counts"]["n_bad"]
    assert n_bad % 1 == 0 and n_epochs * len(lost()) <= n_bad <= (n_epochs + 3) * len(lost())
    assert sum(batch.n_bad for batch in found.batches) == n_bad
    told = Counter(problem for batch in found.batches for problem in batch.problems)
    assert any(f"train-{MISSING:05d}.tar" in problem for problem in told)
    assert any(f"train-{TRUNCATED:05d}.tar" in problem for problem in told)


def test_unshuffled_a_lane_without_a_readable_shard_ends_the_run(damaged: Path) -> None:
    with pytest.raises(
        DataError, match=rf"that lane {MISSING} reads .* in 8 passes over them, .*cannot be opened"
    ):
        run(pairs_config(damaged, on_bad_shard="skip", shuffle=False), 1, 1, micro=8)


@pytest.mark.parametrize("workers", [0, 2])
def test_order_is_the_same_for_every_layout_and_history(damaged: Path, workers: int) -> None:
    data = pairs_config(damaged, on_bad_shard="skip")
    reference = run(data, 1, 60)
    steps: list[int] = []
    state = None
    for dp_size, n_steps, micro in ((2, 13, 4), (4, 9, 1), (1, 20, 8), (2, 18, 2)):
        found = run(
            pairs_config(damaged, on_bad_shard="skip", workers=workers), dp_size, n_steps, state, micro
        )
        state = found.state
        steps += found.steps
    assert steps == reference.steps
    assert state == reference.state


def test_the_policy_error_refuses_before_training_or_stops(
    damaged: Path, tmp_path: Path, make_shards: MakeShards
) -> None:
    with pytest.raises(DataError, match=rf"train-{MISSING:05d}.tar is listed in manifest.json but missing"):
        run(pairs_config(damaged), 1, 1)
    make_shards(tmp_path, numbered_pairs(8, SIZES.__getitem__), "pairs")
    path = tmp_path / f"train-{TRUNCATED:05d}.tar"
    content = path.read_bytes()
    # Of the same size, so that it is found while reading only.
    path.write_bytes(content[: KEPT * 4 * 512] + b"\xff" * (len(content) - KEPT * 4 * 512))
    with pytest.raises(DataError, match=rf"train-{TRUNCATED:05d}\.tar") as error:
        run(pairs_config(tmp_path), 1, 100)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_that_can_be_read_ends_in_one_sentence(
    tmp_path: Path, make_shards: MakeShards, workers: int
) -> None:
    make_shards(tmp_path, numbered_pairs(4, lambda _: 20), "pairs")
    for shard in tmp_path.glob("*.tar"):
        shard.unlink()
    data = pairs_config(tmp_path, on_bad_shard="skip", workers=workers)
    with pytest.raises(
        DataError, match=r"^nothing can be read of the shards of .* with data.on_bad_shard=skip: .*tar"
    ):
        run(data, 1, 1)


def test_a_lane_that_meets_one_bad_shard_after_the_other_goes_on(
    tmp_path: Path, make_shards: MakeShards
) -> None:
    """Each pass deals a lane other shards, so that half of them may be gone."""
    make_shards(tmp_path, numbered_pairs(12, lambda _: 6), "pairs")
    for shard in range(0, 12, 2):
        (tmp_path / f"train-{shard:05d}.tar").unlink()
    data = pairs_config(tmp_path, on_bad_shard="skip")
    rows = rows_of(run(data, 1, 30, seed=1).batches)
    assert {sample // 6 % 2 for row in rows for sample in row.samples} == {1}
    assert [row.lane for row in rows] == [n % 12 for n in range(240)]


def test_a_shard_that_is_mended_joins_in_after_a_resume(
    damaged: Path, tmp_path: Path, make_shards: MakeShards
) -> None:
    make_shards(tmp_path, numbered_pairs(8, SIZES.__getitem__), "pairs")
    shard = tmp_path / f"train-{MISSING:05d}.tar"
    aside = shard.rename(tmp_path / "aside")
    data = pairs_config(tmp_path, on_bad_shard="skip", packing=False)
    before = run(data, 2, 20)
    aside.rename(shard)
    stream = TrainStream(data, seed=5, dp_rank=0, dp_size=1, micro_batch_size=8, state=before.state)
    for batch in stream:
        stream.advance(batch)
        if stream.state()["n_advanced"] >= 1600:
            break
    stream.close()
    after = merge_states([stream.state()])["counts"]
    assert after["n_bad"] == before.state["counts"]["n_bad"] > 0
    assert load_manifest(tmp_path).train[MISSING].n_samples == SIZES[MISSING]
