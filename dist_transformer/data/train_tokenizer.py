"""A tokenizer trained alone, on a sample of any amount of text: pieces from random places of the inputs."""

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import FileIO
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, BinaryIO

from dist_transformer.data.compressed import explained, is_compressed, open_unpacked
from dist_transformer.data.documents import read_block, scan
from dist_transformer.data.hashing import hash_key
from dist_transformer.data.inputs import DocumentUnit, Input, Reading, check_inputs, is_json_lines
from dist_transformer.data.pool import progress
from dist_transformer.data.preparation import TOKENIZER_TEXT_BYTES
from dist_transformer.data.shares import input_bytes
from dist_transformer.data.tokenizer import Model, TextTokenizer, check_vocab_size
from dist_transformer.errors import DataError

PIECE_BYTES = 512 << 10


@dataclass(frozen=True)
class TrainedSummary:
    """What was trained, for the person who ran it."""

    out: Path
    vocab_size: int
    n_bytes: int
    """Text that it was trained on."""
    n_bad_lines: int
    """Lines that were left out."""
    seconds: float


def train_tokenizer(
    files: Sequence[str | Path],
    out: str | Path,
    *,
    documents: DocumentUnit = "line",
    fields: Sequence[str] = ("text",),
    vocab_size: int = 16384,
    model: Model = "bpe",
    seed: int = 1,
    overwrite: bool = False,
) -> TrainedSummary:
    """Train a tokenizer on a random sample of about 100 MB of text, or on all of it where there is less.

    Files are not read whole for it: the sample is pieces of half a megabyte from places spread evenly over all
    inputs. Since it is a sample, bytes that are not UTF-8 are replaced and bad lines left out; whoever prepares
    the text is told of them.

    Args:
        files: Text or JSON lines, plain, `.gz` or `.zst`.
        out: The `tokenizer.json` to write.
        documents: As in `prepare_text`.
        fields: Of JSON lines: where the texts are, one or several.
        vocab_size: Ids wanted, special tokens and sentinels counted.
        model: See `TextTokenizer.train`.
        seed: Of the sample.
        overwrite: Replace `out`.

    Raises:
        DataError: bad input, `out` is there, or no text was found.
    """
    started = time.monotonic()
    out = Path(out)
    check_vocab_size(vocab_size)
    plain, json_lines = (Reading(documents, "replace", "skip", names) for names in (("text",), tuple(fields)))
    inputs = [Input((str(name),), json_lines if is_json_lines(str(name)) else plain) for name in files]
    check_inputs(inputs, [])
    if out.is_dir() or (out.exists() and not overwrite):
        raise DataError(
            f"{out} is {'a folder' if out.is_dir() else 'there'}: use another --out or --overwrite"
        )
    sample = _Sample(inputs, seed)
    with progress("reading and training", sample.n_planned) as advance:
        tokenizer = TextTokenizer.train(sample.texts(advance), vocab_size, model)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(out.name + ".partial")
        tokenizer.save(partial)
        partial.replace(out)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror}") from error
    return TrainedSummary(
        out, tokenizer.vocab_size, sample.n_bytes, sample.n_bad_lines, time.monotonic() - started
    )


class _Sample:
    """Pieces of the inputs, in their order; a packed file is unpacked up to its last piece."""

    def __init__(self, inputs: Sequence[Input], seed: int) -> None:
        self._inputs = inputs
        ends = list(accumulate(map(input_bytes, inputs)))
        is_everything = ends[-1] <= TOKENIZER_TEXT_BYTES
        self._places = None if is_everything else _choose(ends, TOKENIZER_TEXT_BYTES // PIECE_BYTES, seed)
        self.n_planned = min(ends[-1], TOKENIZER_TEXT_BYTES)
        self.n_bytes = self.n_bad_lines = 0

    def texts(self, advance: Callable[[int], Any]) -> Iterator[str]:
        """The documents of all pieces.

        Raises:
            DataError: there is none.
        """
        for number in range(len(self._inputs)) if self._places is None else sorted(self._places):
            source = self._inputs[number]
            with explained(source.files), _open(source.files[0]) as file:
                for block in file.everything() if self._places is None else file.pieces(self._places[number]):
                    yield from self._texts_of(source, block)
                    advance(len(block))
        if not self.n_bytes:
            # Reading strictly says where and why.
            strict = replace(self._inputs[0], reading=replace(self._inputs[0].reading, bad_lines="error"))
            scan(strict)
            raise DataError(
                f"there is no text to train a tokenizer on in {strict.files[0]} and the other files"
            )

    def _texts_of(self, source: Input, block: bytes) -> Iterator[str]:
        for document in read_block(source, block):
            if document is None:
                self.n_bad_lines += 1
                continue
            for text in document:
                self.n_bytes += len(text.encode())
                yield text


def _choose(ends: Sequence[int], n_pieces: int, seed: int) -> dict[int, list[float]]:
    """Places of pieces, ascending, in inputs that end at `ends` of the whole: one at random in each equal part of it.

    A place is a share of its input: 0.0 is the beginning, 1.0 the end.
    """
    chosen: dict[int, list[float]] = {}
    for first, end in pairwise(ends[-1] * i // n_pieces for i in range(n_pieces + 1)):
        place = first + hash_key(seed, first) % (end - first)
        number = bisect_right(ends, place)
        begin = ends[number - 1] if number else 0
        chosen.setdefault(number, []).append((place - begin) / (ends[number] - begin))
    return chosen


class _Pieces:
    """Whole lines from places in a file that only goes forward."""

    def __init__(self, name: str, on_disk: FileIO, unpacked: BinaryIO) -> None:
        self._on_disk, self._unpacked = on_disk, unpacked
        self._is_packed = is_compressed(name)
        self._size = Path(name).stat().st_size
        self._at = 0
        """Unpacked bytes read."""

    def everything(self) -> Iterator[bytes]:
        """All there is."""
        while block := self._read():
            yield block

    def pieces(self, places: Sequence[float]) -> Iterator[bytes]:
        """About `PIECE_BYTES` from each place on, which is a share of the file as it lies on disk."""
        for place in places:
            self._go_to(int(place * self._size))
            if self._at:
                self._at += len(self._unpacked.readline())
            yield self._read()

    def _go_to(self, place: int) -> None:
        if not self._is_packed:
            self._at = self._unpacked.seek(max(place, self._at))
        while self._is_packed and self._on_disk.tell() < place:
            passed = len(self._unpacked.read(PIECE_BYTES))
            self._at += passed
            if not passed:
                return

    def _read(self) -> bytes:
        block = self._unpacked.read(PIECE_BYTES)
        block += self._unpacked.readline()
        self._at += len(block)
        return block


@contextmanager
def _open(name: str) -> Iterator[_Pieces]:
    on_disk = FileIO(name)
    with open_unpacked(name, on_disk) as unpacked:
        yield _Pieces(name, on_disk, unpacked)
