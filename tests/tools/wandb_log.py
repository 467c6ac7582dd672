"""Reads W&B's transaction log (`run-ID.wandb`), also one that a crash left without its end.

The file is a 7-byte header and then LevelDB's log framing: blocks of 32 KiB, in them frames of a 7-byte
head (CRC, length, kind) and a piece of a record; each record is a `wandb_internal_pb2.Record`.
"""

import json
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK, HEAD = 32768, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def wandb_files(run_dir: Path) -> list[Path]:
    """The transaction logs under a run directory, oldest first."""
    return sorted((run_dir / "wandb").glob("*run-*/run-*.wandb"), key=lambda path: path.parent.name)


def frames(path: Path) -> Iterator[bytes]:
    """The whole records' bytes; ends quietly where the file is torn."""
    content = path.read_bytes()
    if len(content) < HEAD:
        return
    magic, number, _version = struct.unpack("<4sHB", content[:HEAD])
    if magic != b":W&B" or number != 0xBEE1:
        raise ValueError(f"{path} is no W&B transaction log")
    place, pieces = HEAD, b""
    while place + HEAD <= len(content):
        left_in_block = BLOCK - place % BLOCK
        if left_in_block < HEAD:
            place += left_in_block
            continue
        _crc, length, kind = struct.unpack("<IHB", content[place : place + HEAD])
        piece = content[place + HEAD : place + HEAD + length]
        if kind == 0 or len(piece) < length:
            return
        place += HEAD + length
        pieces = piece if kind in (_FULL, _FIRST) else pieces + piece
        if kind in (_FULL, _LAST):
            yield pieces


def records(path: Path) -> Iterator[Any]:
    """The records as wandb's own messages."""
    from wandb.proto import wandb_internal_pb2

    for frame in frames(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(frame)
        yield record


def history(path: Path) -> list[dict[str, Any]]:
    """The logged rows."""
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append(
                {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
            )
    return rows


def run_record(path: Path) -> Any:
    """The first description of the run: id, project, configuration."""
    return next(record.run for record in records(path) if record.WhichOneof("record_type") == "run")


def axes(path: Path) -> dict[str, str]:
    """`define_metric`: pattern or name, and the metric over which it is drawn."""
    found = [record.metric for record in records(path) if record.WhichOneof("record_type") == "metric"]
    return {metric.glob_name or metric.name: metric.step_metric for metric in found if metric.step_metric}


@dataclass(frozen=True)
class Tail:
    """Where the whole records of a log end."""

    end: int
    """Bytes up to and with the last whole record."""
    n_records: int
    n_torn_bytes: int


def find_tail(path: Path) -> Tail:
    """What a crash left behind the last whole record; cutting the file at `end` makes it whole."""
    content = path.read_bytes()
    place, end, n_records = HEAD, HEAD, 0
    while place + HEAD <= len(content):
        left_in_block = BLOCK - place % BLOCK
        if left_in_block < HEAD:
            place += left_in_block
            continue
        _crc, length, kind = struct.unpack("<IHB", content[place : place + HEAD])
        if kind == 0 or place + HEAD + length > len(content):
            break
        place += HEAD + length
        if kind in (_FULL, _LAST):
            end, n_records = place, n_records + 1
    return Tail(end, n_records, max(0, len(content) - end))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        log = Path(argument)
        print(log, dict(Counter(record.WhichOneof("record_type") for record in records(log))), find_tail(log))
        print(run_record(log).run_id, *history(log)[-1:])
