"""The manifest of a folder of shards: what is in it, and how it is written and read."""

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dist_transformer.config.data import DataConfig
from dist_transformer.data.cache import ShardCache
from dist_transformer.data.locations import (
    check_file_name,
    expand_braces,
    is_url,
    join_location,
    refuse_commands,
)
from dist_transformer.data.remote import fetch_bytes
from dist_transformer.errors import DataError

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
PREPARATION_NAME = "prepare.json"
PARTS_NAME = "parts"
"""Below a folder that several tasks prepare: what each of them writes, until it is merged."""
FORMAT = 1
MARK_EVERY = 1024
"""Samples between two places from which a shard can be read."""

Kind = Literal["text", "pairs"]
Split = Literal["train", "eval"]
SPLITS: tuple[Split, Split] = ("train", "eval")
Storage = Literal["tokens", "raw"]
TOKEN_FIELDS: dict[Kind, tuple[str, ...]] = {"text": ("tokens",), "pairs": ("source", "target")}
"""Members of a tokenised sample, behind `KEY.`, in the order in which they are written."""
RAW_FIELDS: dict[Kind, tuple[str, ...]] = {"text": ("txt",), "pairs": ("source.txt", "target.txt")}
"""Members of a sample that is text still."""
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
    marks: tuple[int, ...] = ()
    """Byte at which every `MARK_EVERY`-th sample begins, the first left out: where reading may start."""
    base: str = ""
    """Folder or URL that holds it; empty in a manifest that lists shards of its own folder."""

    @property
    def location(self) -> str:
        """Path or URL."""
        return join_location(self.base, self.file)


@dataclass(frozen=True)
class Manifest:
    """A prepared folder (`manifest.json`, shards and tokenizer), or several that are read as one."""

    root: Path
    """The folder; the first of several; of a remote one, where its tokenizer is kept on this machine."""
    kind: Kind
    train: tuple[ShardInfo, ...]
    eval: tuple[ShardInfo, ...]
    tokenizer_sha256: str
    vocab_size: int
    token_dtype: str
    counts: dict[str, int] = field(default_factory=dict)
    """What preparation skipped and split, for people."""
    samples: Storage = "tokens"
    """Whether shards hold token ids or text, which loader workers tokenise."""
    fields: tuple[str, ...] = ()
    """Of shards that others wrote: the member that holds each field; empty: our own names."""
    tokenizer_name: str = TOKENIZER_NAME
    """File name of the tokenizer under `root`."""
    location: str = ""
    """What the user called it, for messages; empty: `root`."""

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.location or str(self.root)

    @property
    def dtype(self) -> "np.dtype[np.unsignedinteger[Any]]":
        """Type of the tokens in the shards."""
        return DTYPES[self.token_dtype]

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer that made the shards: always a local file."""
        return self.root / self.tokenizer_name

    def shards(self, split: Split) -> tuple[ShardInfo, ...]:
        """The shards of a split."""
        return self.train if split == "train" else self.eval

    def shares_shards_with(self, other: "Manifest") -> bool:
        """Whether a train shard of one is also the other's: a run must not be measured on what it trains on."""
        return not {s.sha256 for s in self.train}.isdisjoint(s.sha256 for s in other.train)

    def fingerprint(self) -> str:
        """Identity of the training data: equal exactly when the train shards are, in content and order."""
        listing = [[s.sha256, s.n_samples] for s in self.train]
        identity: list[Any] = [self.kind, self.token_dtype, listing]
        if self.samples == "raw":
            identity += [self.tokenizer_sha256, list(self.fields)]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]

    def save(self) -> None:
        """Write `manifest.json` in one step: it is either whole or absent."""
        content = {
            "format": FORMAT,
            "kind": self.kind,
            "samples": self.samples,
            **({"fields": self.fields} if self.fields else {}),
            "token_dtype": self.token_dtype,
            "vocab_size": self.vocab_size,
            "tokenizer": {"file": TOKENIZER_NAME, "sha256": self.tokenizer_sha256},
            "counts": self.counts,
            "totals": {split: _totals(self.shards(split)) for split in SPLITS},
        }
        write_atomically(self.root / MANIFEST_NAME, _with_splits(content, self))


def _with_splits(content: dict[str, Any], manifest: Manifest) -> str:
    """The manifest's text, each shard on a line of its own."""
    blocks = []
    for split in SPLITS:
        entries = [
            {name: value for name, value in asdict(shard).items() if value not in ("", ())}
            for shard in manifest.shards(split)
        ]
        lines = ",".join("\n   " + json.dumps(entry) for entry in entries)
        blocks.append(f'  "{split}": [{lines}\n  ]')
    return json.dumps(content, indent=1)[:-2] + ',\n "splits": {\n' + ",\n".join(blocks) + "\n }\n}\n"


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


def load_manifest(location: str | Path, data: DataConfig | None = None) -> Manifest:
    """Read the manifest of a prepared folder, and check that its files are there and whole (by size).

    Args:
        location: A folder; a brace pattern (`shards/{books,news}`) of several that are read as one; or a URL.
        data: Says where remote files are kept (`remote`), and whether bad shards are an error (`on_bad_shard`);
            None: the defaults.

    Raises:
        DataError: a folder, its manifest, a shard or the tokenizer is missing or does not fit the others. Under
            `on_bad_shard=skip`, shards are not looked at: who reads them counts what is missing.
    """
    data = data or DataConfig(train="")
    parts = [_load_part(place, data) for place in expand_braces(str(location))]
    manifest = parts[0] if len(parts) == 1 else _join(parts, str(location))
    if not manifest.train and not manifest.eval:
        raise DataError(
            f"{manifest.name}: {MANIFEST_NAME} lists no shards: prepare the folder again with --overwrite"
        )
    return manifest


def _load_part(place: str, data: DataConfig) -> Manifest:
    if is_url(place):
        path = join_location(place, MANIFEST_NAME)
        cache = ShardCache(data.remote)
        manifest = _parse(fetch_bytes(path, data.remote), path, cache.tokenizers, place)
        name = cache.keep_tokenizer(join_location(place, TOKENIZER_NAME), manifest.tokenizer_sha256)
        manifest = replace(manifest, tokenizer_name=name)
    else:
        root = Path(place)
        path = str(root / MANIFEST_NAME)
        manifest = _parse(_read_local(root), path, root, place)
        _check_tokenizer(manifest)
    if data.on_bad_shard == "error":
        _check_shards((*manifest.train, *manifest.eval))
    return manifest


def _read_local(root: Path) -> bytes:
    if not root.is_dir():
        found = "is a file, not a folder" if root.exists() else "does not exist"
        raise DataError(f"shard folder {root} {found}: write one with `dist-transformer prepare`")
    try:
        return (root / MANIFEST_NAME).read_bytes()
    except FileNotFoundError:
        if (root / PARTS_NAME).is_dir():
            raise DataError(
                f"{root} was prepared by several tasks, and its parts are not merged yet: run "
                f"`dist-transformer prepare merge {root}` when all of them are done"
            ) from None
        if (root / PREPARATION_NAME).exists():
            raise DataError(
                f"{root} is half-written (no {MANIFEST_NAME} yet): run the same `dist-transformer prepare` "
                "command again to finish it"
            ) from None
        raise DataError(
            f"{root} has no {MANIFEST_NAME}: prepare it with `dist-transformer prepare ... --out {root}`"
        ) from None
    except OSError as error:
        raise DataError(f"{root / MANIFEST_NAME} cannot be read ({error.strerror})") from error


def _join(parts: list[Manifest], location: str) -> Manifest:
    """Several folders as one corpus."""
    first = parts[0]
    for name, what in (
        ("kind", "kinds"),
        ("tokenizer_sha256", "tokenizers"),
        ("samples", "storage (raw text and tokens)"),
        ("token_dtype", "token types"),
        ("fields", "members"),
    ):
        for part in parts[1:]:
            if getattr(part, name) != getattr(first, name):
                raise DataError(
                    f"{location}: {first.name} and {part.name} have different {what}: prepare both alike, or "
                    "name them apart in data.mixture"
                )
    train = tuple(shard for part in parts for shard in part.train)
    held_out = tuple(shard for part in parts for shard in part.eval)
    counts = {name: sum(part.counts.get(name, 0) for part in parts) for name in first.counts}
    return replace(first, train=train, eval=held_out, counts=counts, location=location)


def _parse(text: bytes, path: str, root: Path, place: str) -> Manifest:
    """The manifest in a file's content.

    Args:
        text: The content.
        path: What messages call the file.
        root: Where its tokenizer is.
        place: Folder or URL that it lists the shards of.
    """
    try:
        content = json.loads(text.decode("utf-8"))
        if content.get("format") != FORMAT:
            raise DataError(
                f"{path} has format {content.get('format')}, this version reads {FORMAT}: prepare the "
                "folder again with --overwrite"
            )
        splits = {
            split: tuple(_parse_shard(entry, path, place) for entry in content["splits"].get(split, ()))
            for split in SPLITS
        }
        manifest = Manifest(
            root=root,
            kind=content["kind"],
            train=splits["train"],
            eval=splits["eval"],
            tokenizer_sha256=_digest(content["tokenizer"]["sha256"]),
            vocab_size=int(content["vocab_size"]),
            token_dtype=content["token_dtype"],
            counts=dict(content.get("counts", {})),
            samples=content.get("samples", "tokens"),
            fields=tuple(map(str, content.get("fields", ()))),
            location=place,
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {error}): prepare the folder again with --overwrite"
        ) from error
    for name, known in (("kind", TOKEN_FIELDS), ("token_dtype", DTYPES), ("samples", ("tokens", "raw"))):
        if (value := getattr(manifest, name)) not in known:
            raise DataError(
                f"{path} has {name}={value!r}, which this version does not know: it was written by another one"
            )
    return manifest


def _parse_shard(entry: dict[str, Any], path: str, place: str) -> ShardInfo:
    check_file_name(entry["file"], path)
    shard = ShardInfo(**{**entry, "marks": tuple(map(int, entry.get("marks", ())))})
    _digest(shard.sha256)
    counts = (shard.n_samples, shard.bytes, shard.n_source_tokens, shard.n_target_tokens, *shard.marks)
    if not all(isinstance(n, int) and n >= 0 for n in counts) or list(shard.marks) != sorted(shard.marks):
        raise ValueError(f"the numbers of {shard.file} cannot be")
    if not shard.base:
        return replace(shard, base=place)
    # Written by `data index` on this machine. A manifest from elsewhere must not decide what is opened here.
    if is_url(place):
        raise DataError(
            f"{path} lists shard {shard.file!r} under {shard.base}: one that is not on this machine may only "
            "list shards of its own folder"
        )
    refuse_commands(shard.base)
    return shard


def _digest(text: str) -> str:
    """A sha256 as text; it also names files of the cache."""
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise ValueError(f"{text!r} is no sha256")
    return text


def _check_shards(shards: tuple[ShardInfo, ...]) -> None:
    for shard in shards:
        if shard.n_samples < 1 or shard.bytes < 1:
            raise DataError(f"shard {shard.location} is empty: copy it again or prepare with --overwrite")
    local = [shard for shard in shards if not is_url(shard.base)]
    # A thousand answers of a shared disk are awaited together.
    with ThreadPoolExecutor(16) as pool:
        for problem in pool.map(_problem, local):
            if problem:
                raise DataError(f"shard {problem}: copy it again or prepare with --overwrite")


def _problem(shard: ShardInfo) -> str:
    path = Path(shard.location)
    if not path.is_file():
        return f"{path} is listed in {MANIFEST_NAME} but missing"
    size = path.stat().st_size
    if size == 0:
        return f"{path} is empty"
    return "" if size == shard.bytes else f"{path} has {size} bytes, {MANIFEST_NAME} says {shard.bytes}"


def _check_tokenizer(manifest: Manifest) -> None:
    path = manifest.tokenizer_path
    if not path.is_file():
        raise DataError(f"{path} is missing: copy it from where the shards were prepared")
    if sha256_of(path) != manifest.tokenizer_sha256:
        raise DataError(
            f"the tokenizer does not match the shards: {path} is not the file they were made with; "
            "restore it or prepare again with --overwrite"
        )
