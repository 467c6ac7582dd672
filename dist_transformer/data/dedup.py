"""Exact duplicates of documents or pairs: found in bounded memory, the same whichever process does what.

Every document has a 128-bit hash. Each part of the input writes its hashes sorted; then the range of hashes is
cut into buckets, and in each bucket every hash that an earlier document has too is a duplicate's. A bucket
holds about a million hashes whatever the size of the corpus. That any two of ten billion different documents
share a hash has a probability below 1e-18.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path

import numpy as np

from dist_transformer.data.documents import DocumentReader, Segment
from dist_transformer.data.hashing import Int64, UInt64
from dist_transformer.data.manifest import write_atomically
from dist_transformer.data.pool import Workers, progress

BUCKET_DOCUMENTS = 1 << 20


@dataclass(frozen=True)
class PartHashes:
    """A part of the input and where its hashes go."""

    folder: Path
    number: int
    segments: tuple[Segment, ...]

    @property
    def path(self) -> Path:
        """[documents, 3] uint64: the halves of the hash and the place in the part; sorted by the first half."""
        return self.folder / f"hashes-{self.number:05d}.npy"


@dataclass(frozen=True)
class Duplicates:
    """Which documents of which parts are duplicates: files of [duplicates, 2] int64, part and place, sorted."""

    folder: Path
    n_parts: int
    n_buckets: int

    def path(self, bucket: int) -> Path:
        """The duplicates whose hashes are in a bucket."""
        return self.folder / f"duplicates-{bucket:05d}.npy"

    def of_part(self, number: int) -> Int64:
        """Places in a part, ascending, of the documents to leave out."""
        found = []
        for bucket in range(self.n_buckets):
            listed = np.load(self.path(bucket), mmap_mode="r")
            begin, end = np.searchsorted(listed[:, 0], [number, number + 1])
            found.append(np.array(listed[begin:end, 1]))
        return np.sort(np.concatenate(found))

    def count(self) -> Int64:
        """[n_parts] duplicates in each."""
        total = np.zeros(self.n_parts, np.int64)
        for bucket in range(self.n_buckets):
            listed = np.load(self.path(bucket), mmap_mode="r")
            total += np.bincount(listed[:, 0], minlength=self.n_parts)
        return total


def find_duplicates(
    folder: Path, groups: Sequence[tuple[tuple[Segment, ...], ...]], workers: Workers
) -> tuple[Duplicates, list[int]]:
    """Find every document that an earlier one equals.

    Args:
        folder: Where hashes and lists go; what an interrupted call finished there is used.
        groups: The segments of parts, in the order in which the first of equal documents is kept. The parts of
            a group are read one after the other by one process.
        workers: Who does it.

    Returns:
        The duplicates, and how many each part has; parts are numbered over all groups.
    """
    tasks: list[tuple[PartHashes, ...]] = []
    n_parts = 0
    for group in groups:
        tasks.append(tuple(PartHashes(folder, n_parts + i, part) for i, part in enumerate(group)))
        n_parts += len(group)
    segments = [segment for task in tasks for part in task for segment in part.segments]
    n_documents = sum(segment.n_documents for segment in segments)
    found = Duplicates(folder, n_parts, -(-n_documents // BUCKET_DOCUMENTS) or 1)
    marker = folder / "counts.json"
    if not marker.exists():
        folder.mkdir(exist_ok=True)
        with progress("hashing", sum(segment.n_bytes for segment in segments)) as advance:
            for amount in workers.run(_hash_parts, tasks):
                advance(amount)
        with progress("finding duplicates", found.n_buckets) as advance:
            for _ in workers.run(partial(_search_bucket, found), range(found.n_buckets)):
                advance(1)
        write_atomically(marker, json.dumps(found.count().tolist()))
    for task in tasks:
        for part in task:
            part.path.unlink(missing_ok=True)
    counts: list[int] = json.loads(marker.read_text(encoding="utf-8"))
    return found, counts


def _hash_parts(parts: tuple[PartHashes, ...]) -> int:
    reader = DocumentReader()
    for part in parts:
        if part.path.exists():
            continue
        digests = bytearray()
        for segment in part.segments:
            for document in reader.read(segment):
                digests += _hash(document)
        hashes = np.frombuffer(digests, "<u8").reshape(-1, 2).astype(np.uint64)
        order = np.argsort(hashes[:, 0], kind="stable")
        _save(part.path, np.concatenate([hashes[order], order[:, None].astype(np.uint64)], 1))
    return sum(segment.n_bytes for part in parts for segment in part.segments)


def _hash(document: tuple[str, ...]) -> bytes:
    hashed = blake2b(digest_size=16)
    for side in document:
        content = side.encode()
        # The length keeps ("ab", "c") apart from ("a", "bc").
        hashed.update(len(content).to_bytes(8, "little"))
        hashed.update(content)
    return hashed.digest()


def _search_bucket(found: Duplicates, bucket: int) -> None:
    if found.path(bucket).exists():
        return
    hashes: list[UInt64] = [np.zeros((0, 3), np.uint64)]
    for number in range(found.n_parts):
        of_part = np.load(PartHashes(found.folder, number, ()).path, mmap_mode="r")
        begin = np.searchsorted(of_part[:, 0], _bound(bucket, found.n_buckets))
        end = len(of_part)
        if bucket + 1 < found.n_buckets:
            end = int(np.searchsorted(of_part[:, 0], _bound(bucket + 1, found.n_buckets)))
        hashes.append(np.array(of_part[begin:end]))
    numbers = np.repeat(np.arange(found.n_parts), [len(some) for some in hashes[1:]])
    together = np.concatenate(hashes)
    # Stable: of equal hashes, the earlier part's and place's stays first.
    order = np.lexsort((together[:, 1], together[:, 0]))
    together, numbers = together[order], numbers[order]
    is_repeated = (together[1:, :2] == together[:-1, :2]).all(1)
    listed = np.stack([numbers[1:], together[1:, 2].astype(np.int64)], 1)[is_repeated]
    _save(found.path(bucket), listed[np.lexsort((listed[:, 1], listed[:, 0]))])


def _bound(bucket: int, n_buckets: int) -> np.uint64:
    """The smallest first half of a hash in a bucket."""
    return np.uint64(-(-(bucket << 64) // n_buckets))


def _save(path: Path, array: "Int64 | UInt64") -> None:
    partial_path = path.with_name(path.name + ".partial")
    with partial_path.open("wb") as file:
        np.save(file, array)
    partial_path.replace(path)
