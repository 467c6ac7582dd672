"""W&B's transaction logs (`run-ID.wandb`) on disk: what they hold, where they are torn, cutting them back.

The file is a 7-byte header and then LevelDB's log framing: blocks of 32 KiB, in them frames of a 7-byte head
(CRC, length, kind) and a piece of a record; each record is a `wandb_internal_pb2.Record`. wandb itself has no reader
for it in Python any more.
"""

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_transformer.tracking.jsonl import Row

BLOCK, HEAD = 32768, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_MAGIC, _NUMBER = b":W&B", 0xBEE1

X_STEP = "trainer/step"
"""The key that rows have on the dashboard for the training step."""


@dataclass(frozen=True)
class Tail:
    """Where the whole records of a log end."""

    end: int
    """Bytes up to and with the last whole record."""
    n_records: int
    n_torn_bytes: int
    """What a crash left behind it; cutting the file at `end` makes it whole."""


def wandb_files(run_dir: Path) -> list[Path]:
    """The transaction logs under a run directory, oldest first."""
    return sorted(
        (run_dir / "wandb").glob("*run-*/run-*.wandb"),
        key=lambda path: path.parent.name.removeprefix("offline-"),
    )


def marker_of(path: Path) -> Path:
    """The file whose presence tells `wandb sync` and us that a log has been uploaded."""
    return path.with_name(path.name + ".synced")


def is_uploaded(path: Path) -> bool:
    """Whether a server has (or got while it was written) what this log holds."""
    return marker_of(path).exists() or not path.parent.name.startswith("offline-")


def has_header(path: Path) -> bool:
    """Whether the file begins as a transaction log does; a process that died at once leaves less."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError:
        return False
    return len(head) == HEAD and struct.unpack("<4sHB", head)[:2] == (_MAGIC, _NUMBER)


def records(path: Path, look_back: int | None = None) -> Iterator[tuple[Any, int]]:
    """Each whole record as wandb's own message, and the place in the file where it ends.

    Ends quietly where the file is torn. `look_back`: read only so many bytes from the end.
    """
    from wandb.proto import wandb_internal_pb2

    for content, end in _frames(path, look_back):
        record = wandb_internal_pb2.Record()
        try:
            record.ParseFromString(content)
        except Exception:  # protobuf's DecodeError, which has no types: bytes that a crash left half written.
            continue
        yield record, end


def history(path: Path) -> list[Row]:
    """The logged rows."""
    return [row for record, _ in records(path) if (row := _row(record)) is not None]


def last_step(path: Path, look_back: int = 128 * BLOCK) -> int | None:
    """W&B's step of the last row that is whole; None where there is none in the last `look_back` bytes."""
    found: int | None = None
    for record, _ in records(path, look_back):
        if (row := _row(record)) is not None and "_step" in row:
            found = int(row["_step"])
    return found


def find_tail(path: Path) -> Tail:
    """Where the whole records end."""
    ends = [end for _, end in _frames(path, None)]
    end = ends[-1] if ends else HEAD
    return Tail(end, len(ends), max(0, path.stat().st_size - end))


def cut_torn(path: Path) -> int:
    """Remove what a crash left behind the last whole record; how many bytes that were."""
    tail = find_tail(path)
    if tail.n_torn_bytes:
        os.truncate(path, tail.end)
    return tail.n_torn_bytes


def cut_after(path: Path, step: int) -> int:
    """Remove everything from the first row on that is of a later training step; how many rows that were."""
    end_before, cut_at, n_rows = HEAD, -1, 0
    for record, end in records(path):
        row = _row(record)
        if row is not None and row.get(X_STEP, step) > step and cut_at < 0:
            cut_at = end_before
        n_rows += row is not None and cut_at >= 0
        end_before = end
    if cut_at >= 0:
        os.truncate(path, cut_at)
    return n_rows


def _row(record: Any) -> Row | None:
    if record.WhichOneof("record_type") != "history":
        return None
    items = record.history.item
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _frames(path: Path, look_back: int | None) -> Iterator[tuple[bytes, int]]:
    """Whole records' bytes with the place where each ends."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            # Pieces never cross blocks, so reading may begin at any block.
            start = 0 if look_back is None else max(0, size - look_back) // BLOCK * BLOCK
            file.seek(start)
            content = file.read()
    except OSError:
        return
    place = 0 if start else HEAD
    pieces: bytes | None = None  # None: in the middle of a record whose beginning was not read.
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
        if kind in (_FULL, _FIRST):
            pieces = piece
        elif pieces is not None:
            pieces += piece
        if kind in (_FULL, _LAST) and pieces is not None:
            yield pieces, start + place
            pieces = None
