"""Tokenised documents on their way into shards: a shuffle of any amount of text in bounded memory.

Each part of the input is tokenised and written sorted by the documents' places in the shuffled order; a shard
is a range of places, so writing it means one contiguous piece of each part. Both steps are tasks for a pool
of processes, leave a marker when they are done, and give the same bytes whichever process does them.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from dist_transformer.data.dedup import Duplicates
from dist_transformer.data.documents import DocumentReader, Segment
from dist_transformer.data.hashing import Int64, Shuffle
from dist_transformer.data.manifest import DTYPES, Kind, ShardInfo, Split, write_atomically
from dist_transformer.data.ragged import Tokens, ragged_gather, ragged_indices
from dist_transformer.data.shards import RAW, write_shard
from dist_transformer.data.tokenizer import TextTokenizer

RAW_NAME = "raw"
"""In place of the name of a token type: samples stay text, so that their "tokens" here are UTF-8 bytes."""
_BATCH = 1000
_PIECE_BYTES = 64 << 20
"""Tokens of a shard that are put in order at a time."""


@dataclass(frozen=True)
class Part:
    """Some megabytes of input that are tokenised together."""

    folder: Path
    split: Split
    number: int
    """Parts of its split before it."""
    segments: tuple[Segment, ...]
    max_document_tokens: int
    first_document: int = 0
    """Documents of its split before it, duplicates not counted."""
    shuffle: Shuffle | None = None
    """Document to place; None: the order of the input."""
    duplicates: tuple[Duplicates, int] | None = None
    """Where the documents to leave out are listed, and under which number of a part."""
    n_duplicates: int = 0

    @property
    def n_documents(self) -> int:
        """Documents that are kept."""
        return sum(segment.n_documents for segment in self.segments) - self.n_duplicates

    @property
    def n_bytes(self) -> int:
        """Of unpacked input."""
        return sum(segment.n_bytes for segment in self.segments)

    def places(self) -> Int64:
        """[n_documents] where each stands in the shuffled order."""
        numbers = np.arange(self.first_document, self.first_document + self.n_documents)
        return numbers if self.shuffle is None else self.shuffle(numbers)

    def documents(self, reader: DocumentReader) -> Iterator[tuple[str, ...]]:
        """The documents that are kept."""
        left_out: set[int] = set()
        if self.duplicates is not None and self.n_duplicates:
            found, number = self.duplicates
            left_out = set(found.of_part(number).tolist())
        everything = chain.from_iterable(map(reader.read, self.segments))
        for place, document in enumerate(everything):
            if place not in left_out:
                yield document

    @property
    def files(self) -> "PartFiles":
        """Where it is written."""
        return PartFiles(self.folder, self.split, self.number)


@dataclass(frozen=True)
class PartFiles:
    """What a part becomes."""

    folder: Path
    split: Split
    number: int

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self.split}-part-{self.number:05d}{suffix}"

    @property
    def index(self) -> Path:
        """[samples, 4] int64: place, first token, source tokens, target tokens; sorted by place."""
        return self._path(".index.npy")

    @property
    def tokens(self) -> Path:
        """Flat tokens of the samples in that order, source then target."""
        return self._path(".tokens.npy")

    @property
    def marker(self) -> Path:
        """Written last: the part is whole."""
        return self._path(".json")

    def totals(self) -> dict[str, int]:
        """What the marker says: n_samples, n_tokens, n_split."""
        totals: dict[str, int] = json.loads(self.marker.read_text(encoding="utf-8"))
        return totals


def dtype_of(name: str) -> "np.dtype[np.unsignedinteger[Any]]":
    """Type of what is written, by its name."""
    return RAW if name == RAW_NAME else DTYPES[name]


def tokenise_parts(parts: tuple[Part, ...], tokenizer: TextTokenizer, dtype_name: str) -> int:
    """Tokenise parts that are read from the same file one after the other; those already done are skipped.

    Returns:
        Bytes of input that are dealt with.
    """
    reader = DocumentReader()
    for part in parts:
        if not part.files.marker.exists():
            _tokenise(part, reader, tokenizer, dtype_of(dtype_name))
    return sum(part.n_bytes for part in parts)


def _tokenise(
    part: Part,
    reader: DocumentReader,
    tokenizer: TextTokenizer,
    dtype: "np.dtype[np.unsignedinteger[Any]]",
) -> None:
    documents = part.documents(reader)
    flats: list[Tokens] = [np.zeros(0, dtype)]
    n_sides = part.segments[0].input.n_sides
    lengths: list[Int64] = [np.zeros((0, n_sides), np.int64)]
    while batch := list(islice(documents, _BATCH)):
        texts = list(chain.from_iterable(batch))
        ids = list(map(str.encode, texts)) if dtype == RAW else tokenizer.encode_batch(texts)
        lengths.append(np.fromiter(map(len, ids), np.int64, len(ids)).reshape(-1, n_sides))
        flats.append(np.fromiter(chain.from_iterable(ids), dtype, int(lengths[-1].sum())))
    flat, sides = np.concatenate(flats), np.concatenate(lengths)
    places, n_split = part.places(), 0
    if n_sides == 1:
        longest = int(sides.max(initial=1)) if dtype == RAW else part.max_document_tokens
        sides, places, n_split = _cut_long(sides[:, 0], places, longest)
    order = np.argsort(places, kind="stable")
    sizes = sides.sum(1)
    first = np.cumsum(sizes[order]) - sizes[order]
    index = np.stack([places[order], first, sides[order, 0], sides[order, 1]], 1)
    flat = ragged_gather(flat, sizes, order)
    for path, array in ((part.files.index, index), (part.files.tokens, flat)):
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            np.save(file, array)
        partial.replace(path)
    totals = {"n_samples": len(index), "n_tokens": len(flat), "n_split": n_split}
    write_atomically(part.files.marker, json.dumps(totals))


def _cut_long(lengths: Int64, places: Int64, longest: int) -> tuple[Int64, Int64, int]:
    """Documents longer than `longest` become consecutive samples of equal place."""
    n_pieces = np.maximum(-(-lengths // longest), 1)
    number = ragged_indices(np.zeros_like(n_pieces), n_pieces)
    pieces = np.minimum(np.repeat(lengths, n_pieces) - number * longest, longest)
    target = np.zeros_like(pieces)
    return np.stack([pieces, target], 1), np.repeat(places, n_pieces), int((n_pieces > 1).sum())


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: the samples of a range of places."""

    folder: Path
    work: Path
    split: Split
    number: int
    first_place: int
    end_place: int
    parts: Split
    """Which parts hold them."""
    n_parts: int

    @property
    def file(self) -> str:
        """Name of the shard."""
        return f"{self.split}-{self.number:05d}.tar"

    @property
    def marker_path(self) -> Path:
        """Written after the shard: its entry in the manifest."""
        return self.work / f"{self.file}.json"


def build_shard(task: ShardTask, kind: Kind, dtype_name: str, tokenizer: TextTokenizer) -> ShardInfo:
    """Write a shard, or read its entry where an interrupted preparation finished it."""
    path = task.folder / task.file
    if task.marker_path.exists() and path.exists():
        entry = json.loads(task.marker_path.read_text(encoding="utf-8"))
        info = ShardInfo(**entry | {"marks": tuple(entry["marks"])})
        if path.stat().st_size == info.bytes:
            return info
    info = write_shard(path, kind, dtype_of(dtype_name), _samples(task, kind), tokenizer)
    write_atomically(task.marker_path, json.dumps(asdict(info)))
    return info


def _samples(task: ShardTask, kind: Kind) -> Iterator[tuple[Tokens, ...]]:
    """The samples of the shard's places, in their order."""
    n_bytes = sum(tokens.nbytes for _, tokens in _pieces(task, task.first_place, task.end_place))
    n_turns = -(-n_bytes // _PIECE_BYTES)
    n_places = task.end_place - task.first_place
    for turn in range(n_turns):
        first, end = (task.first_place + n_places * i // n_turns for i in (turn, turn + 1))
        yield from _ordered(list(_pieces(task, first, end)), kind)


def _pieces(task: ShardTask, first_place: int, end_place: int) -> Iterator[tuple[Int64, Tokens]]:
    """Index and tokens of each part's samples in a range of places; both still on disk."""
    for number in range(task.n_parts):
        files = PartFiles(task.work, task.parts, number)
        index = np.load(files.index, mmap_mode="r")
        begin, end = np.searchsorted(index[:, 0], [first_place, end_place])
        if begin < end:
            tokens = np.load(files.tokens, mmap_mode="r")
            yield index[begin:end], tokens[index[begin, 1] : index[end - 1, 1:].sum()]


def _ordered(pieces: list[tuple[Int64, Tokens]], kind: Kind) -> Iterator[tuple[Tokens, ...]]:
    index = np.concatenate([index for index, _ in pieces])
    flat = np.concatenate([tokens for _, tokens in pieces])
    ends = np.cumsum(index[:, 2:].sum(1))
    starts, n_source = ends - index[:, 2:].sum(1), index[:, 2]
    for i in np.argsort(index[:, 0], kind="stable").tolist():
        tokens = flat[starts[i] : ends[i]]
        yield (tokens,) if kind == "text" else (tokens[: n_source[i]], tokens[n_source[i] :])
