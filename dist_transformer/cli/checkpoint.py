"""Commands about checkpoints: list, verify, convert, average."""

import argparse
from pathlib import Path

from dist_transformer.cli.parsing import WEIGHTS, Commands, add_command, positive
from dist_transformer.errors import CheckpointError


def add_checkpoint(commands: Commands) -> None:
    """The commands of this module."""
    group = add_command(
        commands,
        "checkpoint",
        "look at a run's checkpoints, check them, average them, write their weights to one file",
        "dist-transformer checkpoint list runs/quickstart",
        None,
    )
    actions: Commands = group.add_subparsers(title="actions", metavar="ACTION", required=True)
    listing = add_command(
        actions,
        "list",
        "list a run's checkpoints: age, size, layout, tokens, whether they are whole",
        "dist-transformer checkpoint list runs/quickstart",
        _list,
    )
    listing.add_argument("run_dir", metavar="RUN_DIR", help="a run")
    verify = add_command(
        actions,
        "verify",
        "read a checkpoint's files and compare them with what was written; exit code 1 if one differs",
        "dist-transformer checkpoint verify runs/quickstart --all",
        _verify,
    )
    verify.add_argument("path", metavar="RUN_DIR|CHECKPOINT", help="a run (its newest one), or a checkpoint")
    verify.add_argument("--all", action="store_true", help="every checkpoint of the run")
    convert = add_command(
        actions,
        "convert",
        "write a checkpoint's whole float32 weights to one file, its model's configuration beside it",
        "dist-transformer checkpoint convert runs/quickstart --format safetensors --out weights.safetensors",
        _convert,
    )
    convert.add_argument("path", metavar="RUN_DIR|CHECKPOINT", help="a run (its newest one), or a checkpoint")
    convert.add_argument(
        "--format",
        choices=("safetensors", "torch"),
        default="safetensors",
        help="torch: a state_dict that torch.load reads (default: safetensors)",
    )
    convert.add_argument(
        "--out", required=True, metavar="FILE", help="file to write; FILE's name with .json beside"
    )
    convert.add_argument("--overwrite", action="store_true", help="replace files that are there")
    for parser in (verify, convert):
        parser.add_argument(
            "--checkpoint", metavar="WHICH", help="of a run: latest, best, a step, or a folder's name"
        )
    average = add_command(
        actions,
        "average",
        "write the mean of a run's checkpoints as a checkpoint that generate, evaluate and train.init_from take",
        "dist-transformer checkpoint average runs/translate_multi30k --last 5",
        _average,
    )
    average.add_argument("run_dir", metavar="RUN_DIR", help="a run")
    which = average.add_mutually_exclusive_group(required=True)
    which.add_argument("--last", type=positive, metavar="N", help="the N newest checkpoints")
    which.add_argument("--steps", type=_steps, metavar="A,B,..", help="the checkpoints of these steps")
    average.add_argument(
        "--out", metavar="DIR", help="folder to write (default: RUN_DIR/checkpoints/average-N-step-..)"
    )
    average.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    for parser in (convert, average):
        parser.add_argument(
            "--weights",
            choices=WEIGHTS,
            default="current",
            help="the trained weights, or their moving average (default: current)",
        )


def _steps(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def _list(options: argparse.Namespace) -> None:
    from dist_transformer.checkpoints.listing import describe_run, table

    print(table(describe_run(Path(options.run_dir))))


def _verify(options: argparse.Namespace) -> None:
    from dist_transformer.checkpoints.folder import (
        damages,
        find_checkpoint_in,
        list_checkpoints,
        read_description,
        read_files,
    )

    path = Path(options.path)
    checkpoints = list_checkpoints(path) if options.all else [find_checkpoint_in(path, options.checkpoint)]
    if not checkpoints:
        raise CheckpointError(f"{path}: no run with checkpoints")
    n_damaged = 0
    for checkpoint in checkpoints:
        try:
            read_description(checkpoint)
            found = list(damages(checkpoint, checksums=True))
        except CheckpointError as error:
            found = [str(error)]
        if not found:
            print(f"{checkpoint}: {len(read_files(checkpoint))} files are as they were written")
        for damage in found:
            print(damage)
        n_damaged += bool(found)
    if n_damaged:
        raise CheckpointError(f"{n_damaged} of {len(checkpoints)} checkpoints are damaged")


def _convert(options: argparse.Namespace) -> None:
    from dist_transformer.checkpoints.convert import convert
    from dist_transformer.checkpoints.folder import find_checkpoint_in

    checkpoint = find_checkpoint_in(Path(options.path), options.checkpoint)
    out, beside, n = convert(
        checkpoint, options.format, Path(options.out), options.overwrite, options.weights
    )
    print(f"{out}: {n:,} parameters of {checkpoint} in float32; the model's configuration is in {beside}")


def _average(options: argparse.Namespace) -> None:
    from dist_transformer.checkpoints.average import newest_of, of_steps, write_average

    run_dir = Path(options.run_dir)
    checkpoints = newest_of(run_dir, options.last) if options.last else of_steps(run_dir, options.steps)
    out = write_average(
        checkpoints, Path(options.out) if options.out else None, options.weights, options.overwrite
    )
    print(f"{out}: the mean of {', '.join(path.name for path in checkpoints)}")
