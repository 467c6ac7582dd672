"""Jobs one after the other, jobs side by side, and the switches of a run."""

import json
from pathlib import Path

import pytest

from dist_transformer.tracking import read_metrics
from dist_transformer.tracking.exits import read_exits
from tests.slurm.conftest import n_steps
from tests.tools.slurm import LIMIT_S, Cluster, Job

pytestmark = pytest.mark.timeout(4 * LIMIT_S)


def test_a_chain_goes_on_where_the_job_before_it_ended(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    """For clusters that do not let jobs requeue. The last of them finds nothing left to do."""
    run_dir = tmp_path / "run"
    # Without --requeue, a job that is told to stop ends, and the next one is its restart.
    done = cluster.cli(
        "submit", config, f"run.dir={run_dir}", "train.steps=100000", "--nodes", "2", "--ranks-per-node", "1",
        "--chain", "3", "--sbatch", "no-requeue", "--launcher", "srun",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ids = done.stdout.splitlines()[0].removeprefix("job ").split()
    assert len(ids) == 3
    jobs = [Job(cluster, job, run_dir / f"slurm-{job}.log") for job in ids]
    assert [entry["job"] for entry in json.loads((run_dir / "jobs.json").read_text())] == ids
    jobs[0].wait_for(lambda: n_steps(run_dir) >= 5, "the first steps")
    assert jobs[1].state() == "PENDING"
    (run_dir / "SAVE").touch()
    jobs[0].wait_for(lambda: (run_dir / "checkpoints" / "latest").exists(), "the checkpoint asked for")
    saved = [row["checkpoint/step"] for row in read_metrics(run_dir) if row["event"] == "checkpoint"]
    jobs[0].wait_for(lambda: n_steps(run_dir) > max([*saved, 5]), "training to go on")
    assert not (run_dir / "SAVE").exists()
    jobs[0].signal("--batch", "--signal=USR1")
    jobs[1].wait_for(lambda: jobs[1].state() == "RUNNING", "the next of the chain")
    assert jobs[0].state() in ("FAILED", "COMPLETED")
    assert jobs[0].restarts() == 0
    before = n_steps(run_dir)
    jobs[1].wait_for(lambda: n_steps(run_dir) > before, "its first steps")
    assert f"resuming after step {before:,}" in jobs[1].output()
    stopped = cluster.cli("cancel", run_dir)
    assert stopped.returncode == 0, stopped.stderr
    assert f"job {ids[2]} (pending) is cancelled" in stopped.stdout
    assert f"job {ids[1]} saves and ends" in stopped.stdout
    jobs[1].finish()
    assert [end.reason for end in read_exits(run_dir)] == ["preempted", "stopped"]


def test_seeds_are_runs_of_their_own(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    done = cluster.cli(
        "submit", config, f"run.dir={tmp_path / 'run'}", "train.steps=8", "--nodes", "1", "--ranks-per-node", "1",
        "--seeds", "4,7", "--launcher", "srun",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = []
    for seed in (4, 7):
        run_dir = tmp_path / f"run-seed{seed}"
        task = json.loads((run_dir / "jobs.json").read_text())[0]["job"]
        job = Job(cluster, task, tmp_path / "run" / f"slurm-{task}.log")
        job.finish()
        assert f"seed: {seed}" in (run_dir / "config.yaml").read_text()
        assert n_steps(run_dir) == 8
        assert f"{run_dir}: finished" in cluster.cli("status", run_dir).stdout
        losses.append([row["train/loss"] for row in read_metrics(run_dir) if row["event"] == "train"])
    assert losses[0] != losses[1]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
