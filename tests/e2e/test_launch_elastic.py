"""launch/node.sh with a range of nodes: it goes on without a node that died, and takes it in again when it is back."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_transformer.tracking import read_metrics
from tests.e2e.conftest import ROOT, environment, steps_of

LIMIT_S = 300


def start(node: int, port: int, out: Path, *arguments: str | Path) -> "subprocess.Popen[bytes]":
    variables = {
        "NNODES": "1:2",
        "NODE_RANK": str(node),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with out.open("ab") as file:
        return subprocess.Popen(
            [ROOT / "launch" / "node.sh", *arguments],
            cwd=ROOT,
            env={**environment(), **variables},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def kill_all(pid: int) -> None:
    """A process and all below it, as a node dies."""
    children = [
        int(child)
        for task in Path(f"/proc/{pid}/task").glob("*")
        for child in (task / "children").read_text().split()
    ]
    os.kill(pid, signal.SIGKILL)
    for child in children:
        kill_all(child)


@pytest.mark.timeout(4 * LIMIT_S)
def test_nodes_come_and_go(tmp_path: Path, pair_shards: Path, write_config: Callable[..., Path]) -> None:
    config = write_config(
        pair_shards, train={"steps": 100_000}, checkpoint={"every": 20}, evaluate={"every": 100_000}
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run_dir, outs = tmp_path / "run", [tmp_path / "node-0.txt", tmp_path / "node-1.txt"]
    arguments = (config, "--max-restarts", "3")

    def wait_for(condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert first.poll() is None, f"{what}: {outs[0].read_text()}"
            assert time.monotonic() < deadline, f"{what}: {outs[0].read_text()}"
            time.sleep(0.2)

    def n_steps() -> int:
        return max(steps_of(read_metrics(run_dir)), default=0) if (run_dir / "metrics.jsonl").exists() else 0

    first = start(0, port, outs[0], *arguments)
    second = start(1, port, outs[1], *arguments)
    try:
        wait_for(lambda: n_steps() >= 25, "steps on two nodes")
        assert "2 rank(s) on cpu" in outs[0].read_text()
        kill_all(second.pid)
        second.wait()
        wait_for(lambda: "1 rank(s) on cpu" in outs[0].read_text(), "going on with one node")
        alone = n_steps()
        wait_for(lambda: n_steps() > alone, "steps on one node")
        second = start(1, port, outs[1], *arguments)
        wait_for(lambda: outs[0].read_text().count("2 rank(s) on cpu") == 2, "two nodes again")
        together = n_steps()
        wait_for(lambda: n_steps() > together, "steps on both")
        (run_dir / "STOP").touch()
        assert first.wait(LIMIT_S) == 0, outs[0].read_text()
        assert second.wait(LIMIT_S) == 0, outs[1].read_text()
    finally:
        for process in (first, second):
            if process.poll() is None:
                kill_all(process.pid)
    trained = steps_of(read_metrics(run_dir))
    assert sorted(trained) == list(range(1, max(trained) + 1))
