"""`submit`, `status` and `cancel` on a real cluster, and jobs that come back after ranks were killed or stopped."""

import json
import os
import signal
from pathlib import Path

import pytest

from dist_transformer.tracking.exits import read_exits
from dist_transformer.tracking.heartbeats import read_beats
from tests.slurm.conftest import N_STEPS, n_steps
from tests.tools.slurm import LIMIT_S, Cluster, Job

pytestmark = pytest.mark.timeout(4 * LIMIT_S)


def send_to_rank(run_dir: Path, rank: int, number: signal.Signals) -> None:
    """A signal to a rank's process, which its own sign of life names."""
    os.kill(read_beats(run_dir)[rank].pid, number)


@pytest.mark.parametrize(("launcher", "ranks"), [("torchrun", 2), ("srun", 1)])
def test_submitted_it_trains_and_status_says_so(
    cluster: Cluster, config: Path, tmp_path: Path, launcher: str, ranks: int
) -> None:
    run_dir = tmp_path / "run"
    job = cluster.submit(run_dir, config, "--launcher", launcher, "train.steps=60", ranks=ranks)
    assert "waiting" in (said := cluster.cli("status", run_dir).stdout) or "running" in said
    job.finish()
    assert n_steps(run_dir) == 60
    said = cluster.cli("status", run_dir).stdout
    assert f"{run_dir}: finished" in said
    assert "step        60 of 60 (100 %); saved at 60" in said
    assert "COMPLETED" in said
    assert [end.reason for end in read_exits(run_dir)] == ["done"]
    folder = next((run_dir / "submitted").iterdir())
    assert {"job.sbatch", "config.yaml", "code.txt", "command.txt"} <= {
        path.name for path in folder.iterdir()
    }
    assert json.loads((run_dir / "jobs.json").read_text())[0]["job"] == job.id
    again = cluster.run("sbatch", "--parsable", "--nodes=2", f"--output={run_dir}/again.log", folder / "job.sbatch",
                        folder / "config.yaml")  # fmt: skip
    assert again.returncode == 0, again.stderr
    Job(cluster, again.stdout.strip(), run_dir / "again.log").finish()
    assert n_steps(run_dir) == 60


def test_cancelled_it_saves_and_stays_away(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = cluster.submit(run_dir, config, "train.steps=100000", "--launcher", "srun")
    job.wait_for(lambda: n_steps(run_dir) >= 5, "the first steps")
    done = cluster.cli("cancel", run_dir)
    assert done.returncode == 0, done.stderr
    assert f"job {job.id} saves and ends" in done.stdout
    job.finish()
    assert [end.reason for end in read_exits(run_dir)] == ["stopped"]
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == f"step-{n_steps(run_dir):08d}"
    assert job.fields()["Restarts"] == "0"
    assert "nothing runs or waits" in cluster.cli("cancel", run_dir).stderr


def test_a_stopped_rank_is_named_and_the_job_comes_back(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = cluster.submit(
        run_dir,
        config,
        "checkpoint.every=20",
        "faults.step_limit_s=15",
        "faults.heartbeat_s=1",
        "--launcher",
        "srun",
    )
    job.wait_for(lambda: n_steps(run_dir) >= 25, "the first steps")
    send_to_rank(run_dir, 1, signal.SIGSTOP)
    job.wait_for(lambda: job.fields()["Restarts"] == "1", "the requeue")
    job.finish()
    first, last = read_exits(run_dir)
    assert first.reason == "watchdog"
    assert "rank 1 on " in first.message
    assert "no sign of life" in first.message
    assert last.reason == "done"
    assert n_steps(run_dir) == N_STEPS
