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
    parser = add_command(
        commands,
        "restart",
        "say whether a run that ended should start again (exit code 0) or not (1); for batch scripts",
        "dist-transformer restart runs/books --limit 3",
        _restart,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument(
        "--limit",
        type=not_negative,
        default=3,
        help="failures in a row without a new checkpoint (default: 3)",
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
    parser.add_argument("--nodes", type=positive, required=True, help="machines")
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


def _restart(options: argparse.Namespace) -> None:
    from dist_transformer.tracking.exits import close_lost_attempt, decide_restart

    run_dir = Path(options.run_dir)
    close_lost_attempt(run_dir)
    decision = decide_restart(run_dir, options.limit)
    print(decision.why)
    if not decision.restart:
        sys.exit(1)
