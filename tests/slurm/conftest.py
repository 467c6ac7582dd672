"""A real Slurm cluster of two nodes on this machine, for the session, and jobs on it."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import ROOT, environment, pair_files, pair_shards

__all__ = ["pair_files", "pair_shards"]

TEMPLATE = ROOT / "slurm" / "train.sbatch"
PREPARE_TEMPLATE = ROOT / "slurm" / "prepare_array.sbatch"
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
APT = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"
LIMIT_S = 120


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder carry the marker."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@dataclass(frozen=True)
class Cluster:
    """Commands of a running cluster."""

    script: Path
    env: dict[str, str]

    def run(self, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        """A command such as sbatch, called in the checkout as a person would."""
        return subprocess.run(
            [str(argument) for argument in arguments],
            cwd=ROOT,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def submit(self, log: Path, *arguments: str | Path, options: tuple[str, ...] = ()) -> "Job":
        """`sbatch OPTIONS slurm/train.sbatch ARGUMENTS` on both nodes."""
        done = self.run(
            "sbatch", "--parsable", "--nodes=2", f"--output={log}", *options, TEMPLATE, *arguments
        )
        assert done.returncode == 0, done.stderr
        return Job(self, done.stdout.strip(), log)


@dataclass(frozen=True)
class Job:
    """A submitted job."""

    cluster: Cluster
    id: str
    log: Path

    def fields(self) -> dict[str, str]:
        """What `scontrol show job` says."""
        shown = self.cluster.run("scontrol", "-o", "show", "job", self.id).stdout
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def state(self) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, ..."""
        return self.fields().get("JobState", "")

    def output(self) -> str:
        """The job's log so far."""
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def signal(self, *options: str) -> None:
        """`scancel OPTIONS JOB`."""
        done = self.cluster.run("scancel", *options, self.id)
        assert done.returncode == 0, done.stderr

    def wait_for(self, condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
        """Poll until the condition holds; a job that ended before that, or too late, fails with its log."""
        deadline = time.monotonic() + limit_s
        while not condition():
            ended = (
                self.state() in ("FAILED", "TIMEOUT", "NODE_FAIL", "CANCELLED", "COMPLETED")
                and not condition()
            )
            assert not ended, f"{what}: {self.output()}"
            assert time.monotonic() < deadline, f"{what}: not within {limit_s} s: {self.output()}"
            time.sleep(0.1)

    def finish(self) -> None:
        """Wait until the job is COMPLETED."""
        self.wait_for(lambda: self.state() == "COMPLETED", "completing")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes, in loopback mode unless SLURMLAB_MODE says netns (root); taken down at the end, whatever happens."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"NOT TESTED ON SLURM: no {', '.join(missing)} here; install them with: {APT}")
    # Short: Slurm makes unix sockets below it. It must not exist, or the script takes it for somebody else's.
    folder = Path(tempfile.mkdtemp(prefix="dt-slurm-", dir="/tmp"))
    folder.chmod(0o755)  # munge insists
    script = Path(__file__).with_name("slurm_cluster.sh")
    env = {
        **{key: value for key, value in environment().items() if not key.startswith(("SLURM_", "SBATCH_"))},
        "PATH": path,
        "NPROC": "1",
        "SLURMLAB_DIR": str(folder / "lab"),
        "SLURMLAB_NODES": "2",
        "SLURMLAB_PORT": str(20000 + os.getpid() % 10000),
        "SLURM_CONF": str(folder / "lab" / "etc" / "slurm.conf"),
    }
    try:
        up = subprocess.run([script, "up"], env=env, capture_output=True, text=True, timeout=90)
        assert up.returncode == 0, f"the cluster did not come up: {up.stderr}"
        yield Cluster(script, env)
    finally:
        down = subprocess.run([script, "down"], env=env, capture_output=True, text=True, timeout=90)
        shutil.rmtree(folder, ignore_errors=True)
        assert down.returncode == 0, down.stderr


@pytest.fixture(scope="session")
def config(pair_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that makes a step in milliseconds, and enough steps to be interrupted between them."""
    tree = {
        "run": {"dir": str(pair_shards / "unused"), "seed": 3},
        "model": {
            "preset": "modern_small", "d_model": 32, "d_ff": 64, "n_heads": 2, "n_kv_heads": 1, "head_dim": 16,
            "n_encoder_layers": 2, "n_decoder_layers": 2, "dropout": 0.1,
        },
        "data": {
            "train": str(pair_shards), "eval": str(pair_shards), "objective": "pairs", "fingerprint": True,
            "max_source_len": 64, "max_target_len": 64, "window": 64,
        },
        "train": {"steps": 160, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32"},
        "optimizer": {"lr": 0.005, "warmup_steps": 10},
        "checkpoint": {"every": 10_000, "keep": 2},
        "evaluate": {"every": 10_000, "batches": 2},
        "tracking": {"every": 1, "wandb": {"mode": "disabled"}},
    }  # fmt: skip
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path
