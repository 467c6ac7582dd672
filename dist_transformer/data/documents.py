"""Documents of text files: where they begin, decoded, one at a time; UTF-8, packed or not."""

import io
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from itertools import islice, zip_longest
from typing import BinaryIO

from dist_transformer.data.compressed import HashedFile, explained, open_unpacked
from dist_transformer.data.inputs import Input
from dist_transformer.data.records import BadLineError, parse_columns, parse_json
from dist_transformer.errors import DataError

SEGMENT_BYTES = 4 << 20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Segment:
    """Consecutive documents of an input."""

    input: Input
    number: int
    """Segments of the input before it."""
    offsets: tuple[int, ...]
    """Bytes (unpacked) before the first document, for each file."""
    first_line: int
    """Line number, from 1, of the first document."""
    n_raw: int
    """Documents, those left out counted."""
    n_documents: int
    """Documents without empty ones (pairs: neither side empty) and without bad lines."""
    n_bytes: int
    """Unpacked."""


@dataclass(frozen=True)
class Scan:
    """What one pass over an input found."""

    segments: tuple[Segment, ...]
    n_empty: int
    n_bad_lines: int
    sizes: tuple[int, ...]
    """Bytes of each file as it lies on disk."""
    digests: tuple[str, ...]
    """SHA-256 of each."""


class _LeftOut(Enum):
    EMPTY = 1
    BAD = 2


@dataclass(frozen=True, slots=True)
class _Raw:
    offsets: tuple[int, ...]
    line: int
    sides: tuple[bytes, ...]


def scan(source: Input) -> Scan:
    """Read an input once: check its encoding and alignment, and cut it into segments.

    Raises:
        DataError: a file cannot be read, is not UTF-8 (policy `error`), holds a bad line (policy `error`),
            or two sides have different numbers of lines.
    """
    with ExitStack() as stack:
        stack.enter_context(explained(source.files))
        hashed = [HashedFile(name) for name in source.files]
        files = [
            stack.enter_context(open_unpacked(name, file))
            for name, file in zip(source.files, hashed, strict=True)
        ]
        if len(files) == 1 and source.reading.unit == "line" and not source.has_records:
            segments, left_out = _scan_lines(source, files[0])
        else:
            segments, left_out = _scan_documents(source, files)
        return Scan(
            tuple(segments),
            left_out[_LeftOut.EMPTY],
            left_out[_LeftOut.BAD],
            tuple(file.n_bytes for file in hashed),
            tuple(file.hexdigest() for file in hashed),
        )


def _scan_documents(source: Input, files: list[BinaryIO]) -> tuple[list[Segment], dict[_LeftOut, int]]:
    segments: list[Segment] = []
    left_out = dict.fromkeys(_LeftOut, 0)
    begin: _Raw | None = None
    n_raw = n_documents = n_bytes = 0

    def close() -> None:
        if begin is not None:
            number = len(segments)
            segments.append(Segment(source, number, begin.offsets, begin.line, n_raw, n_documents, n_bytes))

    for raw in _split(source, files, (0,) * len(files), 1):
        if begin is not None and n_bytes >= SEGMENT_BYTES:
            close()
            begin, n_raw, n_documents, n_bytes = None, 0, 0, 0
        begin = begin or raw
        n_raw += 1
        n_bytes += sum(map(len, raw.sides))
        found = _decode(source, raw)
        if isinstance(found, _LeftOut):
            left_out[found] += 1
        else:
            n_documents += 1
    close()
    return segments, left_out


def _scan_lines(source: Input, file: BinaryIO) -> tuple[list[Segment], dict[_LeftOut, int]]:
    """`_scan_documents` for lines of plain text: megabytes at a time, ten times as fast."""
    segments: list[Segment] = []
    left_out = dict.fromkeys(_LeftOut, 0)
    offset, line = 0, 1
    while block := file.read(SEGMENT_BYTES):
        if not block.endswith(b"\n"):
            block += file.readline()
        n_raw = block.count(b"\n") + (not block.endswith(b"\n"))
        text = _decode_bytes(source, 0, block, offset, line)
        n_documents = sum(map(bool, map(str.strip, text.split("\n"))))
        segments.append(Segment(source, len(segments), (offset,), line, n_raw, n_documents, len(block)))
        left_out[_LeftOut.EMPTY] += n_raw - n_documents
        offset += len(block)
        line += n_raw
    return segments, left_out


class DocumentReader:
    """Reads segments; those that follow each other in an input, without opening it again."""

    def __init__(self) -> None:
        self._raws: Iterator[_Raw] = iter(())
        self._next: tuple[Input, int] | None = None

    def read(self, segment: Segment) -> Iterator[tuple[str, ...]]:
        """The segment's documents, those left out excepted: (text,) or (source, target). Take all of them.

        Raises:
            DataError: the input is no longer what it was when it was scanned.
        """
        source = segment.input
        if self._next != (source, segment.number):
            self._raws = _iterate_raw(source, segment.offsets, segment.first_line)
        n_raw = n_documents = 0
        for raw in islice(self._raws, segment.n_raw):
            n_raw += 1
            if not isinstance(document := _decode(source, raw), _LeftOut):
                n_documents += 1
                yield document
        if (n_raw, n_documents) != (segment.n_raw, segment.n_documents):
            raise DataError(
                f"{' or '.join(source.files)} was changed while it was prepared: run the command again with "
                "--overwrite"
            )
        self._next = (source, segment.number + 1)


def read_documents(segments: tuple[Segment, ...]) -> Iterator[tuple[str, ...]]:
    """The documents of segments, those left out excepted: (text,) or (source, target)."""
    reader = DocumentReader()
    for segment in segments:
        yield from reader.read(segment)


def read_block(source: Input, block: bytes) -> Iterator[tuple[str, ...] | None]:
    """The documents in a piece of an input's only file that begins with a line; None for a bad line."""
    for raw in _split(source, [io.BytesIO(block)], (0,), 1):
        if (found := _decode(source, raw)) is not _LeftOut.EMPTY:
            yield None if isinstance(found, _LeftOut) else found


def _iterate_raw(source: Input, offsets: tuple[int, ...], first_line: int) -> Iterator[_Raw]:
    """Undecoded documents from a place on."""
    with ExitStack() as stack:
        stack.enter_context(explained(source.files))
        files = [
            stack.enter_context(open_unpacked(name, skip=offset))
            for name, offset in zip(source.files, offsets, strict=True)
        ]
        yield from _split(source, files, offsets, first_line)


def _split(source: Input, files: list[BinaryIO], offsets: tuple[int, ...], line: int) -> Iterator[_Raw]:
    """Undecoded documents of open files that stand at `offsets`."""
    if len(files) == 2:
        yield from _split_pairs(source, files, offsets, line)
    elif source.has_records or source.reading.unit == "line":
        yield from _split_lines(files[0], offsets[0], line)
    elif source.reading.unit == "paragraph":
        yield from _split_paragraphs(files[0], offsets[0], line)
    elif content := files[0].read():
        yield _Raw(offsets, line, (content,))


def _split_lines(file: BinaryIO, offset: int, line: int) -> Iterator[_Raw]:
    for number, content in enumerate(file, line):
        yield _Raw((offset,), number, (content,))
        offset += len(content)


def _split_paragraphs(file: BinaryIO, offset: int, line: int) -> Iterator[_Raw]:
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


def _split_pairs(source: Input, files: list[BinaryIO], offsets: tuple[int, ...], line: int) -> Iterator[_Raw]:
    for number, (left, right) in enumerate(zip_longest(*files), line):
        if left is None or right is None:
            longer = files[0] if right is None else files[1]
            n_more = number + sum(1 for _ in longer)
            counts = (n_more, number - 1) if right is None else (number - 1, n_more)
            raise DataError(
                f"{source.files[0]} has {counts[0]} lines but {source.files[1]} has {counts[1]}: line i of "
                "one must belong to line i of the other"
            )
        yield _Raw(offsets, number, (left, right))
        offsets = (offsets[0] + len(left), offsets[1] + len(right))


def _decode(source: Input, raw: _Raw) -> tuple[str, ...] | _LeftOut:
    """The text of each side with LF line ends and without the last one, or why it is left out."""
    texts = [
        _decode_bytes(source, side, content, raw.offsets[side], raw.line)
        for side, content in enumerate(raw.sides)
    ]
    if source.has_records:
        line = texts[0].rstrip("\r\n")
        if not line.strip():
            return _LeftOut.EMPTY
        try:
            texts = list(_parse(source, line))
        except BadLineError as error:
            if source.reading.bad_lines == "skip":
                return _LeftOut.BAD
            raise DataError(
                f"{source.files[0]}, line {raw.line}: {error}: mend the line, or have such lines left out "
                "and counted with --bad-lines skip"
            ) from error
    texts = [text.replace("\r\n", "\n").rstrip("\r\n") for text in texts]
    return tuple(texts) if all(map(str.strip, texts)) else _LeftOut.EMPTY


def _decode_bytes(source: Input, side: int, content: bytes, offset: int, line: int) -> str:
    """Text of bytes of one file that begin at an offset and a line."""
    if offset == 0 and content.startswith(_BOM):
        content, offset = content[len(_BOM) :], len(_BOM)
    try:
        return content.decode("utf-8", "strict" if source.reading.bad_utf8 == "error" else "replace")
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise DataError(
            f"{source.files[side]}, line {line}, byte {offset + error.start}: not UTF-8 (byte "
            f"0x{content[error.start]:02x}): convert the file to UTF-8, or have bad bytes replaced with "
            "--bad-utf8 replace"
        ) from error


def _parse(source: Input, line: str) -> tuple[str, ...]:
    if not source.is_json:
        return parse_columns(line)
    texts = parse_json(line, source.reading.fields)
    if "\\u" not in line:
        return texts
    # JSON can spell half of a surrogate pair, which no UTF-8 can hold: bad bytes by another road.
    replaced = tuple(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts)
    if replaced != texts and source.reading.bad_utf8 == "error":
        raise BadLineError("half of a surrogate pair (\\ud800 to \\udfff), which --bad-utf8 replace replaces")
    return replaced
