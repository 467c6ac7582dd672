"""Looks into W&B's transaction log (`run-ID.wandb`): what a helper process that died had got onto the disk.

The file is a 7-byte header and then LevelDB's log framing: blocks of 32 KiB, in them frames of a 7-byte head
(CRC, length, kind) and a piece of a record. wandb itself has no reader for it in Python any more.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

_BLOCK, _HEAD = 32768, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def last_step(path: Path, look_back: int = 128 * _BLOCK) -> int | None:
    """The step of the last row that is whole in the log; None where there is none in its last `look_back`
    bytes.
    """
    from wandb.proto import wandb_internal_pb2

    found: int | None = None
    for content in _records(path, look_back):
        record = wandb_internal_pb2.Record()
        try:
            record.ParseFromString(content)
        except Exception:  # protobuf's DecodeError, which has no types: bytes that a crash left half written.
            continue
        if record.WhichOneof("record_type") == "history":
            for item in record.history.item:
                if (item.key or "".join(item.nested_key)) == "_step":
                    found = int(json.loads(item.value_json))
    return found


def _records(path: Path, look_back: int) -> Iterator[bytes]:
    """Whole records near the end of the file; ends quietly where the file is torn."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            # Frames never cross blocks, so reading may begin at any block.
            start = max(0, size - look_back) // _BLOCK * _BLOCK
            file.seek(start)
            content = file.read()
    except OSError:
        return
    place = 0 if start else _HEAD
    pieces: bytes | None = None  # None: in the middle of a record whose beginning was not read.
    while place + _HEAD <= len(content):
        left_in_block = _BLOCK - place % _BLOCK
        if left_in_block < _HEAD:
            place += left_in_block
            continue
        _crc, length, kind = struct.unpack("<IHB", content[place : place + _HEAD])
        piece = content[place + _HEAD : place + _HEAD + length]
        if kind == 0 or len(piece) < length:
            return
        place += _HEAD + length
        if kind in (_FULL, _FIRST):
            pieces = piece
        elif pieces is not None:
            pieces += piece
        if kind in (_FULL, _LAST) and pieces is not None:
            yield pieces
            pieces = None
