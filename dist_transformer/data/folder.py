"""The folder that preparation writes: whose it is, what it was begun with, whether it may be continued."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_transformer.data.documents import Scan
from dist_transformer.data.inputs import Reading
from dist_transformer.data.manifest import MANIFEST_NAME, PREPARATION_NAME, Kind, write_atomically
from dist_transformer.data.shares import Share
from dist_transformer.data.tokenizer import Model
from dist_transformer.errors import DataError

WORK_NAME = ".work"
_OWN = re.compile(r"(train|eval)-\d{5,}\.tar|manifest\.json|prepare\.json|tokenizer\.json")


@dataclass(frozen=True)
class Recipe:
    """The arguments that decide what is written."""

    kind: Kind
    reading: Reading
    vocab_size: int
    model: Model
    n_shards: int | None
    held_out: int | None
    max_document_tokens: int
    seed: int
    dedup: bool
    raw: bool

    def check(self) -> None:
        """Raise a `DataError` for values that no preparation can have."""
        if self.n_shards is not None and self.n_shards < 1:
            raise DataError(f"n_shards={self.n_shards}: there must be at least 1")
        if self.held_out is not None and self.held_out < 0:
            raise DataError(f"held_out={self.held_out}: give 0 for no held-out split")
        if self.kind == "text" and self.max_document_tokens < 2:
            raise DataError(f"max_document_tokens={self.max_document_tokens}: there must be at least 2")
        if not all(self.reading.fields):
            raise DataError("the name of a field is empty: give the key of a string in each JSON object")

    def arguments(self, tokenizer_sha256: str | None) -> dict[str, Any]:
        """Every argument by name; `tokenizer_sha256` is that of a tokenizer that was given."""
        arguments = asdict(self)
        arguments |= arguments.pop("reading")
        arguments["fields"] = list(self.reading.fields)
        if tokenizer_sha256 is not None:
            arguments |= {"vocab_size": None, "model": None}
        return arguments | {"tokenizer": tokenizer_sha256}

    def describe(
        self, scans: Sequence[Scan], n_held: int, tokenizer_sha256: str | None, share: Share
    ) -> dict[str, Any]:
        """What `prepare.json` keeps: two preparations with equal descriptions write equal bytes."""
        inputs = [list(pair) for found in scans for pair in zip(found.sizes, found.digests, strict=True)]
        return {
            "format": 1,
            "arguments": self.arguments(tokenizer_sha256) | share.arguments(),
            "inputs": inputs,
            "n_held_out_inputs": n_held,
            "array_inputs": share.inputs,
        }


def claim_folder(out: Path, description: dict[str, Any], overwrite: bool) -> None:
    """Make the folder ready for this preparation, or refuse.

    A new or empty folder is taken; one half-written by the same description is continued; a complete one, or
    one begun with something else, is refused unless `overwrite`; one that holds other things is always
    refused.

    Raises:
        DataError: refused; the sentence says how to go on.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file: give a folder with --out")
    present = {entry.name for entry in out.iterdir()} if out.exists() else set()
    begun = out / PREPARATION_NAME
    is_ours = PREPARATION_NAME in present or MANIFEST_NAME in present
    if present - {WORK_NAME} and not is_ours:
        raise DataError(f"{out} holds other things ({min(present)}): give a new or empty folder with --out")
    if is_ours and not overwrite:
        if MANIFEST_NAME in present:
            raise DataError(f"{out} is already prepared: use another --out or --overwrite")
        if read_description(begun) == description:
            return
        difference = describe_difference(read_description(begun), description)
        raise DataError(
            f"{out} was begun with {difference}: run that command again to "
            "finish it, or start over with --overwrite"
        )
    try:
        _clear(out)
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(begun, json.dumps(description, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror}") from error


def _clear(out: Path) -> None:
    """Remove what a preparation wrote, the manifest first: what is left is never taken for complete."""
    if not out.exists():
        return
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    shutil.rmtree(out / WORK_NAME, ignore_errors=True)
    for entry in out.iterdir():
        if _OWN.fullmatch(entry.name.removesuffix(".partial")):
            entry.unlink()


def read_description(path: Path) -> dict[str, Any]:
    """What `Recipe.describe` gave when a folder was begun; empty where that cannot be read."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content


def describe_difference(begun: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What a folder was begun with that is not wanted now."""
    old, new = begun.get("arguments", {}), wanted["arguments"]
    changed = [f"{name}={old.get(name)} (now {new[name]})" for name in new if old.get(name) != new[name]]
    return "other arguments: " + ", ".join(changed) if changed else "other input files"
