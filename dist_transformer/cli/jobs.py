"""Commands for jobs on a cluster: submit, status, cancel, and what batch scripts ask."""

import argparse
import sys
from pathlib import Path

from dist_transformer.cli.parsing import Commands, add_command, not_negative, positive
from dist_transformer.errors import ConfigError


def add_jobs(commands: Commands) -> None:
    """The commands of this module."""
    _add_submit(commands)
    parser = add_command(
        commands, "status", "say how a run does", "dist-transformer status runs/books", _status
    )
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR")
    parser = add_command(
        commands,
        "cancel",
        "stop a run, saved, and take its jobs out of the queue",
        "dist-transformer cancel runs/books",
        _cancel,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--now", action="store_true", help="do not save first")
    _add_job(commands)


def _add_job(commands: Commands) -> None:
    parser = add_command(
        commands,
        "job",
        "for batch scripts: what to know before ranks start, and what to do when they have ended",
        "dist-transformer job begin configs/quickstart.yaml",
        None,
    )
    parts: Commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    begin = add_command(
        parts,
        "begin",
        "check a configuration; print its run directory and whether it is finished, as shell assignments",
        "dist-transformer job begin configs/quickstart.yaml run.dir=runs/books",
        _begin,
    )
    begin.add_argument("config", metavar="CONFIG.yaml")
    begin.add_argument("overrides", nargs="*", metavar="section.key=value")
    begin.add_argument(
        "--array-task", type=not_negative, metavar="N", help="a run of its own in RUN_DIR-seedN"
    )
    end = add_command(
        parts,
        "end",
        "record how a start ended; print whether to start again and why, as shell assignments",
        "dist-transformer job end runs/books --limit 3 --n-ends 0",
        _end,
    )
    end.add_argument("run_dir", metavar="RUN_DIR")
    end.add_argument(
        "--limit",
        type=not_negative,
        default=3,
        help="failures in a row without a new checkpoint (default: 3)",
    )
    end.add_argument(
        "--n-ends", type=not_negative, default=0, help="lines of exits.jsonl when it began (default: 0)"
    )


def _add_submit(commands: Commands) -> None:
    parser = add_command(
        commands,
        "submit",
        "check a run, and submit it as a Slurm job that goes on until it is finished",
        "dist-transformer submit configs/pretrain_t5_base.yaml --nodes 4 --gpus-per-node 8 --time 12:00:00",
        _submit,
    )
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--nodes",
        type=_nodes,
        required=True,
        metavar="N[-M]",
        help="machines; 2-4 takes as many of 2 to 4 as there are, at every restart",
    )
    parser.add_argument("--gpus-per-node", type=positive, help="GPUs of each, and as many ranks")
    parser.add_argument("--ranks-per-node", type=positive, help="ranks of each, on CPU nodes")
    parser.add_argument("--time", help="time limit of one start, such as 04:00:00; the run goes on after it")
    parser.add_argument("--partition", help="partition")
    parser.add_argument("--account", help="account")
    parser.add_argument("--qos", help="quality of service")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION[=VALUE]",
        help="any other option of sbatch, such as --sbatch constraint=a100 --sbatch exclusive; may be repeated",
    )
    parser.add_argument(
        "--launcher",
        choices=("torchrun", "srun"),
        default="torchrun",
        help="what starts the ranks of a node: torchrun, or srun with one task a rank",
    )
    parser.add_argument(
        "--chain",
        type=positive,
        default=1,
        help="jobs one after the other, where a cluster does not let jobs requeue",
    )
    parser.add_argument("--seeds", help="comma-separated: one run for each, as an array of jobs")
    parser.add_argument("--dry-run", action="store_true", help="check, print the script, submit nothing")


def _submit(options: argparse.Namespace) -> None:
    from dist_transformer.config import load_config
    from dist_transformer.launcher.submit import Resources, describe_plan, plan_job, submit_job

    config = load_config(options.config, options.overrides)
    named = {name: getattr(options, name) for name in ("time", "partition", "account", "qos")}
    extra: dict[str, str | None] = {name: value for name, value in named.items() if value is not None}
    for option in options.sbatch:
        name, equals, value = option.lstrip("-").partition("=")
        extra[name] = value if equals else None
    resources = Resources(options.nodes, options.gpus_per_node, options.ranks_per_node, extra)
    plan = plan_job(
        config,
        resources,
        template="train_srun" if options.launcher == "srun" else "train",
        seeds=_seeds(options.seeds),
        chain=options.chain,
    )
    print(describe_plan(plan), file=sys.stderr)
    if options.dry_run:
        print(plan.script, end="")
        return
    jobs = submit_job(plan)
    run_dir = plan.run_dirs()[0]
    print(f"job {' '.join(jobs)}")
    print(f"watch it:  dist-transformer status {run_dir}    tail -f {config.run.dir}/slurm-*.log")
    print(f"stop it:   dist-transformer cancel {run_dir}")


def _nodes(text: str) -> range:
    """`2` or `2-4`, for `type=`."""
    first, dash, last = text.partition("-")
    nodes = range(int(first), int(last if dash else first) + 1)
    if not nodes or nodes[0] < 1:
        raise argparse.ArgumentTypeError(
            f"{text} is not a number of nodes, such as 4, nor a range, such as 2-4"
        )
    return nodes


def _seeds(text: str | None) -> list[int]:
    if text is None:
        return []
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {text}: give whole numbers with commas, such as 1,2,3") from None
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ConfigError(f"--seeds {text}: give different numbers, 0 or more")
    return seeds


def _status(options: argparse.Namespace) -> None:
    from dist_transformer.launcher.jobs import describe_status, run_status

    for run_dir in options.run_dirs:
        print("\n".join(describe_status(run_status(Path(run_dir)))))


def _cancel(options: argparse.Namespace) -> None:
    from dist_transformer.launcher.jobs import cancel_run

    print("\n".join(cancel_run(Path(options.run_dir), now=options.now)))


def _begin(options: argparse.Namespace) -> None:
    from dist_transformer.launcher.batch import as_shell, begin_job

    print(as_shell(begin_job(options.config, options.overrides, options.array_task)))


def _end(options: argparse.Namespace) -> None:
    from dist_transformer.launcher.batch import as_shell, end_job

    print(as_shell(end_job(Path(options.run_dir), options.limit, options.n_ends)))
