"""Batch scripts from templates."""

from pathlib import Path

import pytest

from dist_transformer.config import build_config
from dist_transformer.errors import ConfigError, LaunchError
from dist_transformer.launcher.render import render
from dist_transformer.launcher.submit import Resources, describe_plan, plan_job

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
    resources = Resources(4, 8, None, {"time": "01:00:00", "partition": "gpu"})
    plan = plan_job(config, resources, template=launcher)  # type: ignore[arg-type]
    lines = plan.script.splitlines()
    for line in ("--nodes=4", "--gpus-per-node=8", "--time=01:00:00", "--partition=gpu", "--job-name=books"):
        assert lines.count(f"#SBATCH {line}") == 1
    tasks = 8 if launcher == "train_srun" else 1
    assert f"#SBATCH --ntasks-per-node={tasks}" in lines
    assert f"#SBATCH --output={Path('runs/books').absolute()}/slurm-%j.log" in lines
    assert describe_plan(plan) == (
        "32 ranks on 4 node(s): dp 32 x tp 1, ZeRO 2, 64 rows a step = 32 x 2 x 1 micro-steps"
    )


def test_seeds_are_an_array_with_a_folder_each() -> None:
    plan = plan_job(build_config(tree()), Resources(1, None, 2, {}), seeds=(3, 5))
    assert "#SBATCH --array=3,5" in plan.script
    assert [str(path) for path in plan.run_dirs()] == ["runs/books-seed3", "runs/books-seed5"]


def test_what_does_not_fit_is_refused_before_anything_is_written() -> None:
    with pytest.raises(ConfigError, match="how many ranks has a node"):
        plan_job(build_config(tree()), Resources(2, None, None, {}))
    with pytest.raises(ConfigError, match="global_batch_size=64 is not a multiple"):
        plan_job(build_config(tree()), Resources(3, 8, None, {}))
    config = build_config({**tree(), "parallel": {"tp_degree": 8}, "model": {"preset": "t5_v1_1_large"}})
    with pytest.raises(ConfigError, match="tp_degree=8 does not divide the 12 ranks"):
        plan_job(config, Resources(3, 4, None, {}))
    with pytest.raises(LaunchError, match="exclude each other"):
        plan_job(build_config(tree()), Resources(1, 8, None, {}), seeds=(1, 2), chain=2)
