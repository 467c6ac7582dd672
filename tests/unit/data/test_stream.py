"""The order of a run: the same for every layout and after every interruption, each sample once an epoch."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_transformer.config.schema import DataConfig
from dist_transformer.data.batch import Batch
from dist_transformer.data.manifest import load_manifest
from dist_transformer.data.stream import (
    TrainStream,
    check_data,
    eval_batches,
    held_out_texts,
    merge_states,
)
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.errors import DataError
from tests.unit.data.conftest import MakeShards, numbered_pairs, numbers_in, sentences


def pairs_config(folder: Path, **changes: Any) -> DataConfig:
    values: dict[str, Any] = {
        "train": str(folder),
        "objective": "pairs",
        "max_source_len": 32,
        "max_target_len": 32,
    }
    return DataConfig(**(values | {"window": 16, "workers": 0, "fingerprint": True} | changes))


def run(
    data: DataConfig,
    dp_size: int,
    n_steps: int,
    state: dict[str, Any] | None = None,
    micro: int = 2,
    seed: int = 5,
) -> tuple[list[int], list[Batch], dict[str, Any]]:
    """Fingerprints of steps, all batches and the final state; each step is 8 rows over all ranks."""
    streams = [
        TrainStream(data, seed=seed, dp_rank=rank, dp_size=dp_size, micro_batch_size=micro, state=state)
        for rank in range(dp_size)
    ]
    iterators, steps, batches = [iter(stream) for stream in streams], [], []
    for _ in range(n_steps):
        total = 0
        for stream, iterator in zip(streams, iterators, strict=True):
            for _ in range(8 // (dp_size * micro)):
                batch = next(iterator)
                total += batch.fingerprint
                stream.advance(batch)
                batches.append(batch)
        steps.append(total)
    for stream in streams:
        stream.close()
    merged = merge_states([stream.state() for stream in streams])
    return steps, batches, json.loads(json.dumps(merged))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_shards: MakeShards) -> Path:
    path = tmp_path_factory.mktemp("pairs")
    make_shards(path, numbered_pairs(9, lambda shard: 30 + 3 * shard), "pairs")
    return path


@pytest.mark.parametrize("packing", [True, False])
def test_order_is_the_same_for_every_layout(folder: Path, packing: bool) -> None:
    reference, _, _ = run(pairs_config(folder, packing=packing), 1, 30)
    assert len(set(reference)) == 30
    for dp_size in (1, 2, 4):
        for micro in (1, 2):
            assert run(pairs_config(folder, packing=packing), dp_size, 30, micro=micro)[0] == reference


@pytest.mark.parametrize("workers", [1, 2])
def test_order_is_the_same_with_workers(folder: Path, workers: int) -> None:
    reference, _, _ = run(pairs_config(folder), 1, 20)
    data = pairs_config(folder, workers=workers)
    assert run(data, 1, 20)[0] == reference
    first, _, state = run(data, 2, 7)
    assert first + run(data, 2, 13, state, micro=1)[0] == reference


def test_killed_three_times_and_back_with_other_layouts(folder: Path) -> None:
    data = pairs_config(folder)
    reference, _, end = run(data, 2, 60)
    steps: list[int] = []
    state = None
    for dp_size, n_steps, micro in ((2, 13, 4), (4, 9, 1), (1, 20, 8), (2, 18, 2)):
        found, _, state = run(data, dp_size, n_steps, state, micro)
        steps += found
    assert steps == reference
    assert state == end
    assert state is not None and state["rows"] == 480


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


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n_shards=st.integers(1, 14),
    sizes=st.lists(st.integers(1, 40), min_size=14, max_size=14),
    seed=st.integers(0, 2**40),
    window=st.integers(1, 50),
    packing=st.booleans(),
    kills=st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(0, 9)), min_size=1, max_size=3),
)
def test_exactly_once_per_epoch_whatever_happens(
    tmp_path_factory: pytest.TempPathFactory,
    make_shards: MakeShards,
    n_shards: int,
    sizes: list[int],
    seed: int,
    window: int,
    packing: bool,
    kills: list[tuple[int, int]],
) -> None:
    path = tmp_path_factory.mktemp("any")
    make_shards(path, numbered_pairs(n_shards, lambda shard: sizes[shard]), "pairs")
    data = pairs_config(path, window=window, packing=packing)
    n_lanes = check_data(data, dp_size=1, workers=1).n_lanes
    state, batches = None, []
    for wanted, n_steps in [*kills, (1, 1)]:
        dp_size = wanted if n_lanes % wanted == 0 else 1
        _, found, state = run(data, dp_size, n_steps, state, 1, seed)
        batches += found
    # Enough rows that every lane is through its first epoch.
    while min(cursor[0] for cursor in state["cursors"].values()) < 1 or len(state["cursors"]) < n_lanes:
        _, found, state = run(data, 1, 10, state, 8, seed)
        batches += found
    rows = []
    for batch in batches:
        for i, number in enumerate(batch.rows):
            tokens, segments = batch.encoder_input_tokens[i].numpy(), batch.encoder_segment_ids[i].numpy()
            rows.append((number, batch.lanes[i], batch.cursors[i], numbers_in(tokens, segments)))
    rows.sort(key=lambda row: row[0])
    assert [row[0] for row in rows] == list(range(len(rows)))
    epoch_of_lane: Counter[int] = Counter()
    seen: Counter[int] = Counter()
    for number, lane, cursor, samples in rows:
        assert lane == number % n_lanes
        if epoch_of_lane[lane] == 0:
            seen.update(samples)
        epoch_of_lane[lane] = cursor.epoch
    n_samples = sum(sizes[:n_shards])
    assert seen == Counter(range(n_samples))


def test_a_batch_is_laid_out_as_documented(folder: Path) -> None:
    _, batches, _ = run(pairs_config(folder), 1, 3, micro=8)
    for batch in batches:
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


def test_without_shuffling_samples_come_as_written(folder: Path) -> None:
    data = pairs_config(folder, shuffle=False, packing=False)
    _, batches, _ = run(data, 1, 4, micro=8)
    sizes = [30 + 3 * shard for shard in range(9)]
    starts = [sum(sizes[:shard]) for shard in range(9)]
    for batch in batches:
        for i, number in enumerate(batch.rows):
            tokens, segments = batch.encoder_input_tokens[i].numpy(), batch.encoder_segment_ids[i].numpy()
            lane = number % 8
            assert numbers_in(tokens, segments) == [starts[lane] + number // 8]


def test_resume_refuses_other_shards_and_other_options(
    folder: Path, tmp_path: Path, make_shards: MakeShards
) -> None:
    _, _, state = run(pairs_config(folder), 1, 2)
    make_shards(tmp_path, numbered_pairs(9, lambda _: 20, seed=3), "pairs")
    with pytest.raises(DataError, match="not the ones this run was trained on"):
        run(pairs_config(tmp_path), 1, 1, state)
    with pytest.raises(DataError, match=r"window was 16 and is 32.*max_source_len was 32 and is 40"):
        run(pairs_config(folder, window=32, max_source_len=40), 1, 1, state)
    with pytest.raises(DataError, match="seed was 5 and is 6"):
        run(pairs_config(folder), 1, 1, state, seed=6)


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


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_shard_is_the_same_sentence_from_a_worker(
    tmp_path: Path, make_shards: MakeShards, workers: int
) -> None:
    make_shards(tmp_path, numbered_pairs(4, lambda _: 40), "pairs")
    path = tmp_path / "train-00002.tar"
    content = bytearray(path.read_bytes())
    content[20 * 1024 : 20 * 1024 + 600] = b"\xff" * 600  # same size: found while reading
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=r"^shard .*train-00002.tar ends after 10 of 40 samples: copy it again"
    ):
        run(pairs_config(tmp_path, workers=workers), 1, 40)


def test_a_killed_worker_is_an_error_not_a_hang(folder: Path) -> None:
    stream = TrainStream(pairs_config(folder, workers=1), seed=1, dp_rank=0, dp_size=1, micro_batch_size=2)
    batches = iter(stream)
    pid = _worker_pids(next(batches))
    for child in pid:
        os.kill(child, signal.SIGKILL)
    with pytest.raises(DataError, match="a loader worker died"):
        for _ in range(100):
            next(batches)
    stream.close()


def _worker_pids(_: Batch) -> list[int]:
    import multiprocessing

    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]


def test_workers_end_with_a_killed_parent_and_ignore_the_schedulers_signals(
    folder: Path, tmp_path: Path
) -> None:
    script = tmp_path / "main.py"
    script.write_text(
        textwrap.dedent(f"""
        import multiprocessing, os, signal, time
        from dist_transformer.config.schema import DataConfig
        from dist_transformer.data.stream import TrainStream
        if __name__ == "__main__":
            data = DataConfig(train={str(folder)!r}, objective="pairs", max_source_len=32, max_target_len=32, workers=2)
            batches = iter(TrainStream(data, seed=1, dp_rank=0, dp_size=1, micro_batch_size=2))
            next(batches)
            pids = [child.pid for child in multiprocessing.active_children()]
            for pid in pids:
                os.kill(pid, signal.SIGTERM)
                os.kill(pid, signal.SIGUSR1)
            for _ in range(50):
                next(batches)
            print(*pids, flush=True)
            time.sleep(60)
        """)
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(_is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.2)


def _is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


class TestHeldOut:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory, make_shards: MakeShards) -> Path:
        path = tmp_path_factory.mktemp("held_out")
        eval_shards = numbered_pairs(2, lambda shard: 21 + shard)
        make_shards(path, numbered_pairs(4, lambda _: 20), "pairs", eval_shards)
        return path

    @pytest.mark.parametrize("dp_size", [1, 2, 3])
    @pytest.mark.parametrize("packing", [True, False])
    def test_every_sample_once_and_equal_numbers_of_batches(
        self, folder: Path, dp_size: int, packing: bool
    ) -> None:
        data = pairs_config(folder, eval=str(folder), packing=packing)
        parts = [
            list(eval_batches(data, seed=1, dp_rank=rank, dp_size=dp_size, micro_batch_size=4))
            for rank in range(dp_size)
        ]
        assert len({len(part) for part in parts}) == 1
        seen: Counter[int] = Counter()
        for batch in (batch for part in parts for batch in part):
            assert batch.encoder_input_tokens.shape == (4, 32)
            for tokens, segments in zip(batch.encoder_input_tokens, batch.encoder_segment_ids, strict=True):
                seen.update(numbers_in(tokens.numpy(), segments.numpy()))
        assert seen == Counter(range(43))

    def test_max_rows_counts_rows_of_all_ranks(self, folder: Path) -> None:
        data = pairs_config(folder, eval=str(folder), packing=False)
        for rank in range(2):
            batches = list(
                eval_batches(data, seed=1, dp_rank=rank, dp_size=2, micro_batch_size=3, max_rows=7)
            )
            assert len(batches) == 2
            assert sum(batch.n_pairs for batch in batches) == (4 if rank == 0 else 3)
            assert int(batches[1].decoder_segment_ids[1:].sum()) == 0

    def test_texts(self, tmp_path: Path, tokenizer: TextTokenizer, make_shards: MakeShards) -> None:
        import numpy as np

        texts = sentences(6)
        samples = [
            (np.array(tokenizer.encode(text)), np.array(tokenizer.encode(text[::-1]))) for text in texts
        ]
        make_shards(tmp_path, [samples], "pairs", [samples[:3]])
        data = pairs_config(tmp_path, eval=str(tmp_path))
        assert held_out_texts(data, 2) == [(text, text[::-1]) for text in texts[:2]]

    def test_a_folder_without_a_held_out_split(self, tmp_path: Path, make_shards: MakeShards) -> None:
        make_shards(tmp_path, numbered_pairs(4, lambda _: 20), "pairs")
        with pytest.raises(DataError, match="no held-out split: prepare it with --held-out N"):
            check_data(pairs_config(tmp_path, eval=str(tmp_path)), dp_size=1, workers=0)


def test_check_data(folder: Path, tmp_path: Path, make_shards: MakeShards) -> None:
    summary = check_data(pairs_config(folder), dp_size=4, workers=2)
    assert (summary.n_lanes, summary.n_shards, summary.n_samples) == (8, 9, 378)
    rows = {
        n for batch in run(pairs_config(folder), 1, 40)[1] for n in batch.rows if batch.cursors[0].epoch == 0
    }
    assert 0.5 < summary.rows_per_epoch / len(rows) < 2
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
    assert load_manifest(folder).kind == "pairs"
