"""Nodes that die, that are not fit, and that come back: the job goes on with what there is, on the same data."""

import sys
from pathlib import Path

import pytest

from dist_transformer.checkpoints.reader import load_weights
from dist_transformer.tracking.exits import read_exits
from tests.slurm.conftest import ALL_MODES, N_STEPS, figures, n_steps
from tests.tools.slurm import LIMIT_S, Cluster, Job

pytestmark = pytest.mark.timeout(4 * LIMIT_S)
FINGERPRINT = 2
"""Place of `data/fingerprint` in what `figures` gives."""


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
