"""Where a lane of the stream stands."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cursor:
    """Where a lane stands after a row: all that is needed to produce the lane's next row.

    `epoch` counts passes over the lane's shards, `shard` is the position in the epoch's shuffled list for
    the lane, `window` the window within that shard, `row` the next row of that window.
    """

    epoch: int = 0
    shard: int = 0
    window: int = 0
    row: int = 0


def as_numbers(cursor: Cursor) -> tuple[int, int, int, int]:
    """The four integers of a cursor (`dataclasses.astuple` copies deeply, which rows have no time for)."""
    return cursor.epoch, cursor.shard, cursor.window, cursor.row
