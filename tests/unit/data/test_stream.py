"""The order of a run: the same for every layout, each sample once an epoch, and batches laid out as documented."""

from pathlib import Path
from typing import Any

import pytest

from dist_transformer.data.stream import TrainStream, check_data, merge_states
from dist_transformer.errors import DataError
from tests.unit.data.conftest import MakeShards, numbered_pairs
from tests.unit.data.streaming import ROWS_A_STEP, pairs_config, rows_of, run, seen_by_epoch

SIZES = [30 + 3 * shard for shard in range(9)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_shards: MakeShards) -> Path:
    """9 shards, so 8 lanes, of which one has two shards."""
    path = tmp_path_factory.mktemp("pairs")
    make_shards(path, numbered_pairs(9, lambda shard: SIZES[shard]), "pairs")
    return path


LAYOUTS: dict[str, dict[str, Any]] = {
    "packed": {},
    "one sample a row": {"packing": False},
    "buckets": {"packing": False, "bucket_tokens": 64},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_order_is_the_same_for_every_layout(folder: Path, layout: str) -> None:
    data = pairs_config(folder, **LAYOUTS[layout])
    reference = run(data, 1, 30).steps
    assert len(set(reference)) == 30
    for dp_size in (1, 2, 4):
        for micro in (1, 2):
            assert run(data, dp_size, 30, micro=micro).steps == reference


def test_several_epochs_each_sample_once_in_each(folder: Path) -> None:
    found = run(pairs_config(folder), 2, 60)
    seen = seen_by_epoch(rows_of(found.batches))
    ends = [cursor[0] for lanes in found.state["cursors"].values() for cursor in lanes.values()]
    assert min(ends) >= 2
    for epoch in range(min(ends)):
        assert sorted(seen[epoch].elements()) == list(range(sum(SIZES))), f"epoch {epoch}"
    order = [row.samples for row in rows_of(found.batches) if row.lane == 0]
    assert order[:10] != order[10:20]


def test_rows_of_every_step_come_from_all_lanes_in_turn_epoch_after_epoch(folder: Path) -> None:
    """No lane pauses where its epoch ends, whatever the others do."""
    rows = rows_of(run(pairs_config(folder), 4, 60).batches)
    assert [(row.number, row.lane) for row in rows] == [(n, n % 8) for n in range(60 * ROWS_A_STEP)]
    assert all(row.samples for row in rows)


def test_a_batch_is_laid_out_as_documented(folder: Path) -> None:
    for batch in run(pairs_config(folder), 1, 3, micro=8).batches:
        source, target = batch.encoder_segment_ids, batch.decoder_segment_ids
        assert batch.n_source_tokens == int((source > 0).sum())
        assert (
            batch.n_target_tokens == int((target > 0).sum()) == int((batch.decoder_target_tokens != 0).sum())
        )
        assert batch.n_pairs == int(source.max(1).values.sum()) == int(target.max(1).values.sum())
        for row in range(8):
            for segment in range(1, int(target[row].max()) + 1):
                mine = target[row] == segment
                expected = batch.decoder_target_tokens[row][mine].tolist()
                assert expected[-1] == 1 and 1 not in expected[:-1]
                assert batch.decoder_input_tokens[row][mine].tolist() == [0, *expected[:-1]]
                assert batch.decoder_positions[row][mine].tolist() == list(range(len(expected)))
                ends = batch.encoder_input_tokens[row][source[row] == segment].tolist()
                assert ends[-1] == 1


def test_a_bucket_is_laid_out_as_documented(folder: Path) -> None:
    """One tensor row for each sample, as wide as the longest, and few positions more than allowed for a bucket."""
    data = pairs_config(folder, packing=False, bucket_tokens=64)
    for batch in run(data, 1, 6, micro=4).batches:
        source, target = batch.encoder_segment_ids, batch.decoder_segment_ids
        n_samples, width = source.shape
        assert len(batch.rows) == len(batch.lanes) == len(batch.cursors) == 4
        assert n_samples == batch.n_pairs == target.shape[0] > 4
        assert width == int((source > 0).sum(1).max()) and target.shape[1] == int((target > 0).sum(1).max())
        assert source.max() == target.max() == 1
        assert batch.n_positions == n_samples * (width + target.shape[1])
        assert batch.n_source_tokens == int((source > 0).sum())


def test_without_shuffling_samples_come_as_written(folder: Path) -> None:
    data = pairs_config(folder, shuffle=False, packing=False)
    starts = [sum(SIZES[:shard]) for shard in range(9)]
    for row in rows_of(run(data, 1, 4, micro=8).batches):
        assert row.samples == [starts[row.number % 8] + row.number // 8]


def test_dropped_and_truncated_pairs_are_counted(tmp_path: Path, make_shards: MakeShards) -> None:
    shards = numbered_pairs(4, lambda _: 40)
    make_shards(tmp_path, shards, "pairs")
    n_long = sum(len(source) >= 8 or len(target) >= 8 for shard in shards for source, target in shard)
    for policy in ("drop", "truncate"):
        data = pairs_config(tmp_path, max_source_len=8, max_target_len=8, too_long=policy, packing=False)
        n_rows = 160 - n_long if policy == "drop" else 160
        stream = TrainStream(data, seed=1, dp_rank=0, dp_size=1, micro_batch_size=1)
        for batch in stream:
            stream.advance(batch)
            if stream.state()["n_advanced"] >= n_rows + 40:
                break
        counts = merge_states([stream.state()])["counts"]
        key = "n_dropped" if policy == "drop" else "n_truncated"
        assert counts[key] >= n_long
        assert counts["n_truncated" if policy == "drop" else "n_dropped"] == 0
        assert counts["n_pairs"] == n_rows + 40
    with pytest.raises(DataError, match=r"exceeds rows of 8 and 8: raise data.max_source_len"):
        run(pairs_config(tmp_path, max_source_len=8, max_target_len=8, too_long="error"), 1, 1)


def test_no_pair_fits(tmp_path: Path, make_shards: MakeShards) -> None:
    make_shards(tmp_path, numbered_pairs(2, lambda _: 5), "pairs")
    with pytest.raises(DataError, match="no sample of the shards"):
        run(pairs_config(tmp_path, max_source_len=2, too_long="drop"), 1, 1)


def test_check_data(folder: Path, tmp_path: Path, make_shards: MakeShards) -> None:
    summary = check_data(pairs_config(folder), dp_size=4, workers=2)
    [corpus] = summary.corpora
    assert (summary.n_lanes, corpus.n_shards, corpus.n_samples) == (8, 9, sum(SIZES))
    assert (corpus.name, corpus.share, corpus.window) == (folder.name, 1.0, 16)
    assert summary.n_eval_samples == {}
    rows = rows_of(run(pairs_config(folder), 1, 40).batches)
    n_rows = sum(len(row.samples) > 0 and row.epoch == 0 for row in rows)
    assert 0.5 < corpus.rows_per_epoch / n_rows < 2
    sentence = corpus.describe(10 * corpus.rows_per_epoch)
    assert sentence.startswith(f"{folder.name}: 378 samples in 9 shards, about ")
    assert sentence.endswith(" rows an epoch: 10 epochs in this run")
    with pytest.raises(
        DataError, match=r"data.objective=span_corruption needs text shards, .* holds pairs: set"
    ):
        check_data(pairs_config(folder, objective="span_corruption"), dp_size=1, workers=0)
    with pytest.raises(
        DataError, match=r"3 ranks x 1 worker need a multiple of 3 lanes; these 9 shards give 8"
    ):
        check_data(pairs_config(folder), dp_size=3, workers=0)
    make_shards(tmp_path, numbered_pairs(4, lambda _: 5), "pairs", vocab_size=700)
    with pytest.raises(DataError, match="the tokenizer does not match the shards"):
        check_data(pairs_config(tmp_path), dp_size=1, workers=0)
