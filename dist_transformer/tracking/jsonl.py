"""`metrics.jsonl`: strict JSON, one object a line, whole after any crash.

JSON has no NaN and no infinity. A value that is not finite is written as null, so that every reader sees a
number or nothing in that column, and what it was is kept beside: `{"train/loss": null, "nonfinite":
{"train/loss": "nan"}}`. `decode` puts it back.
"""

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE_NAME = "metrics.jsonl"
NONFINITE = "nonfinite"

_PLAIN = (float, int, str, type(None))

Row = dict[str, Any]
"""One logged event: `event`, `step`, `row`, `time`, `trainer/restarts`, and its values."""


def encode(row: Mapping[str, Any]) -> bytes:
    """One line of strict JSON, newline included."""
    plain: Row = {}
    nonfinite: dict[str, str] = {}
    for key, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            nonfinite[key] = str(value)
            value = None
        plain[key] = value
    if nonfinite:
        plain[NONFINITE] = nonfinite
    return (json.dumps(plain, allow_nan=False) + "\n").encode()


def decode(line: bytes) -> Row | None:
    """The row in a line, with its non-finite values back in place; None where the line is no row of ours."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if (
        not isinstance(row, dict)
        or not isinstance(row.get("event"), str)
        or not isinstance(row.get("step"), int)
    ):
        return None
    nonfinite = row.pop(NONFINITE, None)
    if isinstance(nonfinite, dict):
        for key, text in nonfinite.items():
            if text in ("nan", "inf", "-inf"):
                row[key] = float(text)
    return row


def to_plain(value: Any) -> float | int | str | list[list[str]] | None:
    """A value as JSON knows it: a tensor's element as a number, anything strange as text. Never raises."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, list):
        return [[str(cell) for cell in row] for row in value if isinstance(row, list)]
    try:
        element = value.item()
    except Exception:
        return str(value)
    return element if isinstance(element, _PLAIN) else str(element)


class LineFile:
    """Appends whole lines to a file: a line is either all there or not there at all.

    Writing goes straight to the system, one call a line, so a killed process loses nothing that was
    appended. Where the system takes only a part of a line (disk full, quota), that part is cut off again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last_row: Row | None = None
        self.was_torn = False
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._torn_at: int | None = None
        self._mend()

    def append(self, line: bytes) -> None:
        """Append one line; raises OSError where it could not be kept, and leaves the file as it was."""
        if self._torn_at is not None:
            self._cut(self._torn_at)
        written = 0
        try:
            while written < len(line):
                n_bytes = os.write(self._fd, line[written:])
                if n_bytes == 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                written += n_bytes
        except OSError:
            if written:
                self._torn_at = os.fstat(self._fd).st_size - written
                self._cut(self._torn_at)
            raise

    def close(self) -> None:
        """Ask the system to put everything on the disk, and close."""
        if self._fd < 0:
            return
        try:
            os.fsync(self._fd)
        finally:
            os.close(self._fd)
            self._fd = -1

    def _cut(self, size: int) -> None:
        os.ftruncate(self._fd, size)
        self._torn_at = None

    def _mend(self) -> None:
        """Complete or cut a last line that a crash left without its end, and find the last whole row."""
        size = os.fstat(self._fd).st_size
        tail_start, tail = _read_tail(self._fd, size)
        end = tail.rfind(b"\n") + 1
        rest = tail[end:]
        if rest:
            self.was_torn = True
            if decode(rest) is not None:  # Only the newline is missing: the row itself is whole.
                os.write(self._fd, b"\n")
                tail += b"\n"
            else:
                self._cut(tail_start + end)
                tail = tail[:end]
        for line in reversed(tail.splitlines()):
            row = decode(line)
            if row is not None:
                self.last_row = row
                return


def _read_tail(fd: int, size: int) -> tuple[int, bytes]:
    """The file's last bytes, reaching back until they hold at least two whole lines (or the file's start)."""
    length = 1 << 16
    while True:
        start = max(0, size - length)
        tail = os.pread(fd, size - start, start)
        if start == 0 or tail.count(b"\n") >= 3:
            return start, tail
        length *= 4
