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
from functools import cached_property
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dist_transformer.config.data import DataConfig, RemoteConfig
from dist_transformer.data.cache import ShardCache, fetchers
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
from dist_transformer.data.reader import RawWindow, ShardReader
from dist_transformer.data.tar_writer import TarWriter
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.errors import DataError

__all__ = ["RAW", "RawWindow", "ShardReader", "ShardSet", "write_shard"]

RAW = np.dtype("u1")
"""As the `dtype` of `write_shard`: samples are UTF-8 text."""
_BATCH = 1000


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
    names = (RAW_FIELDS if dtype == RAW else TOKEN_FIELDS)[kind]
    partial = path.with_name(path.name + ".partial")
    n_samples, n_tokens, rest = 0, [0, 0], iter(samples)
    marks: list[int] = []
    with partial.open("wb") as file:
        tar = TarWriter(file)
        while batch := list(islice(rest, _BATCH)):
            for sample in batch:
                if n_samples and n_samples % MARK_EVERY == 0:
                    marks.append(tar.position)
                for name, field in zip(names, sample, strict=True):
                    tar.write(f"{n_samples:09d}.{name}", np.ascontiguousarray(field, dtype).tobytes())
                n_samples += 1
            for i in range(len(names)):
                column = [sample[i] for sample in batch]
                n_tokens[i] += _count_tokens(column, tokenizer) if dtype == RAW else sum(map(len, column))
        tar.close()
        file.flush()
        os.fsync(file.fileno())
    with partial.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = partial.stat().st_size
    info = ShardInfo(path.name, n_samples, size, digest, n_tokens[0], n_tokens[1], tuple(marks))
    partial.replace(path)
    return info


def _count_tokens(texts: list[Tokens], tokenizer: TextTokenizer | None) -> int:
    assert tokenizer is not None, "raw shards need a tokenizer that counts their tokens"
    return sum(map(len, tokenizer.encode_batch([text.tobytes().decode() for text in texts])))


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
            file = self.open_file(shard)
        except DataError as error:
            if not self.skip_bad:
                raise
            problem = str(error)
        return ShardReader(
            info.location, file, self.layout, info.n_samples, info.marks, self.skip_bad, problem
        )

    @cached_property
    def is_remote(self) -> bool:
        """Whether any shard is fetched before it is read."""
        return any(is_url(info.base) for info in self.infos)

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

    def open_file(self, shard: int) -> FileIO:
        """The shard's tar, open for reading.

        Raises:
            DataError: it cannot be opened or fetched.
        """
        info = self.infos[shard]
        refuse_commands(info.location)
        if is_url(info.base):
            return ShardCache(self.remote).open(info.location, info.bytes, info.sha256)
        try:
            return Path(info.location).open("rb", buffering=0)
        except OSError as error:
            raise DataError(
                f"shard {info.location} cannot be opened ({error.strerror}): {self.layout.how_to_mend}"
            ) from error
