"""Commands about checkpoints: list, verify, convert."""

import argparse
from pathlib import Path

from dist_transformer.cli.parsing import Commands, add_command
from dist_transformer.errors import CheckpointError


def add_checkpoint(commands: Commands) -> None:
    """The commands of this module."""
    group = add_command(
        commands,
        "checkpoint",
        "look at a run's checkpoints, check them, write their weights to one file",
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
    checkpoints = list_checkpoints(path) if options.all else [find_checkpoint_in(path)]
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

    checkpoint = find_checkpoint_in(Path(options.path))
    out, beside, n = convert(checkpoint, options.format, Path(options.out), options.overwrite)
    print(f"{out}: {n:,} parameters of {checkpoint} in float32; the model's configuration is in {beside}")
