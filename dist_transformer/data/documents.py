"""Documents of text files: where they begin, decoded, one at a time; plain or gzip-compressed, UTF-8."""

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO, Literal, cast

from dist_transformer.errors import DataError

DocumentUnit = Literal["line", "paragraph", "file"]
BadUtf8 = Literal["error", "replace"]

SEGMENT_BYTES = 4 << 20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Input:
    """One text file, or a source and a target file whose lines belong together."""

    files: tuple[str, ...]
    unit: DocumentUnit
    bad_utf8: BadUtf8

    @property
    def is_compressed(self) -> bool:
        """Whether reading from the middle means unpacking all that comes before."""
        return any(name.endswith(".gz") for name in self.files)


@dataclass(frozen=True)
class Segment:
    """Consecutive documents of an input."""

    input: Input
    offsets: tuple[int, ...]
    """Bytes (unpacked) before the first document, for each file."""
    first_line: int
    """Line number, from 1, of the first document."""
    n_raw: int
    """Documents, empty ones counted."""
    n_documents: int
    """Documents without the empty ones (pairs: neither side empty)."""
    n_bytes: int
    """Unpacked."""


@dataclass(frozen=True)
class Scan:
    """What one pass over an input found."""

    segments: tuple[Segment, ...]
    n_empty: int
    sizes: tuple[int, ...]
    digests: tuple[str, ...]


@dataclass(frozen=True)
class _Raw:
    offsets: tuple[int, ...]
    line: int
    sides: tuple[bytes, ...]


def scan(source: Input) -> Scan:
    """Read an input once: check its encoding and alignment, and cut it into segments.

    Raises:
        DataError: a file cannot be read, is not UTF-8 (policy `error`), or two sides have different numbers
            of lines.
    """
    segments: list[Segment] = []
    begin: _Raw | None = None
    n_raw = n_documents = n_bytes = n_empty = 0
    for raw in _iterate_raw(source, (0,) * len(source.files), 1):
        if begin is not None and n_bytes >= SEGMENT_BYTES:
            segments.append(Segment(source, begin.offsets, begin.line, n_raw, n_documents, n_bytes))
            begin, n_raw, n_documents, n_bytes = None, 0, 0, 0
        begin = begin or raw
        n_raw += 1
        n_bytes += sum(map(len, raw.sides))
        if _decode(source, raw) is None:
            n_empty += 1
        else:
            n_documents += 1
    if begin is not None:
        segments.append(Segment(source, begin.offsets, begin.line, n_raw, n_documents, n_bytes))
    sizes = tuple(Path(name).stat().st_size for name in source.files)
    return Scan(tuple(segments), n_empty, sizes, tuple(_digest(name) for name in source.files))


def _digest(name: str) -> str:
    with Path(name).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_documents(segments: tuple[Segment, ...]) -> Iterator[tuple[str, ...]]:
    """The documents of segments, empty ones left out: (text,) or (source, target)."""
    for segment in segments:
        source = segment.input
        for i, raw in enumerate(_iterate_raw(source, segment.offsets, segment.first_line)):
            if i == segment.n_raw:
                break
            if (document := _decode(source, raw)) is not None:
                yield document


def _iterate_raw(source: Input, offsets: tuple[int, ...], first_line: int) -> Iterator[_Raw]:
    """Undecoded documents from a place on."""
    with ExitStack() as stack:
        try:
            files = [stack.enter_context(_open(name)) for name in source.files]
            for file, offset in zip(files, offsets, strict=True):
                file.seek(offset)
            if len(files) == 2:
                yield from _iterate_pairs(source, files, offsets, first_line)
            elif source.unit == "file":
                content = files[0].read()
                yield _Raw(offsets, first_line, (content,))
            else:
                split = _iterate_lines if source.unit == "line" else _iterate_paragraphs
                yield from split(files[0], offsets[0], first_line)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"{' or '.join(source.files)} is a damaged gzip file ({error}): copy it again"
            ) from error
        except OSError as error:
            name = error.filename or " or ".join(source.files)
            raise DataError(f"{name} cannot be read: {error.strerror or error}") from error


def _open(name: str) -> BinaryIO:
    if name.endswith(".gz"):
        return cast("BinaryIO", io.BufferedReader(cast("io.RawIOBase", gzip.open(name, "rb")), 1 << 20))
    return Path(name).open("rb", buffering=1 << 20)


def _iterate_lines(file: BinaryIO, offset: int, line: int) -> Iterator[_Raw]:
    for number, content in enumerate(file, line):
        yield _Raw((offset,), number, (content,))
        offset += len(content)


def _iterate_paragraphs(file: BinaryIO, offset: int, line: int) -> Iterator[_Raw]:
    held: list[bytes] = []
    begin_offset, begin_line = offset, line
    for number, content in enumerate(file, line):
        if content.strip():
            if not held:
                begin_offset, begin_line = offset, number
            held.append(content)
        elif held:
            yield _Raw((begin_offset,), begin_line, (b"".join(held),))
            held = []
        offset += len(content)
    if held:
        yield _Raw((begin_offset,), begin_line, (b"".join(held),))


def _iterate_pairs(
    source: Input, files: list[BinaryIO], offsets: tuple[int, ...], line: int
) -> Iterator[_Raw]:
    for number, (left, right) in enumerate(zip_longest(*files), line):
        if left is None or right is None:
            longer = files[0] if right is None else files[1]
            n_more = number + sum(1 for _ in longer)
            counts = (n_more, number - 1) if right is None else (number - 1, n_more)
            raise DataError(
                f"{source.files[0]} has {counts[0]} lines but {source.files[1]} has {counts[1]}: line i of "
                "one must belong to "
                "line i of the other"
            )
        yield _Raw(offsets, number, (left, right))
        offsets = (offsets[0] + len(left), offsets[1] + len(right))


def _decode(source: Input, raw: _Raw) -> tuple[str, ...] | None:
    """The text of each side with LF line ends and without the last one; None where a side is empty."""
    texts = []
    for side, content in enumerate(raw.sides):
        offset = raw.offsets[side]
        if offset == 0 and content.startswith(_BOM):
            content, offset = content[len(_BOM) :], len(_BOM)
        try:
            text = content.decode("utf-8", "strict" if source.bad_utf8 == "error" else "replace")
        except UnicodeDecodeError as error:
            line = raw.line + content.count(b"\n", 0, error.start)
            raise DataError(
                f"{source.files[side]}, line {line}, byte {offset + error.start}: not UTF-8 (byte "
                f"0x{content[error.start]:02x}): convert the file to UTF-8, or have bad bytes replaced with "
                "--bad-utf8 replace"
            ) from error
        text = text.replace("\r\n", "\n").rstrip("\r\n")
        if not text.strip():
            return None
        texts.append(text)
    return tuple(texts)
