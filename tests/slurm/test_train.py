"""slurm/train.sbatch on a real cluster: it trains on two nodes, and a job that is told to stop goes on by itself."""

from pathlib import Path

import pytest

from dist_transformer.tracking import read_metrics
from tests.e2e.conftest import steps_of
from tests.slurm.conftest import TEMPLATE, Cluster, Job

COMPARED = ("train/loss", "train/grad_norm", "data/fingerprint", "trainer/tokens_seen")
N_STEPS = 160

pytestmark = pytest.mark.timeout(240)


def figures(run_dir: Path) -> dict[int, tuple[object, ...]]:
    """What must be equal, by step."""
    rows = steps_of(read_metrics(run_dir)) if (run_dir / "metrics.jsonl").exists() else {}
    return {step: tuple(row.get(key) for key in COMPARED) for step, row in rows.items()}


def n_steps(run_dir: Path) -> int:
    return max(figures(run_dir), default=0)


@pytest.fixture(scope="module")
def whole(cluster: Cluster, config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    """A job that nothing interrupts, and its run directory."""
    folder = tmp_path_factory.mktemp("whole")
    job = cluster.submit(folder / "job.log", config, f"run.dir={folder / 'run'}")
    job.finish()
    return job, folder / "run"


def test_sbatch_accepts_the_template(cluster: Cluster, config: Path) -> None:
    for options in ([], ["--nodes=2", "--gpus-per-node=4"], ["--exclusive", "--time=1:00:00"]):
        done = cluster.run("sbatch", "--test-only", *options, TEMPLATE, config)
        assert done.returncode == 0, done.stderr
    assert cluster.run("sbatch", "--test-only", "--nodes=3", TEMPLATE, config).returncode != 0


def test_two_nodes_train_to_the_end(whole: tuple[Job, Path]) -> None:
    job, run_dir = whole
    fields, output = job.fields(), job.output()
    assert fields["JobState"] == "COMPLETED"
    assert fields["NodeList"] == "node[1-2]"
    assert fields["Restarts"] == "0"
    assert "2 rank(s) on cpu" in output
    assert f"finished: step-{N_STEPS:08d} of {N_STEPS} steps" in output
    assert sorted(figures(run_dir)) == list(range(1, N_STEPS + 1))
    logs = run_dir / "logs" / f"job-{job.id}.0"
    assert sorted(path.name for path in logs.iterdir()) == ["node-0", "node-1"]
    assert f"done: {N_STEPS} steps" in (logs / "node-0" / "rank-0.log").read_text()


def test_told_to_stop_it_saves_requeues_and_goes_on(
    cluster: Cluster, config: Path, whole: tuple[Job, Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = cluster.submit(tmp_path / "job.log", config, f"run.dir={run_dir}")
    job.wait_for(lambda: n_steps(run_dir) >= 5, "the first steps")
    job.signal("--batch", "--signal=USR1")
    job.wait_for(lambda: job.fields()["Restarts"] == "1", "the requeue")
    first = n_steps(run_dir)
    assert 5 <= first < N_STEPS
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == f"step-{first:08d}"
    job.finish()
    output = job.output()
    assert job.fields()["Restarts"] == "1"
    assert "got SIGUSR1" in output
    assert "restart 1" in output
    assert f"resuming after step {first}" in output
    assert figures(run_dir) == figures(whole[1])
    trained = [row["step"] for row in read_metrics(run_dir) if row["event"] == "train"]
    assert trained == list(range(1, N_STEPS + 1))


def test_preempted_by_another_job_it_saves_and_waits_for_its_turn(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    """With a grace period, Slurm signals the ranks and not the batch shell."""
    run_dir = tmp_path / "run"
    job = cluster.submit(
        tmp_path / "job.log", config, f"run.dir={run_dir}", options=("--partition=low", "--exclusive")
    )
    job.wait_for(lambda: n_steps(run_dir) >= 5, "the first steps")
    high = cluster.run("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null",
                       "--wrap", "sleep 1")  # fmt: skip
    assert high.returncode == 0, high.stderr
    job.wait_for(lambda: job.fields()["Restarts"] == "1", "the requeue")
    assert (run_dir / "checkpoints" / "latest").exists()
    job.finish()
    assert n_steps(run_dir) == N_STEPS


def test_stopped_by_hand_it_saves_and_stays_stopped(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = cluster.submit(tmp_path / "job.log", config, f"run.dir={run_dir}", "train.steps=100000")
    job.wait_for(lambda: n_steps(run_dir) >= 5, "the first steps")
    job.signal("--signal=USR1")
    job.finish()
    assert "stopped by hand at step-" in job.output()
    assert job.fields()["Restarts"] == "0"
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == f"step-{n_steps(run_dir):08d}"


def test_a_mistake_is_one_sentence_and_no_node_starts(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    job = cluster.submit(tmp_path / "job.log", config, "train.stepps=3")
    job.wait_for(lambda: job.state() == "FAILED", "failing")
    assert job.fields()["ExitCode"] == "2:0"
    assert "train.stepps" in job.output()
    assert "Traceback" not in job.output()
    assert "node.sh" not in job.output()
