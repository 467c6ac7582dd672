"""Loader workers: the same order with any number of them, the same sentences, and no process left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from dist_transformer.data.stream import TrainStream
from dist_transformer.errors import DataError
from tests.unit.data.conftest import MakeShards, numbered_pairs
from tests.unit.data.streaming import pairs_config, run

STEPS = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_shards: MakeShards) -> Path:
    """9 shards, so 8 lanes."""
    path = tmp_path_factory.mktemp("pairs")
    make_shards(path, numbered_pairs(9, lambda shard: 30 + 3 * shard), "pairs")
    return path


@pytest.fixture(scope="module")
def reference(folder: Path) -> list[int]:
    return run(pairs_config(folder), 1, STEPS).steps


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_fingerprints_of_200_steps(folder: Path, reference: list[int], dp_size: int, workers: int) -> None:
    assert len(set(reference)) == STEPS
    assert run(pairs_config(folder, workers=workers), dp_size, STEPS).steps == reference


def test_killed_three_times_and_back_with_other_ranks_and_workers(folder: Path, reference: list[int]) -> None:
    steps: list[int] = []
    state = None
    for dp_size, workers, n_steps, micro in ((2, 1, 57, 4), (4, 2, 49, 1), (1, 0, 41, 8), (2, 2, 53, 2)):
        found = run(pairs_config(folder, workers=workers), dp_size, n_steps, state, micro)
        state = found.state
        steps += found.steps
    assert steps == reference
    assert state == run(pairs_config(folder), 1, STEPS).state


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
        DataError, match=r"^shard .*train-00002.tar is damaged after sample 10 .*: copy it again"
    ):
        run(pairs_config(tmp_path, workers=workers), 1, 40)


def test_a_killed_worker_is_an_error_not_a_hang(folder: Path) -> None:
    stream = TrainStream(pairs_config(folder, workers=1), seed=1, dp_rank=0, dp_size=1, micro_batch_size=2)
    batches = iter(stream)
    next(batches)
    workers = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
    assert workers
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(DataError, match="a loader worker died"):
        for _ in range(100):
            next(batches)
    stream.close()


def test_workers_end_with_a_stream_that_nobody_read(folder: Path) -> None:
    """As when the model cannot be built: the caller still has the batches, and they block the signals of an exit."""
    stream = TrainStream(pairs_config(folder, workers=1), seed=1, dp_rank=0, dp_size=1, micro_batch_size=2)
    batches = iter(stream)
    (worker,) = multiprocessing.active_children()
    stream.close()
    worker.join(timeout=30)
    assert worker.exitcode is not None
    assert list(batches) == []


@pytest.mark.parametrize("kill", [False, True], ids=["damaged shard", "killed worker"])
def test_a_process_that_keeps_the_error_ends_all_the_same(
    tmp_path: Path, make_shards: MakeShards, kill: bool
) -> None:
    """Workers block SIGTERM, so whoever waits for them at the interpreter's end would wait for ever."""
    make_shards(tmp_path, numbered_pairs(4, lambda _: 40), "pairs")
    if not kill:
        path = tmp_path / "train-00002.tar"
        path.write_bytes(path.read_bytes()[: 20 * 1024].ljust(path.stat().st_size, b"\xff"))
    done = subprocess.run(
        [sys.executable, "-c", _KEEPS_ITS_ERROR, str(tmp_path), str(int(kill))],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert ("a loader worker died" if kill else "train-00002.tar is damaged") in done.stdout
    assert "Traceback" not in done.stderr


_KEEPS_ITS_ERROR = """
import multiprocessing, os, signal, sys
from dist_transformer.config import DataConfig
from dist_transformer.data.stream import TrainStream
from dist_transformer.errors import DataError

if __name__ == "__main__":
    data = DataConfig(train=sys.argv[1], objective="pairs", max_source_len=32, max_target_len=32, workers=2)
    batches = iter(TrainStream(data, seed=1, dp_rank=0, dp_size=1, micro_batch_size=2))
    kept = None
    try:
        for number in range(1000):
            next(batches)
            if number == 3 and sys.argv[2] == "1":
                for child in multiprocessing.active_children():
                    os.kill(child.pid, signal.SIGKILL)
    except DataError as error:
        kept = error
    print(kept)
"""


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
