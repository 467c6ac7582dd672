"""Shards: WebDataset tars of tokenised samples, written whole or not at all, read in windows.

A sample is one member `KEY.tokens` (kind text) or two members `KEY.source` and `KEY.target` (kind pairs),
each the little-endian uint16 or uint32 token ids without EOS. Shards are untrusted input: anything else in
them is refused, nothing in them is executed, and no name in them is used as a path.
"""

import hashlib
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dist_transformer.config.data import DataConfig
from dist_transformer.data.hashing import Int64
from dist_transformer.data.manifest import Kind, Manifest, ShardInfo, Split
from dist_transformer.data.ragged import Tokens
from dist_transformer.errors import DataError

FIELDS: dict[Kind, tuple[str, ...]] = {"text": ("tokens",), "pairs": ("source", "target")}
"""Members of a sample, in the order in which they are written."""

_MEMBER = re.compile(r"([0-9A-Za-z_-]+)\.([a-z]+)")
_PICKLES = {"pkl", "pickle", "pyd", "pth", "pt"}

Sample = tuple[bytes, ...]
"""The raw bytes of a sample's fields, in the order of `FIELDS`."""


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

    def __len__(self) -> int:
        return len(self.indices)


def write_shard(
    path: Path, kind: Kind, dtype: "np.dtype[np.unsignedinteger[Any]]", samples: Iterable[tuple[Tokens, ...]]
) -> ShardInfo:
    """Write a shard beside, sync it and rename it: a file of this name is always whole.

    The bytes depend on the samples alone (no times, no user names), so that a repeated preparation is
    identical.

    Args:
        path: Where the shard goes.
        kind: Fields of a sample; see `FIELDS`.
        dtype: Type of tokens on disk.
        samples: One array for each field.
    """
    # webdataset imports torch (2 s), which neither the command line nor the tokenising processes need.
    import webdataset

    partial = path.with_name(path.name + ".partial")
    # A time of 0.0 instead of 0 would cost three more tar blocks a member, and half of the reading speed.
    n_samples, n_tokens = 0, [0, 0]
    with partial.open("wb") as file:
        with webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="", compress=False) as tar:
            for sample in samples:
                arrays = [np.ascontiguousarray(tokens, dtype) for tokens in sample]
                members = {name: a.tobytes() for name, a in zip(FIELDS[kind], arrays, strict=True)}
                tar.write({"__key__": f"{n_samples:09d}", **members})
                n_samples += 1
                for i, array in enumerate(arrays):
                    n_tokens[i] += len(array)
        file.flush()
        os.fsync(file.fileno())
    with partial.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    info = ShardInfo(path.name, n_samples, partial.stat().st_size, digest, *n_tokens)
    partial.replace(path)
    return info


class ShardReader:
    """Sequential reader of one shard; holds the file open and one window in memory.

    Args:
        path: A local tar; URLs and `pipe:` commands are refused.
        kind: Fields of a sample.
        dtype: Type of the tokens in it.
        vocab_size: Tokens must be below it.
        n_samples: What the manifest says; a shard that ends earlier is truncated.
    """

    def __init__(
        self,
        path: Path,
        kind: Kind,
        dtype: "np.dtype[np.unsignedinteger[Any]]",
        vocab_size: int,
        n_samples: int | None = None,
    ) -> None:
        self.path, self.kind, self.dtype = path, kind, dtype
        self.vocab_size, self.n_samples = vocab_size, n_samples
        self.position = 0
        """Samples read or skipped so far."""
        self._file = open_shard(path)
        self._samples = _iterate_samples(self._file, path, kind)

    def skip(self, n_samples: int) -> None:
        """Move on without keeping what is passed."""
        for _ in range(n_samples):
            self._next()

    def read(self, n_samples: int) -> RawWindow:
        """The next samples, fewer at the end of the shard.

        Raises:
            DataError: the tar is truncated or holds something else; shard and key are named.
        """
        if self.n_samples is not None:
            n_samples = min(n_samples, self.n_samples - self.position)
        first, rows = self.position, []
        for _ in range(n_samples):
            if (sample := self._next()) is None:
                break
            rows.append(sample)
        columns = zip(*rows, strict=True) if rows else [()] * len(FIELDS[self.kind])
        fields = tuple(self._decode(list(column), first) for column in columns)
        return RawWindow(first, fields, first + np.arange(len(rows)))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _next(self) -> Sample | None:
        try:
            sample = next(self._samples, None)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DataError(
                f"shard {self.path} is damaged after sample {self.position} ({error}): copy it again or "
                "prepare with --overwrite"
            ) from error
        if sample is None and self.n_samples is not None and self.position < self.n_samples:
            raise DataError(
                f"shard {self.path} ends after {self.position} of {self.n_samples} samples: copy it again "
                "or prepare with --overwrite"
            )
        self.position += sample is not None
        return sample

    def _decode(self, column: list[bytes], first: int) -> tuple[Tokens, Int64]:
        sizes = np.fromiter(map(len, column), np.int64, len(column))
        if (odd := np.flatnonzero(sizes % self.dtype.itemsize)).size:
            raise DataError(
                f"shard {self.path}, sample {first + int(odd[0])}: {sizes[odd[0]]} bytes are no whole "
                "number of "
                f"{self.dtype.itemsize}-byte tokens: prepare the folder again with --overwrite"
            )
        flat: Tokens = np.frombuffer(b"".join(column), self.dtype)
        lengths = sizes // self.dtype.itemsize
        if flat.size and int(flat.max()) >= self.vocab_size:
            bad = int(np.searchsorted(np.cumsum(lengths), int(flat.argmax()), side="right"))
            raise DataError(
                f"shard {self.path}, sample {first + bad}: token {flat.max()} is outside the vocabulary of "
                f"{self.vocab_size}: the tokenizer does not match the shards; prepare again with --overwrite"
            )
        return flat, lengths


@dataclass(frozen=True)
class ShardSet:
    """The shards of a split and how to open them: plain values, so that it travels to loader workers."""

    root: Path
    kind: Kind
    dtype: "np.dtype[np.unsignedinteger[Any]]"
    vocab_size: int
    infos: tuple[ShardInfo, ...]

    @classmethod
    def build(cls, manifest: Manifest, split: Split, data: DataConfig) -> "ShardSet":
        """The shards of a split of a prepared folder.

        Args:
            manifest: Of the folder.
            split: Which of its splits.
            data: Says what becomes of bad shards (`on_bad_shard`) and where remote ones are kept (`remote`).
        """
        return cls(manifest.root, manifest.kind, manifest.dtype, manifest.vocab_size, manifest.shards(split))

    def __len__(self) -> int:
        return len(self.infos)

    def location(self, shard: int) -> str:
        """What messages call a shard."""
        return str(self.root / self.infos[shard].file)

    def open(self, shard: int) -> ShardReader:
        """A reader at the start of a shard."""
        info = self.infos[shard]
        return ShardReader(self.root / info.file, self.kind, self.dtype, self.vocab_size, info.n_samples)


def open_shard(path: str | Path) -> BinaryIO:
    """Open a local shard for reading.

    Raises:
        DataError: it is a URL or a command, or cannot be opened.
    """
    name = str(path)
    if name.startswith("pipe:") or name.lstrip().startswith("|"):
        raise DataError(
            f"shard {name!r} is a command: shards are untrusted input and pipes are not run; use a file"
        )
    if "://" in name:
        raise DataError(
            f"shard {name} is a URL: only local files are read; copy the shards to a local or shared disk"
        )
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise DataError(f"shard {name} cannot be opened ({error.strerror}): copy it again") from error


def read_shard(
    path: Path, kind: Kind, dtype: "np.dtype[np.unsignedinteger[Any]]"
) -> Iterator[tuple[Tokens, ...]]:
    """Each sample of a shard as arrays of tokens, one for each field of its kind."""
    with open_shard(path) as file:
        reader = _iterate_samples(file, path, kind)
        while True:
            try:
                sample = next(reader, None)
            except (tarfile.TarError, EOFError, OSError) as error:
                raise DataError(f"shard {path} is damaged ({error}): copy it again") from error
            if sample is None:
                return
            yield tuple(np.frombuffer(field, dtype) for field in sample)


def _iterate_samples(file: BinaryIO, path: Path, kind: Kind) -> Iterator[Sample]:
    """Samples of a tar in the order written; the members of a sample stand next to each other."""
    from webdataset.tariterators import tar_file_iterator

    names = FIELDS[kind]
    key = ""
    found: dict[str, bytes] = {}
    for member in tar_file_iterator(file, skip_meta=None):
        new_key, name = _split_name(member["fname"], path, kind)
        if new_key != key:
            if found:
                yield _complete(found, names, path, key)
            key, found = new_key, {}
        if name in found:
            raise DataError(
                f"shard {path}, key {key}: {name} occurs twice: prepare the folder again with --overwrite"
            )
        found[name] = member["data"]
    if found:
        yield _complete(found, names, path, key)


def _split_name(member: str, path: Path, kind: Kind) -> tuple[str, str]:
    match = _MEMBER.fullmatch(member)
    if match and match[2] in FIELDS[kind]:
        return match[1], match[2]
    if member.rsplit(".", 1)[-1].lower() in _PICKLES:
        raise DataError(
            f"shard {path} holds the pickle {member!r}: loading one can run any code; it is refused"
        )
    expected = " and ".join(f"KEY.{name}" for name in FIELDS[kind])
    raise DataError(
        f"shard {path} holds {member!r}, which is no member of a {kind} shard ({expected}): it is refused"
    )


def _complete(found: dict[str, bytes], names: tuple[str, ...], path: Path, key: str) -> Sample:
    for name in names:
        if name not in found:
            raise DataError(
                f"shard {path}, key {key}: {key}.{name} is missing: copy the shard again or prepare with "
                "--overwrite"
            )
    return tuple(found[name] for name in names)
