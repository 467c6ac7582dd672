"""Writing safetensors files in one pass: bytes go to disk and into the checksum as they come, and are synced.

The safetensors package itself would first copy every tensor, and the file would be read again for its checksum.
Reading is left to the package. Large writes and hashing release Python's lock, so that a thread may do them while
training goes on.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dist_transformer.checkpoints.folder import FileRecord

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}
_CHUNK = 8 * 2**20
_ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, given in parts that are joined: each is moved to the CPU only when it is written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Iterable[Tensor]


def write_safetensors(path: Path, entries: list[Entry], metadata: Mapping[str, str]) -> FileRecord:
    """Write and sync a file.

    Raises:
        OSError: the disk is full, or the folder is gone.
        ValueError: an entry's parts are not as many elements as its shape.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=2**20) as stream:
        for chunk in _chunks(entries, metadata):
            digest.update(chunk)
            stream.write(chunk)
            size += len(chunk)
        stream.flush()
        os.fsync(stream.fileno())
    return FileRecord(size, digest.hexdigest())


def read_metadata(path: Path) -> dict[str, str]:
    """The strings in a file's header."""
    with safe_open(path, framework="numpy") as file:
        return dict(file.metadata() or {})


def _chunks(entries: list[Entry], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    yield _header(entries, metadata)
    for entry in entries:
        left = _n_bytes(entry)
        for part in entry.parts:
            if part.dtype != entry.dtype:
                raise ValueError(f"{entry.name}: a part is {part.dtype}, not {entry.dtype}")
            values: Any = part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            data = memoryview(values)
            left -= len(data)
            yield from (data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK))
        if left:
            raise ValueError(f"{entry.name}: its parts are {-left} bytes longer than its shape")


def _header(entries: list[Entry], metadata: Mapping[str, str]) -> bytes:
    tree: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for entry in entries:
        end = offset + _n_bytes(entry)
        tree[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _n_bytes(entry: Entry) -> int:
    return int(torch.Size(entry.shape).numel()) * entry.dtype.itemsize
