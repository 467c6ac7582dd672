"""Text files as streams of unpacked bytes: plain, gzip (`.gz`) or Zstandard (`.zst`), chosen by the name."""

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import zstandard

from dist_transformer.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

SUFFIXES = (".gz", ".zst")

_BUFFER_BYTES = 1 << 20
_ZSTD_INPUT_BYTES = 8 << 10
"""Small, since a few bytes of Zstandard can unpack to megabytes."""
_ZSTD_WINDOW_BYTES = 1 << 31
"""What `zstd --long=31` needs; a file that asks for less gets less."""


def is_compressed(name: str) -> bool:
    """Whether reading from the middle means unpacking all that comes before."""
    return name.endswith(SUFFIXES)


def inner_suffix(name: str) -> str:
    """The suffix below the compression's: `.jsonl` of `a.jsonl.zst`."""
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return Path(name).suffix.lower()


class HashedFile(io.RawIOBase):
    """A file as it lies on disk whose size and SHA-256 are known once it was read to the end."""

    def __init__(self, name: str) -> None:
        self._file = Path(name).open("rb", buffering=0)  # noqa: SIM115 - closed by close()
        self._sha256 = hashlib.sha256()
        self.n_bytes = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Read into a buffer; 0 at the end."""
        n_bytes = self._file.readinto(buffer)
        with memoryview(buffer) as view, view.cast("B") as flat, flat[:n_bytes] as read:
            self._sha256.update(read)
        self.n_bytes += n_bytes
        return n_bytes

    def hexdigest(self) -> str:
        """SHA-256 of what was read."""
        return self._sha256.hexdigest()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


class _ZstdFile(io.RawIOBase):
    """The content of all frames of a Zstandard file.

    The library's own reader takes a truncated file for a complete one.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = self._begin()
        self._ready = memoryview(b"")
        self._is_inside = False

    @staticmethod
    def _begin() -> "zstandard.ZstdDecompressionObj":
        return zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj()

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Read into a buffer; 0 at the end.

        Raises:
            EOFError: the file ends inside a frame.
        """
        while not self._ready:
            if self._frame.eof:
                packed, self._frame = self._frame.unused_data, self._begin()
                self._is_inside = False
            else:
                packed = b""
            packed = packed or self._file.read(_ZSTD_INPUT_BYTES)
            if not packed:
                if self._is_inside:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            self._is_inside = True
            self._ready = memoryview(self._frame.decompress(packed))
        with memoryview(buffer) as view, view.cast("B") as flat:
            n_bytes = min(len(flat), len(self._ready))
            flat[:n_bytes] = self._ready[:n_bytes]
        self._ready = self._ready[n_bytes:]
        return n_bytes


@contextmanager
def open_unpacked(name: str, file: io.RawIOBase | None = None, skip: int = 0) -> Iterator[BinaryIO]:
    """A file's unpacked bytes from `skip` on.

    Args:
        name: The file; its suffix says how it is packed.
        file: Read this instead of opening `name`.
        skip: Unpacked bytes that are passed over.
    """
    with ExitStack() as stack:
        if file is None:
            file = Path(name).open("rb", buffering=0)  # noqa: SIM115 - the stack closes it
        plain = stack.enter_context(file)
        if not is_compressed(name):
            if skip:
                plain.seek(skip)
            yield cast("BinaryIO", stack.enter_context(io.BufferedReader(plain, _BUFFER_BYTES)))
            return
        packed = cast("BinaryIO", stack.enter_context(io.BufferedReader(plain, _BUFFER_BYTES)))
        raw = gzip.GzipFile(fileobj=packed, mode="rb") if name.endswith(".gz") else _ZstdFile(packed)
        unpacked = stack.enter_context(io.BufferedReader(cast("io.RawIOBase", raw), _BUFFER_BYTES))
        while skip:
            skip -= len(unpacked.read(min(skip, _BUFFER_BYTES))) or skip
        yield cast("BinaryIO", unpacked)


@contextmanager
def explained(names: tuple[str, ...]) -> Iterator[None]:
    """Turn what goes wrong while these files are read into one sentence.

    Raises:
        DataError: a file is damaged or cannot be read.
    """
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        kind = "Zstandard" if isinstance(error, zstandard.ZstdError) or names[0].endswith(".zst") else "gzip"
        raise DataError(f"{' or '.join(names)} is a damaged {kind} file ({error}): copy it again") from error
    except OSError as error:
        name = error.filename or " or ".join(names)
        raise DataError(f"{name} cannot be read: {error.strerror or error}") from error
