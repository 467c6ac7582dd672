"""Shards: WebDataset tars, written whole or not at all, read in windows from any sample on.

A sample is one member (kind text) or two (kind pairs) with the same key: `KEY.tokens`, or `KEY.source` and
`KEY.target`, little-endian uint16 or uint32 token ids without EOS; or `KEY.txt`, or `KEY.source.txt` and
`KEY.target.txt`, UTF-8 text that the reader tokenises. Shards are untrusted input: anything else in them is
refused, nothing in them is executed, and no name in them is used as a path.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from dist_transformer.config.data import DataConfig, RemoteConfig
from dist_transformer.data.cache import ShardCache, fetchers
from dist_transformer.data.decode import decode
from dist_transformer.data.hashing import Int64
from dist_transformer.data.layout import SampleLayout
from dist_transformer.data.locations import is_url, refuse_commands
from dist_transformer.data.manifest import (
    MARK_EVERY,
    RAW_FIELDS,
    TOKEN_FIELDS,
    Kind,
    Manifest,
    ShardInfo,
    Split,
)
from dist_transformer.data.ragged import Tokens
from dist_transformer.data.tar import Member, TarDamageError, TarReader
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.errors import DataError

RAW = np.dtype("u1")
"""As the `dtype` of `write_shard`: samples are UTF-8 text."""
_MEND = "copy it again or prepare with --overwrite"
_LARGEST_MEMBER = 256 * 2**20
_BATCH = 1000


@dataclass(frozen=True)
class RawWindow:
    """Consecutive samples of a shard, one (flat tokens, lengths) for each field."""

    first: int
    """Place in the shard of the first sample."""
    fields: tuple[tuple[Tokens, Int64], ...]
    indices: Int64
    """[N] place of each sample in its shard."""
    n_bad: int = 0
    """Samples asked for that are lost to damage (policy `skip`): those left out, and those that are not there."""
    problem: str = ""
    """A sentence about the first of them; empty where none is lost."""

    def __len__(self) -> int:
        return len(self.indices)


def write_shard(
    path: Path,
    kind: Kind,
    dtype: "np.dtype[np.unsignedinteger[Any]]",
    samples: Iterable[tuple[Tokens, ...]],
    tokenizer: TextTokenizer | None = None,
) -> ShardInfo:
    """Write a shard beside, sync it and rename it: a file of this name is always whole.

    The bytes depend on the samples alone (no times, no user names), so that a repeated preparation is
    identical.

    Args:
        path: Where the shard goes.
        kind: Fields of a sample.
        dtype: Type of tokens on disk; `RAW` writes text.
        samples: One array of tokens for each field; of `RAW`, of UTF-8 bytes.
        tokenizer: Counts the tokens of `RAW`; not used otherwise.
    """
    # webdataset imports torch (2 s), which neither the command line nor the tokenising processes need.
    import webdataset

    names = (RAW_FIELDS if dtype == RAW else TOKEN_FIELDS)[kind]
    partial = path.with_name(path.name + ".partial")
    # A time of 0.0 instead of 0 would cost three more tar blocks a member, and half of the reading speed.
    n_samples, n_tokens, rest = 0, [0, 0], iter(samples)
    with partial.open("wb") as file:
        with webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="", compress=False) as tar:
            while batch := list(islice(rest, _BATCH)):
                for sample in batch:
                    contents = (np.ascontiguousarray(field, dtype).tobytes() for field in sample)
                    tar.write({"__key__": f"{n_samples:09d}", **dict(zip(names, contents, strict=True))})
                    n_samples += 1
                for i in range(len(names)):
                    column = [sample[i] for sample in batch]
                    n_tokens[i] += _count_tokens(column, tokenizer) if dtype == RAW else sum(map(len, column))
        file.flush()
        os.fsync(file.fileno())
    # The largest vocabulary, and no decoding: members are only counted.
    layout = SampleLayout(kind, np.dtype("<u4"), 2**32, is_raw=dtype == RAW)
    with partial.open("rb") as file:
        reader = ShardReader(str(path), file, layout)
        marks = reader.scan()
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if reader.position != n_samples:
        raise DataError(f"shard {partial} was written and cannot be read back: see to its disk")
    info = ShardInfo(path.name, n_samples, partial.stat().st_size, digest, n_tokens[0], n_tokens[1], marks)
    partial.replace(path)
    return info


def _count_tokens(texts: list[Tokens], tokenizer: TextTokenizer | None) -> int:
    assert tokenizer is not None, "raw shards need a tokenizer that counts their tokens"
    return sum(map(len, tokenizer.encode_batch([text.tobytes().decode() for text in texts])))


class _Group(NamedTuple):
    """The members of a sample."""

    key: str
    header: int
    """Where the first of them begins."""
    members: list[Member | None]
    problem: str
    """What is wrong with it; else empty."""


class _Placed(NamedTuple):
    """A member and what the layout makes of its name."""

    member: Member
    key: str
    number: int | None
    problem: str


class ShardReader:
    """Sequential reader of one shard; holds the file open, and nothing else between windows.

    Args:
        name: What messages call the shard.
        file: The open tar; None: it could not be opened (policy `skip`), and all its samples are lost.
        layout: What a sample is.
        n_samples: What the manifest says; a shard that ends earlier is truncated.
        marks: Where samples `MARK_EVERY`, 2 `MARK_EVERY`, ... begin.
        skip_bad: Leave out what is damaged and count it, instead of raising.
        problem: Why there is no file.
    """

    def __init__(
        self,
        name: str,
        file: BinaryIO | None,
        layout: SampleLayout,
        n_samples: int | None = None,
        marks: tuple[int, ...] = (),
        skip_bad: bool = False,
        problem: str = "",
    ) -> None:
        self.name, self.layout, self.n_samples = name, layout, n_samples
        self.position = 0
        """Samples read or skipped so far, lost ones counted."""
        self._file, self._marks, self._skip_bad = file, marks, skip_bad
        self._tar = None if file is None else TarReader(file)
        self._problem = problem
        self._ahead: _Placed | None = None
        self._damage = ""

    def skip(self, n_samples: int) -> None:
        """Move on without reading what is passed."""
        end = self._end(n_samples)
        mark = min(end // MARK_EVERY, len(self._marks))
        if self._tar is not None and mark * MARK_EVERY > self.position:
            self._tar.seek(self._marks[mark - 1])
            self._ahead, self.position = None, mark * MARK_EVERY
        while self.position < end and self._next_group() is not None:
            self.position += 1
        self._rest(end)

    def read(self, n_samples: int) -> RawWindow:
        """The next samples, fewer at the end of the shard.

        Raises:
            DataError: the tar is truncated or holds something else; shard and key are named. Not under policy
                `skip`, where the window counts what is lost.
        """
        first, end = self.position, self._end(n_samples)
        rows: list[tuple[bytes, ...]] = []
        keys: list[str] = []
        places: list[int] = []
        problem = ""
        while self.position < end and (group := self._next_group()) is not None:
            if group.problem:
                problem = problem or self._bad_sample(group.key, group.problem)
            elif (row := self._contents(group)) is None:
                break
            else:
                rows.append(row)
                keys.append(group.key)
                places.append(self.position)
            self.position += 1
        self._rest(end)
        fields, problems = decode(rows, self.layout)
        if problems:
            number, what = problems[0]
            problem = problem or self._bad_sample(keys[number], what)
            bad = {number for number, _ in problems}
            places = [place for i, place in enumerate(places) if i not in bad]
            fields, _ = decode([row for i, row in enumerate(rows) if i not in bad], self.layout)
        n_bad = self.position - first - len(places)
        indices = np.array(places, np.int64)
        return RawWindow(first, fields, indices, n_bad, (problem or self._problem) if n_bad else "")

    def scan(self) -> tuple[int, ...]:
        """Pass over the whole shard; returns the `marks` of its samples. `position` is then their number.

        Raises:
            DataError: the tar is damaged.
        """
        marks = []
        while (group := self._next_group()) is not None:
            if self.position and self.position % MARK_EVERY == 0:
                marks.append(group.header)
            self.position += 1
        return tuple(marks)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _end(self, n_samples: int) -> int:
        end = self.position + n_samples
        return end if self.n_samples is None else min(end, self.n_samples)

    def _rest(self, end: int) -> None:
        """What is true after samples up to `end` were asked for: they were there, or they are lost."""
        if self._tar is not None:
            self._tar.release()
        if self.n_samples is not None and self.position < end:
            self._lose(f"ends after {self.position} of {self.n_samples} samples")
            self.position = end

    def _bad_sample(self, key: str, what: str) -> str:
        sentence = f"shard {self.name}, key {key}: {what}: {_MEND}"
        if not self._skip_bad:
            raise DataError(sentence)
        return sentence

    def _lose(self, what: str) -> None:
        """Nothing more can be read."""
        self._tar = None
        self._problem = self._problem or f"shard {self.name} {what}: {_MEND}"
        if not self._skip_bad:
            raise DataError(self._problem)

    def _contents(self, group: _Group) -> tuple[bytes, ...] | None:
        assert self._tar is not None
        try:
            return tuple([self._tar.read(member) for member in group.members if member is not None])
        except (TarDamageError, OSError) as error:
            self._lose(f"is damaged after sample {self.position} ({error})")
            return None

    def _next_group(self) -> _Group | None:
        """The members that stand next to each other with one key."""
        first = placed = self._ahead or self._take()
        members: list[Member | None] = [None] * len(self.layout.members)
        problem = ""
        while first is not None and placed is not None and placed.key == first.key:
            number = placed.number
            if number is None:
                problem = problem or placed.problem
            elif members[number] is not None:
                problem = problem or f"{self.layout.members[number]} occurs twice"
            else:
                members[number] = placed.member
            placed = self._take()
        self._ahead = placed
        if first is None or (self._damage and None in members):
            if self._damage:
                self._lose(f"is damaged after sample {self.position} ({self._damage})")
            return None
        for name, member in zip(self.layout.members, members, strict=True):
            if member is None:
                problem = problem or f"{first.key}.{name} is missing"
            elif member.size > _LARGEST_MEMBER:
                problem = problem or f"{name} has {member.size} bytes, more than {_LARGEST_MEMBER}"
        return _Group(first.key, first.member.header, members, problem)

    def _take(self) -> _Placed | None:
        """The next member that the layout does not pass over; None at the end, or where the tar is damaged."""
        if self._tar is None or self._damage:
            return None
        try:
            while (member := self._tar.next()) is not None:
                key, number, problem = self.layout.place(member.name)
                if number is not None or problem:
                    return _Placed(member, key, number, problem)
        except (TarDamageError, OSError) as error:
            self._damage = str(error)
        return None


@dataclass(frozen=True)
class ShardSet:
    """The shards of a split and how to open them: plain values, so that it travels to loader workers."""

    root: str
    """What messages call the folder."""
    infos: tuple[ShardInfo, ...]
    layout: SampleLayout
    remote: RemoteConfig
    skip_bad: bool

    @classmethod
    def build(cls, manifest: Manifest, split: Split, data: DataConfig) -> "ShardSet":
        """The shards of a split of a prepared folder.

        Args:
            manifest: Of the folder.
            split: Which of its splits.
            data: Says what becomes of bad shards (`on_bad_shard`) and where remote ones are kept (`remote`).
        """
        layout = SampleLayout.of(manifest)
        return cls(manifest.name, manifest.shards(split), layout, data.remote, data.on_bad_shard == "skip")

    def __len__(self) -> int:
        return len(self.infos)

    def location(self, shard: int) -> str:
        """What messages call a shard."""
        return self.infos[shard].location

    def open(self, shard: int) -> ShardReader:
        """A reader at the start of a shard; a remote one is fetched, unless this machine has it already.

        Raises:
            DataError: it cannot be opened or fetched. Not under policy `skip`: then all its samples are lost.
        """
        info, file, problem = self.infos[shard], None, ""
        try:
            file = self._open_file(info)
        except DataError as error:
            if not self.skip_bad:
                raise
            problem = str(error)
        return ShardReader(
            info.location, file, self.layout, info.n_samples, info.marks, self.skip_bad, problem
        )

    def prefetch(self, shard: int) -> None:
        """Have a shard that will be wanted soon fetched in the background; nothing to do for a local one."""
        info = self.infos[shard]
        if is_url(info.base):
            fetchers(self.remote).ask(info.location, info.bytes, info.sha256)

    def samples(self, shard: int) -> Iterator[tuple[Tokens, ...]]:
        """Each sample of a shard as arrays of tokens, one for each field."""
        reader = self.open(shard)
        try:
            while reader.position < self.infos[shard].n_samples:
                window = reader.read(_BATCH)
                ends = [np.cumsum(lengths) for _, lengths in window.fields]
                for i in range(len(window)):
                    yield tuple(
                        flat[end[i] - lengths[i] : end[i]]
                        for (flat, lengths), end in zip(window.fields, ends, strict=True)
                    )
        finally:
            reader.close()

    def _open_file(self, info: ShardInfo) -> BinaryIO:
        refuse_commands(info.location)
        if is_url(info.base):
            return ShardCache(self.remote).open(info.location, info.bytes, info.sha256)
        try:
            return Path(info.location).open("rb", buffering=0)
        except OSError as error:
            raise DataError(f"shard {info.location} cannot be opened ({error.strerror}): {_MEND}") from error
