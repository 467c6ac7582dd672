"""Tar files of many small members, written fast: the bytes of Python's `tarfile`, for a tenth of its time a member."""

import tarfile
from typing import BinaryIO

_BLOCK = tarfile.BLOCKSIZE
_NAME, _SIZE, _CHECKSUM = slice(0, 100), slice(124, 136), slice(148, 156)
"""Places of the fields of a header that differ from member to member."""
_MODE = 0o444


class TarWriter:
    """Writes plain files without times or owners, so that equal members give equal bytes.

    Each header is one of `tarfile`'s in which name, size and checksum are replaced.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._n_blocks = 0
        member = tarfile.TarInfo()
        member.mode = _MODE
        template = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
        # Checksums count their own field as spaces.
        template[_CHECKSUM] = b" " * 8
        template[_SIZE] = bytes(12)
        self._template, self._sum = bytes(template), sum(template)

    @property
    def position(self) -> int:
        """Byte at which the next member begins."""
        return self._n_blocks * _BLOCK

    def write(self, name: str, content: bytes) -> None:
        """Append a member.

        Args:
            name: ASCII, at most 100 characters.
            content: Below 8 GiB.
        """
        named, sized = name.encode("ascii"), b"%011o\0" % len(content)
        if len(named) > 100 or len(sized) > 12:
            raise ValueError(f"{name} of {len(content)} bytes does not fit a plain tar header")
        header = bytearray(self._template)
        header[: len(named)] = named
        header[_SIZE] = sized
        header[_CHECKSUM] = b"%06o\0 " % (self._sum + sum(named) + sum(sized))
        padding = -len(content) % _BLOCK
        self._file.write(b"".join((header, content, bytes(padding))))
        self._n_blocks += 1 + (len(content) + padding) // _BLOCK

    def close(self) -> None:
        """Write the end of the tar; the file stays open."""
        n_blocks = self._n_blocks + 2
        per_record = tarfile.RECORDSIZE // _BLOCK
        self._file.write(bytes((2 + -n_blocks % per_record) * _BLOCK))
