"""The command line: arguments to calls, nothing else. Everything heavy is imported by the command that needs it."""

import os
import sys
import traceback
from collections.abc import Sequence

from dist_transformer import __version__
from dist_transformer.cli.checkpoint import add_checkpoint
from dist_transformer.cli.data import add_data
from dist_transformer.cli.interop import add_interop
from dist_transformer.cli.jobs import add_jobs
from dist_transformer.cli.parsing import Commands, Parser
from dist_transformer.cli.plan import add_plan
from dist_transformer.cli.prepare import add_prepare
from dist_transformer.cli.run import add_runs
from dist_transformer.cli.track import add_track
from dist_transformer.errors import UserError

__all__ = ["build_parser", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns 0 if it worked, 1 if it failed, 2 for bad arguments or configuration."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    try:
        options.run(options)
    except UserError as error:
        if options.debug:
            traceback.print_exc()
        elif rank == 0 or not error.on_every_rank:
            where = f"rank {rank}: " if rank else ""
            print(f"dist-transformer: {where}{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("dist-transformer: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - the reader is gone: nothing more to say
        return 1
    return 0


def build_parser() -> Parser:
    """All commands and their options."""
    parser = Parser(
        prog="dist-transformer",
        description="Pretrain encoder-decoder Transformers on a cluster.",
    )
    parser.add_argument("--version", action="version", version=f"dist-transformer {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands: Commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_prepare(commands)
    add_data(commands)
    add_runs(commands)
    add_track(commands)
    add_checkpoint(commands)
    add_interop(commands)
    add_plan(commands)
    add_jobs(commands)
    return parser
