"""Tar archives by their headers: what is not wanted is passed over unread, and nothing in them is trusted.

WebDataset's reader goes through `tarfile` in streaming mode, which reads every byte on the way to a sample and
costs four to five times as much for each member (docs/data.md has the figures).
"""

import os
import zlib
from typing import BinaryIO, NamedTuple

_BLOCK = 512
_END = bytes(_BLOCK)
_CHUNK = 64 * 1024
"""Bytes read at a time: some dozens of small samples."""
_MAX_EXTENSION = 2**20
"""Largest extended header: names and sizes that do not fit a plain one."""

_REGULAR = b"0\x007"
_WITHOUT_DATA = b"123456"
"""Links, devices, folders and pipes: their size says nothing about what follows."""


class TarDamageError(Exception):
    """The bytes are no whole tar; the message is a part of a sentence."""


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    header: int
    """Where its first header begins: a place that a reader may start from."""
    begin: int
    """Where its content begins."""
    size: int
    """Bytes of its content."""


class TarReader:
    """Members of an uncompressed tar in their order; ustar, GNU and pax headers.

    Args:
        file: The tar on disk. Its position is not used, so that nothing but this object's few numbers (and up
            to 64 KiB, see `release`) is held between reads.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._fd = file.fileno()
        self.size = os.fstat(self._fd).st_size
        """Bytes of the file."""
        self.has_end = False
        """The mark that ends an archive was met: it was not cut between two members."""
        self._next = 0
        self._chunk, self._chunk_begin = b"", 0

    def seek(self, header: int) -> None:
        """Go on from the member whose `Member.header` this is."""
        self._next = header

    @property
    def place(self) -> int:
        """Byte at which the next member's first header begins."""
        return self._next

    def release(self) -> None:
        """Forget what was read ahead."""
        self._chunk = b""

    def next(self) -> Member | None:
        """The next regular file; None at the end.

        Raises:
            TarDamageError: the next bytes are no header, or the file ends inside a member.
            OSError: it cannot be read.
        """
        first, name, size = self._next, None, None
        while (header := self._header()) is not None:
            begin = self._next + _BLOCK
            kind = header[156]
            n_bytes = _number(header[124:136])
            if kind in b"xLKg":
                content = self._extension(begin, n_bytes)
                if kind == ord("x"):
                    name, size = _pax(content, name, size)
                elif kind == ord("L"):
                    name = _text(content.split(b"\0", 1)[0])
            else:
                n_bytes = n_bytes if size is None else size
                if kind in _WITHOUT_DATA:
                    n_bytes = 0
            if begin + n_bytes > self.size:
                raise TarDamageError(f"it ends at byte {self.size}, inside a member")
            self._next = begin + -(-n_bytes // _BLOCK) * _BLOCK
            if kind in _REGULAR:
                return Member(_name(header) if name is None else name, first, begin, n_bytes)
            if kind not in b"xLKg":
                first, name, size = self._next, None, None
        return None

    def read(self, member: Member) -> bytes:
        """The content of a member.

        Raises:
            TarDamageError: the file became shorter meanwhile.
            OSError: it cannot be read.
        """
        return self._bytes(member.begin, member.size)

    def _header(self) -> bytes | None:
        """The header at the next position; None at the end of the archive."""
        if self._next >= self.size:
            return None
        at = self._next - self._chunk_begin
        if not 0 <= at <= len(self._chunk) - _BLOCK:
            self._chunk, self._chunk_begin, at = os.pread(self._fd, _CHUNK, self._next), self._next, 0
        header = self._chunk[at : at + _BLOCK]
        if header[:1] == b"\0" and header == _END:
            self.has_end = True
            return None
        if len(header) < _BLOCK:
            raise TarDamageError(f"it ends at byte {self.size}, inside a header")
        if self._next == 0 and header.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd")):
            raise TarDamageError("it is compressed: decompress it, only plain tars are read")
        # Adler-32's lower half is 1 + the sum of the bytes modulo 65521: a sum at the speed of C. The checksum
        # counts its own eight bytes as spaces.
        rest = zlib.adler32(header[156:], zlib.adler32(header[:148])) & 0xFFFF
        if (_number(header[148:156]) - 8 * 32 + 1 - rest) % 65521:
            raise TarDamageError(f"byte {self._next} begins no tar header")
        return header

    def _extension(self, begin: int, n_bytes: int) -> bytes:
        if n_bytes > _MAX_EXTENSION:
            raise TarDamageError(f"an extended header of {n_bytes} bytes at byte {begin} is refused")
        return self._bytes(begin, n_bytes)

    def _bytes(self, begin: int, n_bytes: int) -> bytes:
        at = begin - self._chunk_begin
        if 0 <= at <= len(self._chunk) - n_bytes:
            return self._chunk[at : at + n_bytes]
        pieces, end = [], begin + n_bytes
        while begin < end:
            piece = os.pread(self._fd, end - begin, begin)
            if not piece:
                raise TarDamageError(f"it ends at byte {begin}, inside a member")
            pieces.append(piece)
            begin += len(piece)
        return b"".join(pieces)


def _number(field: bytes) -> int:
    """An octal number, or (GNU) a big-endian one marked by its first bit."""
    if field[0] & 0x80:
        value = int.from_bytes(field[1:], "big")
        if field[0] != 0x80:
            raise TarDamageError("a header holds a negative number")
        return value
    try:
        value = int(field.strip(b"\0 ") or b"0", 8)
    except ValueError:
        raise TarDamageError("a header holds no number where one belongs") from None
    if value < 0:
        raise TarDamageError("a header holds a negative number")
    return value


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[345] and header[257:263] == b"ustar\0":
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return _text(name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _pax(content: bytes, name: str | None, size: int | None) -> tuple[str | None, int | None]:
    """Name and size of the member that follows, where the records `LENGTH KEY=VALUE` give them."""
    while content:
        length, space, rest = content.partition(b" ")
        n_bytes = int(length) if space and length.isdigit() and len(length) < 8 else 0
        record = content[:n_bytes]
        if not record.endswith(b"\n") or b"=" not in rest:
            raise TarDamageError("a pax header is malformed")
        key, _, value = record[len(length) + 1 : -1].partition(b"=")
        if key == b"path":
            name = _text(value)
        elif key == b"size":
            if not value.isdigit() or len(value) > 18:
                raise TarDamageError("a pax header is malformed")
            size = int(value)
        content = content[n_bytes:]
    return name, size
