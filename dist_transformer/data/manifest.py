"""The manifest of a folder of shards: what is in it, and the checks made before anything reads it."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dist_transformer.errors import DataError

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
PREPARATION_NAME = "prepare.json"
FORMAT = 1

Kind = Literal["text", "pairs"]
Split = Literal["train", "eval"]
DTYPES: dict[str, "np.dtype[np.unsignedinteger[Any]]"] = {"u16": np.dtype("<u2"), "u32": np.dtype("<u4")}
"""Token types of shards: little-endian whatever the machine."""


@dataclass(frozen=True)
class ShardInfo:
    """One shard file and what it holds; tokens are counted without EOS."""

    file: str
    n_samples: int
    bytes: int
    sha256: str
    n_source_tokens: int
    """Tokens of the sources (kind pairs) or of the documents (kind text)."""
    n_target_tokens: int
    """Tokens of the targets; 0 for kind text."""


@dataclass(frozen=True)
class Manifest:
    """A prepared folder: `manifest.json`, shards and tokenizer."""

    root: Path
    kind: Kind
    train: tuple[ShardInfo, ...]
    eval: tuple[ShardInfo, ...]
    tokenizer_sha256: str
    vocab_size: int
    token_dtype: str
    counts: dict[str, int] = field(default_factory=dict)
    """What preparation skipped and split, for people."""

    @property
    def dtype(self) -> "np.dtype[np.unsignedinteger[Any]]":
        """Type of the tokens in the shards."""
        return DTYPES[self.token_dtype]

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer that made the shards."""
        return self.root / TOKENIZER_NAME

    def shards(self, split: Split) -> tuple[ShardInfo, ...]:
        """The shards of a split."""
        return self.train if split == "train" else self.eval

    def fingerprint(self) -> str:
        """Identity of the training data: equal exactly when the train shards are, in content and order."""
        listing = [[s.sha256, s.n_samples] for s in self.train]
        return hashlib.sha256(json.dumps([self.kind, self.token_dtype, listing]).encode()).hexdigest()[:32]

    def save(self) -> None:
        """Write `manifest.json` in one step: it is either whole or absent."""
        content = {
            "format": FORMAT,
            "kind": self.kind,
            "token_dtype": self.token_dtype,
            "vocab_size": self.vocab_size,
            "tokenizer": {"file": TOKENIZER_NAME, "sha256": self.tokenizer_sha256},
            "counts": self.counts,
            "totals": {split: _totals(self.shards(split)) for split in ("train", "eval")},
            "splits": {split: [asdict(s) for s in self.shards(split)] for split in ("train", "eval")},
        }
        write_atomically(self.root / MANIFEST_NAME, json.dumps(content, indent=1) + "\n")


def _totals(shards: tuple[ShardInfo, ...]) -> dict[str, int]:
    keys = ("n_samples", "bytes", "n_source_tokens", "n_target_tokens")
    return {"n_shards": len(shards)} | {key: sum(getattr(s, key) for s in shards) for key in keys}


def write_atomically(path: Path, text: str) -> None:
    """Write a small file beside and rename it, so that a crash leaves the old one or the new one whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_manifest(folder: str | Path) -> Manifest:
    """Read a prepared folder's manifest and check that its files are there and whole (by size, not by hash).

    Raises:
        DataError: the folder, its manifest, a shard or the tokenizer is missing or does not fit the others.
    """
    if "://" in str(folder) or str(folder).startswith("pipe:"):
        raise DataError(
            f"{folder}: shards are read from local folders only; copy them to a local or shared disk"
        )
    root = Path(folder)
    if not root.is_dir():
        found = "is a file, not a folder" if root.exists() else "does not exist"
        raise DataError(f"shard folder {root} {found}: write one with `dist-transformer prepare`")
    path = root / MANIFEST_NAME
    if not path.is_file():
        if (root / PREPARATION_NAME).exists():
            raise DataError(
                f"{root} is half-written (no {MANIFEST_NAME} yet): run the same `dist-transformer prepare` "
                "command again to finish it"
            )
        raise DataError(
            f"{root} has no {MANIFEST_NAME}: prepare it with `dist-transformer prepare ... --out {root}`"
        )
    manifest = _parse(root, path)
    if not manifest.train and not manifest.eval:
        raise DataError(f"{path} lists no shards: prepare the folder again with --overwrite")
    for shard in (*manifest.train, *manifest.eval):
        _check_shard(root, shard)
    _check_tokenizer(manifest)
    return manifest


def _parse(root: Path, path: Path) -> Manifest:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("format") != FORMAT:
            raise DataError(
                f"{path} has format {content.get('format')}, this version reads {FORMAT}: prepare the "
                "folder again with --overwrite"
            )
        splits = {
            split: tuple(ShardInfo(**shard) for shard in content["splits"].get(split, ()))
            for split in ("train", "eval")
        }
        manifest = Manifest(
            root=root,
            kind=content["kind"],
            train=splits["train"],
            eval=splits["eval"],
            tokenizer_sha256=content["tokenizer"]["sha256"],
            vocab_size=int(content["vocab_size"]),
            token_dtype=content["token_dtype"],
            counts=dict(content.get("counts", {})),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {error}): prepare the folder again with --overwrite"
        ) from error
    if manifest.kind not in ("text", "pairs") or manifest.token_dtype not in DTYPES:
        raise DataError(f"{path} has unknown kind {manifest.kind!r} or token_dtype {manifest.token_dtype!r}")
    return manifest


def _check_shard(root: Path, shard: ShardInfo) -> None:
    name = shard.file
    if "/" in name or "\\" in name or ":" in name or name.startswith("."):
        raise DataError(
            f"{root / MANIFEST_NAME} lists shard {name!r}: only plain file names of the same folder are read"
        )
    path = root / name
    if not path.is_file():
        raise DataError(
            f"shard {path} is listed in {MANIFEST_NAME} but missing: copy it again or prepare with "
            "--overwrite"
        )
    size = path.stat().st_size
    if size == 0 or shard.n_samples < 1:
        raise DataError(f"shard {path} is empty: copy it again or prepare with --overwrite")
    if size != shard.bytes:
        raise DataError(
            f"shard {path} has {size} bytes, {MANIFEST_NAME} says {shard.bytes}: copy it again or prepare "
            "with --overwrite"
        )


def _check_tokenizer(manifest: Manifest) -> None:
    path = manifest.tokenizer_path
    if not path.is_file():
        raise DataError(f"{path} is missing: copy it from where the shards were prepared")
    if sha256_of(path) != manifest.tokenizer_sha256:
        raise DataError(
            f"the tokenizer does not match the shards: {path} is not the file they were made with; "
            "restore it or prepare again with --overwrite"
        )
