"""launch/hosts.sh: a run on the machines of a list, reached by something that behaves as ssh does."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_transformer.checkpoints.folder import latest_checkpoint
from dist_transformer.tracking import read_metrics
from tests.e2e.conftest import ROOT, environment, steps_of

WriteConfig = Callable[..., Path]
LIMIT_S = 200


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    """Two names of this machine, and an ssh that runs the command here, from another folder, as a shell would."""
    ssh = tmp_path / "ssh"
    ssh.write_text(f'#!/usr/bin/env bash\necho "$1" >> {tmp_path}/reached\ncd / && exec env -i PATH="$PATH" '
                   f'OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= PYTHONPATH={ROOT} bash -c "$2"\n')  # fmt: skip
    ssh.chmod(0o755)
    path = tmp_path / "hostfile"
    path.write_text((ROOT / "launch" / "hostfile.example").read_text().replace("node-a", "127.0.0.1")
                    .replace("node-b", "localhost").replace("slots=8", "slots=1"))  # fmt: skip
    return path


def start(hosts: Path, *arguments: str | Path) -> "subprocess.Popen[str]":
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return subprocess.Popen(
        [ROOT / "launch" / "hosts.sh", hosts, *arguments],
        env={**environment(), "SSH": str(hosts.with_name("ssh")), "MASTER_PORT": str(port)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )


@pytest.mark.timeout(2 * LIMIT_S)
def test_a_run_on_two_hosts_stops_saved_and_goes_on(
    hosts: Path, pair_shards: Path, write_config: WriteConfig, tmp_path: Path
) -> None:
    config, run_dir = write_config(pair_shards, train={"steps": 4000}), tmp_path / "run"
    process = start(hosts, config)
    deadline = time.monotonic() + LIMIT_S
    while not (run_dir / "metrics.jsonl").exists() or len(steps_of(read_metrics(run_dir))) < 3:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # Not SIGINT: where the tests run in the background it may be ignored, and a shell cannot undo that.
    process.send_signal(signal.SIGTERM)
    try:
        said, _ = process.communicate(timeout=LIMIT_S)
    finally:
        (run_dir / "STOP").touch()  # nothing of it outlives a test that fails
    assert "asking all ranks to save" in said
    assert process.returncode == 0, said
    assert sorted((tmp_path / "reached").read_text().split()) == ["127.0.0.1", "localhost"]
    assert "node 0 of 2" in said
    assert "node 1 of 2" in said
    assert "2 rank(s) on cpu" in said
    checkpoint = latest_checkpoint(run_dir)
    assert checkpoint is not None
    stopped_at = int(checkpoint.name.removeprefix("step-"))
    process = start(hosts, config, f"train.steps={stopped_at + 2}")
    said, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, said
    assert f"done: {stopped_at + 2} steps" in said.replace(",", "")


@pytest.mark.parametrize(
    "content, words",
    [("", "names no host"), ("node-a 8\n", "nor a host with slots=N"), (None, "no such file")],
)
def test_a_wrong_list_is_one_sentence(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "hostfile"
    if content is not None:
        path.write_text(content)
    done = subprocess.run(
        [ROOT / "launch" / "hosts.sh", path, "configs/quickstart.yaml"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
