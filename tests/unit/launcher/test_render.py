"""Batch scripts from templates."""

from pathlib import Path

import pytest

from dist_transformer.config import build_config
from dist_transformer.errors import ConfigError, LaunchError
from dist_transformer.launcher.render import render
from dist_transformer.launcher.submit import Resources, describe_plan, job_environment, plan_job

TEMPLATE = """#!/usr/bin/env bash
#SBATCH --nodes=2
# why
#SBATCH --time=04:00:00
##SBATCH --partition=YOUR_PARTITION
##SBATCH --exclusive

set -e
"""


def tree(**train: int) -> dict[str, object]:
    return {
        "run": {"dir": "runs/books"},
        "data": {"train": "shards/that-are-elsewhere"},
        "train": {"steps": 10, "global_batch_size": 64, "micro_batch_size": 2, **train},
    }


def test_options_are_set_in_place_and_others_added() -> None:
    script = render(TEMPLATE, {"nodes": "8", "partition": "gpu", "exclusive": None, "account": "me"})
    assert script.splitlines() == [
        "#!/usr/bin/env bash",
        "#SBATCH --nodes=8",
        "# why",
        "#SBATCH --time=04:00:00",
        "#SBATCH --partition=gpu",
        "#SBATCH --exclusive",
        "#SBATCH --account=me",
        "",
        "set -e",
    ]
    assert render(TEMPLATE, {}) == TEMPLATE


@pytest.mark.parametrize("launcher", ["train", "train_srun"])
def test_the_plan_of_a_job(launcher: str) -> None:
    config = build_config(tree())
    resources = Resources(range(4, 5), 8, None, {"time": "01:00:00", "partition": "gpu"})
    plan = plan_job(config, resources, template=launcher)  # type: ignore[arg-type]
    lines = plan.script.splitlines()
    for line in ("--nodes=4", "--gpus-per-node=8", "--time=01:00:00", "--partition=gpu", "--job-name=books"):
        assert lines.count(f"#SBATCH {line}") == 1
    assert [line for line in lines if line.startswith("#SBATCH --ntasks")] == (
        ["#SBATCH --ntasks-per-node=8"] if launcher == "train_srun" else []
    )
    assert f"#SBATCH --output={Path('runs/books').absolute()}/slurm-%j.log" in lines
    assert describe_plan(plan) == (
        "32 ranks on 4 node(s): dp 32 x tp 1, ZeRO 2, 64 rows a step = 32 x 2 x 1 micro-steps\n"
        f"not a folder here, so that its lanes were not checked: {tree()['data']['train']}"
    )


@pytest.mark.parametrize("launcher", ["train", "train_srun"])
def test_a_range_of_nodes(launcher: str) -> None:
    """Slurm takes as many nodes as there are only where it is not told how many tasks there will be."""
    resources = Resources(range(1, 3), None, 4, {"cpus-per-task": "3"})
    plan = plan_job(build_config(tree()), resources, template=launcher)  # type: ignore[arg-type]
    lines = plan.script.splitlines()
    assert "#SBATCH --nodes=1-2" in lines
    assert not [line for line in lines if line.startswith("#SBATCH --ntasks")]
    assert ("#SBATCH --mincpus=12" in lines) == (launcher == "train_srun")
    assert job_environment(resources)["NPROC"] == "4"
    assert describe_plan(plan).splitlines()[:-1] == [
        "4 ranks on 1 node(s): dp 4 x tp 1, ZeRO 2, 64 rows a step = 4 x 2 x 8 micro-steps",
        "8 ranks on 2 node(s): dp 8 x tp 1, ZeRO 2, 64 rows a step = 8 x 2 x 4 micro-steps",
    ]


def test_every_number_of_nodes_in_a_range_must_fit() -> None:
    with pytest.raises(
        ConfigError, match=r"--nodes 1-4: with 3 node.s. the run does not fit .*it would with 1 or 2 or 4"
    ):
        plan_job(build_config(tree()), Resources(range(1, 5), 8, None, {}))


def test_seeds_are_an_array_with_a_folder_each() -> None:
    plan = plan_job(build_config(tree()), Resources(range(1, 2), None, 2, {}), seeds=(3, 5))
    assert "#SBATCH --array=3,5" in plan.script
    assert [str(path) for path in plan.run_dirs()] == ["runs/books-seed3", "runs/books-seed5"]


def test_what_does_not_fit_is_refused_before_anything_is_written() -> None:
    with pytest.raises(ConfigError, match="how many ranks has a node"):
        plan_job(build_config(tree()), Resources(range(2, 3), None, None, {}))
    with pytest.raises(ConfigError, match="global_batch_size=64 is not a multiple"):
        plan_job(build_config(tree()), Resources(range(3, 4), 8, None, {}))
    config = build_config({**tree(), "parallel": {"tp_degree": 8}, "model": {"preset": "t5_v1_1_large"}})
    with pytest.raises(ConfigError, match="tp_degree=8 does not divide the 12 ranks"):
        plan_job(config, Resources(range(3, 4), 4, None, {}))
    with pytest.raises(LaunchError, match="exclude each other"):
        plan_job(build_config(tree()), Resources(range(1, 2), 8, None, {}), seeds=(1, 2), chain=2)
