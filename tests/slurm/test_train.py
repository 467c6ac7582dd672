"""slurm/train.sbatch on a real cluster: told to stop, or robbed of a node, the job goes on by itself."""

import json
import os
import re
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import pytest

from dist_transformer.checkpoints.reader import load_weights
from dist_transformer.tracking import read_metrics
from dist_transformer.tracking.exits import read_exits
from tests.slurm.conftest import ALL_MODES, COMPARED, N_STEPS, figures, n_steps
from tests.tools.slurm import LIMIT_S, ROOT, Cluster, Job

pytestmark = pytest.mark.timeout(4 * LIMIT_S)
FINGERPRINT = COMPARED.index("data/fingerprint")


@pytest.mark.parametrize("template", sorted((ROOT / "slurm").glob("*.sbatch")), ids=lambda path: path.name)
def test_sbatch_accepts_every_template(cluster: Cluster, template: Path, tmp_path: Path) -> None:
    """As it is, and with every optional line that any cluster would take."""
    text = template.read_text(encoding="utf-8")
    for name, value in (("YOUR_ACCOUNT", "me"), ("YOUR_PARTITION", "debug"), ("YOUR_QOS", "normal"),
                        ("YOUR_FEATURE", "cpu"), ("--gpus-per-node=8", "--gpus-per-node=4")):  # fmt: skip
        text = text.replace(name, value)
    text = re.sub(r"--cpus-per-task=\d+$", "--cpus-per-task=1", text, flags=re.MULTILINE)
    full = tmp_path / template.name
    full.write_text(text.replace("\n##SBATCH", "\n#SBATCH"), encoding="utf-8")
    assert "\n##SBATCH" in template.read_text(encoding="utf-8")
    for script, *options in ((template,), (template, "--exclusive", "--time=1:00:00"), (full,)):
        done = cluster.run("sbatch", "--test-only", *options, script, "config.yaml")
        assert done.returncode == 0, f"{script} {options}: {done.stderr}"
    assert (
        cluster.run("sbatch", "--test-only", "--partition=nowhere", template, "config.yaml").returncode != 0
    )


@ALL_MODES
def test_two_nodes_train_to_the_end(whole: tuple[Job, Path]) -> None:
    job, run_dir = whole
    fields, output = job.fields(), job.output()
    assert fields["JobState"] == "COMPLETED"
    assert fields["NodeList"] == "node[1-2]"
    assert fields["Restarts"] == "0"
    assert "2 rank(s) on cpu" in output
    assert f"finished: step-{N_STEPS:08d}, all steps are done" in output
    assert sorted(figures(run_dir)) == list(range(1, N_STEPS + 1))
    logs = run_dir / "logs" / f"job-{job.id}.0"
    assert sorted(path.name for path in logs.iterdir()) == ["node-0", "node-1"]
    assert f"done: {N_STEPS} steps" in (logs / "node-0" / "rank-0.log").read_text()


@ALL_MODES
def test_told_to_stop_it_saves_requeues_and_goes_on(
    cluster: Cluster, config: Path, whole: tuple[Job, Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    # Loader processes change nothing; the run to compare with has none.
    job = cluster.sbatch(tmp_path / "job.log", "train.sbatch", config, f"run.dir={run_dir}", "data.workers=2")
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
    job = cluster.sbatch(
        tmp_path / "job.log",
        "train.sbatch",
        config,
        f"run.dir={run_dir}",
        options=("--partition=low", "--exclusive"),
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
    job = cluster.sbatch(
        tmp_path / "job.log", "train.sbatch", config, f"run.dir={run_dir}", "train.steps=100000"
    )
    job.wait_for(lambda: n_steps(run_dir) >= 5, "the first steps")
    job.signal("--signal=USR1")
    job.finish()
    assert "stopped by hand at step-" in job.output()
    assert job.fields()["Restarts"] == "0"
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == f"step-{n_steps(run_dir):08d}"


@pytest.mark.parametrize("cluster", ["loopback"], indirect=True, scope="session")
def test_a_port_that_is_taken_is_left_alone_at_the_next_start(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    job = cluster.sbatch(
        tmp_path / "job.log", "train.sbatch", config, f"run.dir={tmp_path / 'run'}", "train.steps=3",
        options=("--hold", "--nodes=1"),
    )  # fmt: skip
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("", 10000 + int(job.id) % 20000))
        other.listen()
        cluster.must("scontrol", "release", job.id)
        job.finish()
    assert job.restarts() == 1
    assert "before training began: requeueing, once" in job.output()
    assert n_steps(tmp_path / "run") == 3


def test_a_mistake_is_one_sentence_and_no_node_starts(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    job = cluster.sbatch(tmp_path / "job.log", "train.sbatch", config, "train.stepps=3")
    job.wait_for(lambda: job.state() == "FAILED", "failing")
    assert job.fields()["ExitCode"] == "2:0"
    assert "train.stepps" in job.output()
    assert "Traceback" not in job.output()
    assert "node.sh" not in job.output()


def test_the_run_is_scored(
    cluster: Cluster, whole: tuple[Job, Path], pair_files: Path, tmp_path: Path
) -> None:
    files = {}
    for name in ("source", "target"):
        files[name] = tmp_path / f"{name}.txt"
        files[name].write_text(
            "".join((pair_files / f"{name}.txt").read_text().splitlines(keepends=True)[:20])
        )
    job = cluster.sbatch(
        tmp_path / "job.log", "evaluate.sbatch", whole[1], "--source", files["source"], "--reference",
        files["target"], "--beam-size", "1", "--output", tmp_path / "decoded.txt", options=("--cpus-per-task=1",),
    )  # fmt: skip
    job.finish()
    first, *_, last = job.output().splitlines()
    assert f"evaluate.sbatch: {first.split()[1]} job {job.id} on node" in first
    scores = json.loads(last)
    assert scores["sentences"] == 20
    assert scores["loss"] < 2
    assert len((tmp_path / "decoded.txt").read_text().splitlines()) == 20


@ALL_MODES
def test_a_node_dies_and_the_job_goes_on_with_half_the_nodes(
    cluster: Cluster, config: Path, whole: tuple[Job, Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = cluster.submit(run_dir, config, "checkpoint.every=20", nodes="1-2")
    job.wait_for(lambda: n_steps(run_dir) >= 25, "the first steps")
    assert job.fields()["NodeList"] == "node[1-2]"
    cluster.kill_node("node2")
    try:
        job.wait_for(lambda: n_steps(run_dir) == N_STEPS, "the steps that are left")
        job.finish()
        assert job.fields()["NodeList"] == "node1"
        assert job.restarts() >= 1
    finally:
        cluster.start_node("node2")
    output = job.output()
    assert "2 rank(s) on cpu" in output
    assert "1 rank(s) on cpu" in output
    assert "8 rows a step = 1 x 2 x 4 micro-steps" in output
    expected, actual = figures(whole[1]), figures(run_dir)
    assert sorted(actual) == list(range(1, N_STEPS + 1))
    assert {step: row[FINGERPRINT] for step, row in actual.items()} == {
        step: row[FINGERPRINT] for step, row in expected.items()
    }
    reasons = [end.reason for end in read_exits(run_dir)]
    assert reasons[-1] == "done"
    assert set(reasons[:-1]) <= {"crash", "killed", "preempted"}
    assert load_weights(run_dir / "checkpoints" / f"step-{N_STEPS:08d}").keys()


def test_a_node_that_is_not_fit_is_named_and_left_out(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    """One of its packages is of another version."""
    run_dir = tmp_path / "run"
    stale = tmp_path / "stale" / "webdataset-0.0.1.dist-info"
    stale.mkdir(parents=True)
    (stale / "METADATA").write_text("Metadata-Version: 2.1\nName: webdataset\nVersion: 0.0.1\n")
    python = tmp_path / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'[ "$SLURMD_NODENAME" != node2 ] || export PYTHONPATH={stale.parent}:$PYTHONPATH\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    options = ("--nodes=1-2", f"--export=ALL,PYTHON={python}")
    job = cluster.sbatch(
        tmp_path / "job.log", "train.sbatch", config, f"run.dir={run_dir}", "train.steps=30", options=options
    )
    job.finish()
    fields = job.fields()
    assert (fields["NodeList"], fields["ExcNodeList"], fields["Restarts"]) == ("node1", "node2", "1")
    first, last = read_exits(run_dir)
    assert first.reason == "preflight"
    assert "node2: webdataset is 0.0.1, elsewhere " in first.message
    assert last.reason == "done"
    assert (run_dir / "excluded_nodes").read_text() == "node2\n"
    assert n_steps(run_dir) == 30


def test_a_plain_user_may_requeue_a_job_without_a_node(cluster: Cluster) -> None:
    """Also where Slurm and this test belong to root."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copy(ROOT / "slurm" / "job.sh", folder)
        (folder / "excluded_nodes").write_text("node2\n")
        script = folder / "job.sbatch"
        script.write_text(
            f"#!/usr/bin/env bash\nsource {folder}/job.sh\nrun_dir={folder}\n"
            '[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0\nrequeue\nexit 1\n'
        )
        for path in folder.iterdir():
            path.chmod(0o644)
        as_user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
        options = ["--parsable", "--nodes=1-2", "--requeue", "--chdir=/tmp", "--output=/dev/null"]
        job = Job(cluster, cluster.must(*as_user, "sbatch", *options, script).strip(), folder / "none")
        job.finish()
        fields = job.fields()
    assert not fields["UserId"].startswith("root")
    assert (fields["Restarts"], fields["ExcNodeList"], fields["NodeList"]) == ("1", "node2", "node1")
