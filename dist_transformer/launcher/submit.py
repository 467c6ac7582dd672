"""`submit`: a configuration and resources become a job that was checked before it waits in a queue."""

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dist_transformer.config import Config, dump_config, shipped_files
from dist_transformer.config.layout import data_parallel_size, grad_accum_steps
from dist_transformer.data.manifest import load_manifest
from dist_transformer.data.order import check_lanes
from dist_transformer.errors import ConfigError, DataError, LaunchError, UserError
from dist_transformer.launcher.jobs import record_jobs
from dist_transformer.launcher.render import render
from dist_transformer.launcher.slurm import run_slurm

Template = Literal["train", "train_srun"]


@dataclass(frozen=True)
class Resources:
    """What a job asks of the cluster."""

    nodes: range
    """Numbers of nodes that the job may have; one, or more for a job that takes what there is."""
    gpus_per_node: int | None
    """None: CPU nodes, or the template's own line."""
    ranks_per_node: int | None
    """None: one for each GPU."""
    options: dict[str, str | None]
    """Further options of sbatch: time, partition, account, qos, ..."""

    @property
    def ranks_of_node(self) -> int:
        """Ranks of each node.

        Raises:
            ConfigError: neither GPUs nor ranks are given.
        """
        per_node = self.ranks_per_node or self.gpus_per_node
        if per_node is None:
            raise ConfigError(
                "how many ranks has a node? give --gpus-per-node N, or --ranks-per-node N on CPU nodes"
            )
        return per_node

    def __str__(self) -> str:
        """The nodes as sbatch takes them: `2`, or `2-4`."""
        first, last = self.nodes[0], self.nodes[-1]
        return str(first) if first == last else f"{first}-{last}"


@dataclass(frozen=True)
class Plan:
    """A job that is ready to be submitted."""

    script: str
    config: Config
    resources: Resources
    seeds: tuple[int, ...]
    """One run for each, as an array of jobs; empty: one run."""
    chain: int
    """Jobs one after the other."""

    def run_dirs(self) -> list[Path]:
        """Where the runs will be."""
        if not self.seeds:
            return [Path(self.config.run.dir)]
        return [Path(f"{self.config.run.dir}-seed{seed}") for seed in self.seeds]


def plan_job(
    config: Config,
    resources: Resources,
    *,
    template: Template = "train",
    seeds: Sequence[int] = (),
    chain: int = 1,
) -> Plan:
    """Check that the run fits the resources, and render its batch script. Touches nothing.

    Raises:
        ConfigError: ranks, layout and batch sizes do not fit together.
        DataError: the shards are here and do not fit the ranks, for any of the numbers of nodes that the job may have.
        LaunchError: chain and seeds exclude each other.
    """
    if seeds and chain > 1:
        raise LaunchError(
            "--chain and --seeds exclude each other: a chain goes on with one run, seeds are many"
        )
    _check_nodes(config, resources)
    run_dir, per_node = Path(config.run.dir), resources.ranks_of_node
    options: dict[str, str | None] = {
        "nodes": str(resources),
        "job-name": run_dir.name,
        "output": f"{run_dir.absolute()}/slurm-%{'A_%a' if seeds else 'j'}.log",
    }
    left_out: list[str] = []
    if template == "train_srun" and len(resources.nodes) == 1:
        options["ntasks-per-node"] = str(per_node)
    elif template == "train_srun":
        # With tasks counted, Slurm takes the fewest nodes that hold them; with cores, as many nodes as there are.
        left_out.append("ntasks-per-node")
        options["mincpus"] = str(per_node * int(resources.options.get("cpus-per-task") or 1))
    if resources.gpus_per_node is not None:
        options["gpus-per-node"] = str(resources.gpus_per_node)
    if seeds:
        options["array"] = ",".join(map(str, seeds))
    path = shipped_files("slurm") / f"{template}.sbatch"
    script = render(path.read_text(encoding="utf-8"), options | resources.options, left_out)
    return Plan(script, config, resources, tuple(seeds), chain)


def submit_job(plan: Plan) -> list[str]:
    """Keep what was submitted in the run directory, let Slurm check it, and submit it.

    Returns:
        The job's number; of a chain, all of them in order.

    Raises:
        LaunchError: Slurm is not here or refuses; nothing was submitted then.
    """
    folder = Path(plan.config.run.dir) / "submitted" / time.strftime("%Y%m%d-%H%M%S")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        script, config = folder / "job.sbatch", folder / "config.yaml"
        script.write_text(plan.script, encoding="utf-8")
        config.write_text(dump_config(plan.config), encoding="utf-8")
        _keep_code_state(folder)
    except OSError as error:
        raise LaunchError(f"{folder} cannot be written: {error.strerror}") from None
    environment = job_environment(plan.resources)
    arguments = [str(script), str(config)]
    run_slurm(["sbatch", "--test-only", *arguments], environment)
    jobs: list[str] = []
    for _ in range(plan.chain):
        # Each goes on where the one before it stopped, however that ended.
        after = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        jobs.append(run_slurm(["sbatch", "--parsable", *after, *arguments], environment).partition(";")[0])
    (folder / "command.txt").write_text(shlex.join(["sbatch", *arguments]) + "\n", encoding="utf-8")
    for run_dir, seed in zip(plan.run_dirs(), plan.seeds or (None,), strict=True):
        record_jobs(run_dir, jobs if seed is None else [f"{jobs[0]}_{seed}"], folder)
    return jobs


def job_environment(resources: Resources) -> dict[str, str]:
    """What the batch script needs to know besides its arguments: this installation, and the ranks of a node."""
    environment = {
        "DIST_TRANSFORMER_DIR": str(shipped_files("launch").parent),
        "PYTHON": sys.executable,
    }
    if resources.ranks_per_node is not None:
        environment["NPROC"] = str(resources.ranks_per_node)
    elif resources.gpus_per_node is not None and len(resources.nodes) > 1:
        environment["NPROC"] = str(resources.gpus_per_node)
    return environment


def _check_nodes(config: Config, resources: Resources) -> None:
    """That ranks, batch sizes and lanes fit each number of nodes that the job may have."""
    corpora, n_shards = config.data.corpora(), {}
    if not _unseen(config):
        n_shards = {corpus.name or corpus.train: len(load_manifest(corpus.train).train) for corpus in corpora}
    problems: dict[int, UserError] = {}
    for nodes in resources.nodes:
        try:
            dp_size = data_parallel_size(nodes * resources.ranks_of_node, config.parallel.tp_degree)
            grad_accum_steps(config, dp_size)
            if n_shards:
                check_lanes(n_shards, dp_size, config.data.workers)
        except (ConfigError, DataError) as error:
            problems[nodes] = error
    if not problems:
        return
    first = next(iter(problems.values()))
    if len(resources.nodes) == 1:
        raise first
    fit = [str(nodes) for nodes in resources.nodes if nodes not in problems]
    raise ConfigError(
        f"--nodes {resources}: with {' or '.join(map(str, problems))} node(s) the run does not fit ({first}); "
        f"{'it would with ' + ' or '.join(fit) if fit else 'no number of these would'}"
    )


def _unseen(config: Config) -> list[str]:
    """Shards that only the job will look at: a login node may not have them; URLs and patterns are not read here."""
    return [corpus.train for corpus in config.data.corpora() if not Path(corpus.train).is_dir()]


def _keep_code_state(folder: Path) -> None:
    """Commit, changes that are not committed, and versions: what a result can be reproduced from."""
    root = shipped_files("launch").parent
    commit = _git(root, "rev-parse", "HEAD")
    lines = [
        f"commit: {commit or 'unknown: not a git checkout'}",
        f"python: {sys.version.split()[0]}",
        f"cwd: {Path.cwd()}",
    ]
    (folder / "code.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if commit and (changes := _git(root, "diff", "HEAD")):
        (folder / "code.patch").write_text(changes + "\n", encoding="utf-8")


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def describe_plan(plan: Plan) -> str:
    """The job in one line for each number of nodes that it may have, and what was not looked at."""
    parallel, batch = plan.config.parallel, plan.config.train
    lines = []
    for nodes in plan.resources.nodes:
        n_ranks = nodes * plan.resources.ranks_of_node
        dp_size = n_ranks // parallel.tp_degree
        micro_steps = grad_accum_steps(plan.config, dp_size)
        lines.append(
            f"{n_ranks} ranks on {nodes} node(s): dp {dp_size} x tp {parallel.tp_degree}, "
            f"ZeRO {parallel.zero_stage}, {batch.global_batch_size} rows a step = "
            f"{dp_size} x {batch.micro_batch_size} x {micro_steps} micro-steps"
        )
    if unseen := _unseen(plan.config):
        lines.append(f"not a folder here, so that its lanes were not checked: {', '.join(unseen)}")
    return "\n".join(lines)
