"""`dist-transformer track`: what dashboards need beside a run."""

import argparse
from pathlib import Path

from dist_transformer.cli.parsing import Commands, add_command, positive


def add_track(commands: Commands) -> None:
    """The command and its actions."""
    track = add_command(
        commands,
        "track",
        "upload runs that were trained without a network to W&B",
        "dist-transformer track sync runs/books",
        None,
    )
    actions: Commands = track.add_subparsers(title="actions", metavar="ACTION", required=True)
    sync = add_command(
        actions,
        "sync",
        "upload what the W&B server has not got, and say what was done",
        "dist-transformer track sync runs/* --watch",
        _sync,
    )
    sync.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="runs to upload")
    sync.add_argument(
        "--watch",
        action="store_true",
        help="go on until interrupted, and send runs that are still training row by row: for a login node",
    )
    sync.add_argument(
        "--interval",
        type=positive,
        metavar="SECONDS",
        default=60,
        help="between two looks of --watch (default: 60)",
    )


def _sync(options: argparse.Namespace) -> None:
    from dist_transformer.tracking.wandb_sync import sync_runs

    run_dirs = [Path(path) for path in options.run_dirs]
    sync_runs(
        run_dirs, lambda text: print(text, flush=True), float(options.interval) if options.watch else None
    )
