"""`dist-transformer data`: commands about folders of shards."""

from dist_transformer.cli.inspect import add_inspect
from dist_transformer.cli.parsing import Commands, add_command


def add_data(commands: Commands) -> None:
    """The group and its commands."""
    data = add_command(
        commands,
        "data",
        "look at shards",
        "dist-transformer data inspect shards/books",
        None,
    )
    group: Commands = data.add_subparsers(title="what to do", metavar="COMMAND", required=True)
    add_inspect(group)
