"""A real Slurm cluster for the tests of this folder, a small run, and the same run undisturbed."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from dist_transformer.tracking import read_metrics
from tests.e2e.conftest import environment, pair_files, pair_shards, steps_of
from tests.tools.slurm import Cluster, Job, start_cluster, why_not

__all__ = ["pair_files", "pair_shards"]

MODES = tuple(os.environ.get("SLURM_TEST_MODES", "loopback netns").split())
ALL_MODES = pytest.mark.parametrize("cluster", MODES, indirect=True, scope="session")
"""For tests that run on both kinds of cluster; the others run on the first, where all nodes share one network.
SLURM_TEST_MODES=netns runs all of them on the other kind."""
COMPARED = ("train/loss", "train/grad_norm", "data/fingerprint", "trainer/tokens_seen")
N_STEPS = 100


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder carry the marker."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that names no kind of cluster shares that of the others, and what they ran on it."""
    marked = any("cluster" in str(mark.args[0]) for mark in metafunc.definition.iter_markers("parametrize"))
    if "cluster" in metafunc.fixturenames and not marked:
        metafunc.parametrize("cluster", MODES[:1], indirect=True, scope="session")


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Two nodes, in the mode that the test asks for."""
    if reason := why_not(request.param):
        pytest.skip(reason)
    with start_cluster(request.param, {**environment(), "NPROC": "1"}) as found:
        yield found


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
            "max_source_len": 64, "max_target_len": 64, "window": 64, "workers": 0,
        },
        "train": {"steps": N_STEPS, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32"},
        "optimizer": {"lr": 0.005, "warmup_steps": 10},
        "checkpoint": {"every": 10_000, "keep": 2},
        "evaluate": {"every": 10_000, "batches": 2},
        "tracking": {"every": 1, "wandb": {"mode": "disabled"}},
    }  # fmt: skip
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def whole(cluster: Cluster, config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    """A job that nothing interrupts, and its run directory."""
    folder = tmp_path_factory.mktemp("whole")
    job = cluster.sbatch(folder / "job.log", "train.sbatch", config, f"run.dir={folder / 'run'}")
    job.finish()
    return job, folder / "run"


def figures(run_dir: Path) -> dict[int, tuple[object, ...]]:
    """What must be equal, by step."""
    rows = steps_of(read_metrics(run_dir)) if (run_dir / "metrics.jsonl").exists() else {}
    return {step: tuple(row.get(key) for key in COMPARED) for step, row in rows.items()}


def n_steps(run_dir: Path) -> int:
    """The newest step that was logged."""
    return max(figures(run_dir), default=0)
