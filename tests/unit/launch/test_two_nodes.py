"""Two calls of launch/node.sh make one run, without Slurm; it survives the death of a rank."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_transformer.tracking import read_metrics
from tests.e2e.conftest import ROOT, environment, pair_files, pair_shards, steps_of, write_config

__all__ = ["pair_files", "pair_shards", "write_config"]

LIMIT_S = 150


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(node: int, port: int, out: Path, *arguments: str | Path) -> "subprocess.Popen[bytes]":
    variables = {
        "NNODES": "2",
        "NODE_RANK": str(node),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with out.open("wb") as file:
        return subprocess.Popen(
            [str(ROOT / "launch" / "node.sh"), *map(str, arguments)],
            cwd=ROOT,
            env={**environment(), **variables},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def rank_pid(rank: int, run_dir: Path) -> int | None:
    """The process that is this rank of the run."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"run.dir={run_dir}".encode() in words and f"RANK={rank}".encode() in variables:
            return int(process.name)
    return None


def n_steps(run_dir: Path) -> int:
    return max(steps_of(read_metrics(run_dir)), default=0) if (run_dir / "metrics.jsonl").exists() else 0


@pytest.mark.timeout(2 * LIMIT_S)
def test_two_nodes_and_a_rank_that_dies(
    tmp_path: Path, pair_shards: Path, write_config: Callable[..., Path]
) -> None:
    config = write_config(pair_shards, train={"steps": 200})
    run_dir, port = tmp_path / "run", free_port()
    outs = [tmp_path / "node-0.txt", tmp_path / "node-1.txt"]
    arguments = (config, "--max-restarts", "1", f"run.dir={run_dir}")
    # The later node first: it waits, and the order of ranks is that of NODE_RANK all the same.
    second = start(1, port, outs[1], *arguments)
    time.sleep(1)
    first = start(0, port, outs[0], *arguments)
    try:
        deadline = time.monotonic() + LIMIT_S
        while n_steps(run_dir) < 25:
            assert first.poll() is None, outs[0].read_text()
            assert second.poll() is None, outs[1].read_text()
            assert time.monotonic() < deadline, outs[0].read_text()
            time.sleep(0.05)
        pid = rank_pid(1, run_dir)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert first.wait(LIMIT_S) == 0, outs[0].read_text()
        assert second.wait(LIMIT_S) == 0, outs[1].read_text()
    finally:
        for process in (first, second):
            process.kill()
        for rank in (0, 1):
            left = rank_pid(rank, run_dir)
            if left is not None:  # torchrun ends when its rank does
                os.kill(left, signal.SIGKILL)
    shown = [out.read_text() for out in outs]
    assert "2 rank(s) on cpu" in shown[0]
    assert "resuming after step" in shown[0]
    assert "done: 200 steps" in shown[0]
    assert "rank(s) on cpu" not in shown[1]
    assert sorted(steps_of(read_metrics(run_dir))) == list(range(1, 201))
