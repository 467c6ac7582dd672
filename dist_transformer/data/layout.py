"""What a sample looks like inside a shard: which members it has, and which names are refused."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dist_transformer.data.manifest import RAW_FIELDS, TOKEN_FIELDS, Kind, Manifest

_OWN_KEY = re.compile(r"[0-9A-Za-z_-]+")
PICKLES = {"pkl", "pickle", "pyd", "pth", "pt"}


@dataclass(frozen=True)
class SampleLayout:
    """The members of a sample, by manifest: plain values, so that it travels to loader workers."""

    kind: Kind
    dtype: "np.dtype[np.unsignedinteger[Any]]"
    """Type of tokens: of those in the shard, or of those that its text becomes."""
    vocab_size: int
    """Tokens are below it."""
    is_raw: bool = False
    """Members hold UTF-8 text, not token ids."""
    foreign_fields: tuple[str, ...] = ()
    """Of tars that others wrote: the member's name for each field, or `NAME:KEY` for a string in a JSON object
    (`NAME:KEY.KEY` for one in an object in it)."""
    tokenizer_path: Path | None = None
    """What turns text into tokens; needed where `is_raw`."""

    @classmethod
    def of(cls, manifest: Manifest) -> "SampleLayout":
        """The layout of a prepared folder."""
        return cls(
            manifest.kind,
            manifest.dtype,
            manifest.vocab_size,
            manifest.samples == "raw",
            manifest.fields,
            manifest.tokenizer_path,
        )

    @cached_property
    def fields(self) -> tuple[tuple[int, str | None], ...]:
        """For each field (the document; or source, target), the number of its member and its JSON key."""
        if not self.foreign_fields:
            return tuple((i, None) for i in range(len(self.members)))
        parts = [field.partition(":") for field in self.foreign_fields]
        return tuple((self.members.index(name), key or None) for name, _, key in parts)

    @cached_property
    def members(self) -> tuple[str, ...]:
        """Names of a sample's members, behind `KEY.`; each once."""
        if self.foreign_fields:
            return tuple(dict.fromkeys(field.partition(":")[0] for field in self.foreign_fields))
        return (RAW_FIELDS if self.is_raw else TOKEN_FIELDS)[self.kind]

    @property
    def how_to_mend(self) -> str:
        """The end of a sentence about a damaged shard."""
        if self.foreign_fields:
            return "mend the tar, or write the index again without it"
        return "copy it again or prepare with --overwrite"

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.members)}

    def place(self, name: str) -> tuple[str, int | None, str]:
        """Key of a member's sample, its number among `members`, and why it is refused (else empty).

        In tars that others wrote, members of other names have no number and are no fault. In our own there is
        nothing else, so whatever else is found is refused.
        """
        slash = name.rfind("/") + 1
        stem, _, extension = name[slash:].partition(".")
        key, number = name[:slash] + stem, self._numbers.get(extension)
        if (slash or "\\" in name) and (name[0] in "/\\" or ".." in re.split(r"[/\\]", name)):
            return key, None, f"it holds {name!r}, a name that leads out of its folder: it is refused"
        if self.foreign_fields:
            return key, number, ""
        if number is not None and _OWN_KEY.fullmatch(key):
            return key, number, ""
        return key, None, self._refusal(name)

    def _refusal(self, name: str) -> str:
        if name.rsplit(".", 1)[-1].lower() in PICKLES:
            return f"it holds the pickle {name!r}: loading one can run any code; it is refused"
        expected = " and ".join(f"KEY.{member}" for member in self.members)
        return f"it holds {name!r}, which is no member of a {self.kind} shard ({expected}): it is refused"
