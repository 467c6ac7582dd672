"""A shard read in windows, from any sample on; what is damaged is an error, or left out and counted."""

from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import numpy as np

from dist_transformer.data.decode import decode
from dist_transformer.data.hashing import Int64
from dist_transformer.data.layout import SampleLayout
from dist_transformer.data.manifest import MARK_EVERY
from dist_transformer.data.ragged import Tokens
from dist_transformer.data.tar import Member, TarDamageError, TarReader
from dist_transformer.errors import DataError

_LARGEST_MEMBER = 256 * 2**20


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


class ShardScan(NamedTuple):
    """What the headers of a shard tell."""

    marks: tuple[int, ...]
    """As `ShardInfo.marks`."""
    n_bytes: int
    """Content of all members that belong to samples."""
    n_bad: int
    """Samples that lack a member, or hold one that is refused."""


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
        self.problem = problem
        """Why nothing more can be read; empty while all is well."""
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
        return RawWindow(first, fields, indices, n_bad, (problem or self.problem) if n_bad else "")

    def scan(self, limit: int | None = None) -> "ShardScan":
        """Pass over samples without reading them; all, or up to `limit`. `position` is then behind them.

        Raises:
            DataError: the tar is damaged.
        """
        marks, n_bytes, n_bad = [], 0, 0
        while (limit is None or self.position < limit) and (group := self._next_group()) is not None:
            if self.position and self.position % MARK_EVERY == 0:
                marks.append(group.header)
            n_bad += bool(group.problem)
            n_bytes += sum(member.size for member in group.members if member is not None)
            self.position += 1
        return ShardScan(tuple(marks), n_bytes, n_bad)

    def check_end(self) -> None:
        """After `scan`: raise a `DataError` where the tar lacks its end, as one does that was cut between members."""
        if self._tar is not None and not self._tar.has_end:
            self._lose(f"has no end after sample {self.position}: it is truncated")

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
        sentence = f"shard {self.name}, key {key}: {what}: {self.layout.how_to_mend}"
        if not self._skip_bad:
            raise DataError(sentence)
        return sentence

    def _lose(self, what: str) -> None:
        """Nothing more can be read."""
        self._tar = None
        self.problem = self.problem or f"shard {self.name} {what}: {self.layout.how_to_mend}"
        if not self._skip_bad:
            raise DataError(self.problem)

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
