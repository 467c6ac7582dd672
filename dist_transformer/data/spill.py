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
from typing import Any, Literal

import numpy as np

from dist_transformer.data.documents import Segment, read_documents
from dist_transformer.data.hashing import Int64, Shuffle
from dist_transformer.data.manifest import DTYPES, Kind, ShardInfo, write_atomically
from dist_transformer.data.ragged import Tokens, ragged_gather, ragged_indices
from dist_transformer.data.shards import write_shard
from dist_transformer.data.tokenizer import TextTokenizer

_BATCH = 1000


@dataclass(frozen=True)
class Part:
    """Some megabytes of input that are tokenised together."""

    folder: Path
    name: str
    segments: tuple[Segment, ...]
    first_document: int
    """Documents of its group before it."""
    shuffle: Shuffle | None
    """Document to place; None: the order of the input."""
    max_document_tokens: int

    @property
    def n_documents(self) -> int:
        """Documents without the empty ones."""
        return sum(segment.n_documents for segment in self.segments)

    def places(self) -> Int64:
        """[n_documents] where each stands in the shuffled order."""
        numbers = np.arange(self.first_document, self.first_document + self.n_documents)
        return numbers if self.shuffle is None else self.shuffle(numbers)

    @property
    def index_path(self) -> Path:
        """[samples, 3] int64: place, source tokens, target tokens; sorted by place."""
        return self.folder / f"{self.name}.index.npy"

    @property
    def tokens_path(self) -> Path:
        """Flat tokens of the samples in that order, source then target."""
        return self.folder / f"{self.name}.tokens.npy"

    @property
    def marker_path(self) -> Path:
        """Written last: the part is whole."""
        return self.folder / f"{self.name}.json"


def tokenise_parts(parts: tuple[Part, ...], tokenizer: TextTokenizer, dtype_name: str) -> int:
    """Tokenise parts that are read from the same file one after the other; those already done are skipped.

    Returns:
        Bytes of input that are dealt with.
    """
    for part in parts:
        if not part.marker_path.exists():
            _tokenise(part, tokenizer, DTYPES[dtype_name])
    return sum(segment.n_bytes for part in parts for segment in part.segments)


def _tokenise(part: Part, tokenizer: TextTokenizer, dtype: "np.dtype[np.unsignedinteger[Any]]") -> None:
    documents = read_documents(part.segments)
    flats: list[Tokens] = []
    lengths: list[Int64] = []
    n_sides = len(part.segments[0].input.files) if part.segments else 1
    while batch := list(islice(documents, _BATCH)):
        ids = tokenizer.encode_batch(list(chain.from_iterable(batch)))
        lengths.append(np.fromiter(map(len, ids), np.int64, len(ids)).reshape(-1, n_sides))
        flats.append(np.fromiter(chain.from_iterable(ids), dtype, int(lengths[-1].sum())))
    flat = np.concatenate(flats) if flats else np.zeros(0, dtype)
    sides = np.concatenate(lengths) if lengths else np.zeros((0, n_sides), np.int64)
    places, n_split = part.places(), 0
    if n_sides == 1:
        sides, places, n_split = _cut_long(sides[:, 0], places, part.max_document_tokens)
    order = np.argsort(places, kind="stable")
    index = np.concatenate([places[order, None], sides[order]], 1)
    flat = ragged_gather(flat, sides.sum(1), order)
    for path, array in ((part.index_path, index), (part.tokens_path, flat)):
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            np.save(file, array)
        partial.replace(path)
    totals = {"n_samples": len(index), "n_tokens": len(flat), "n_split": n_split}
    write_atomically(part.marker_path, json.dumps(totals))


def _cut_long(lengths: Int64, places: Int64, longest: int) -> tuple[Int64, Int64, int]:
    """Documents longer than `longest` become consecutive samples of equal place."""
    n_pieces = np.maximum(-(-lengths // longest), 1)
    number = ragged_indices(np.zeros_like(n_pieces), n_pieces)
    pieces = np.minimum(np.repeat(lengths, n_pieces) - number * longest, longest)
    target = np.zeros_like(pieces)
    return np.stack([pieces, target], 1), np.repeat(places, n_pieces), int((n_pieces > 1).sum())


def part_totals(part: Part) -> dict[str, int]:
    """What the part's marker says: n_samples, n_tokens, n_split."""
    totals: dict[str, int] = json.loads(part.marker_path.read_text(encoding="utf-8"))
    return totals


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: the samples of a range of places."""

    folder: Path
    work: Path
    split: Literal["train", "eval"]
    number: int
    first_place: int
    end_place: int

    @property
    def file(self) -> str:
        """Name of the shard."""
        return f"{self.split}-{self.number:05d}.tar"

    @property
    def marker_path(self) -> Path:
        """Written after the shard: its entry in the manifest."""
        return self.work / f"{self.file}.json"


def build_shard(task: ShardTask, parts: tuple[Part, ...], kind: Kind, dtype_name: str) -> ShardInfo:
    """Write a shard, or read its entry where an interrupted preparation finished it."""
    path = task.folder / task.file
    if task.marker_path.exists() and path.exists():
        info = ShardInfo(**json.loads(task.marker_path.read_text(encoding="utf-8")))
        if path.stat().st_size == info.bytes:
            return info
    info = write_shard(path, kind, DTYPES[dtype_name], _samples(task, parts, kind))
    write_atomically(task.marker_path, json.dumps(asdict(info)))
    return info


def _samples(task: ShardTask, parts: tuple[Part, ...], kind: Kind) -> Iterator[tuple[Tokens, ...]]:
    """The samples of the shard's places, in their order."""
    indices, flats = [], []
    for part in parts:
        index = np.load(part.index_path, mmap_mode="r")
        begin, end = np.searchsorted(index[:, 0], [task.first_place, task.end_place])
        if begin == end:
            continue
        sizes = index[:, 1] + index[:, 2]
        first = int(sizes[:begin].sum())
        tokens = np.load(part.tokens_path, mmap_mode="r")
        indices.append(np.asarray(index[begin:end]))
        flats.append(np.asarray(tokens[first : first + int(sizes[begin:end].sum())]))
    index, flat = np.concatenate(indices), np.concatenate(flats)
    sizes = index[:, 1] + index[:, 2]
    ends = np.cumsum(sizes)
    for i in np.argsort(index[:, 0], kind="stable").tolist():
        tokens = flat[ends[i] - sizes[i] : ends[i]]
        yield (tokens,) if kind == "text" else (tokens[: index[i, 1]], tokens[index[i, 1] :])
