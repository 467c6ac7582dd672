"""Tars that others wrote become a corpus where they are: a manifest that lists them, and a tokenizer."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dist_transformer.config.data import RemoteConfig
from dist_transformer.data.cache import ShardCache
from dist_transformer.data.layout import PICKLES, SampleLayout
from dist_transformer.data.locations import check_file_name, expand_braces, is_url
from dist_transformer.data.manifest import MANIFEST_NAME, TOKENIZER_NAME, Kind, Manifest, ShardInfo
from dist_transformer.data.pool import Workers
from dist_transformer.data.reader import ShardReader
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.errors import DataError

_EXAMPLES = 1000
"""Samples of each tar whose tokens are counted; those of the rest are estimated from their bytes."""


@dataclass(frozen=True)
class IndexSummary:
    """What was found."""

    manifest: Manifest
    n_bad: int
    """Samples that lack a member."""


@dataclass(frozen=True)
class _Found:
    info: ShardInfo
    n_bad: int


def index_tars(
    tars: Sequence[str],
    out: Path,
    *,
    fields: tuple[str, ...],
    tokenizer: str | Path,
    eval_tars: Sequence[str] = (),
    n_workers: int = 1,
    overwrite: bool = False,
    remote: RemoteConfig | None = None,
    advance: Callable[[int], Any] = lambda _: None,
) -> IndexSummary:
    """Write a folder with a manifest of existing WebDataset tars; the tars stay where they are.

    Args:
        tars: Paths and URLs, with brace patterns.
        out: Folder to write.
        fields: The member that holds each field: one for text, two for pairs; `json:KEY` for a text in an object.
        tokenizer: A `tokenizer.json`.
        eval_tars: Tars that are held out.
        n_workers: Processes.
        overwrite: Replace a manifest that is there.
        remote: How tars under URLs are fetched; they stay in its cache. None: the defaults.
        advance: Called with 1 for each tar that is done.

    Raises:
        DataError: a tar cannot be read or holds no such member, or the folder is in use.
    """
    remote = remote or RemoteConfig()
    _check_fields(fields)
    _check_folder(out, overwrite)
    text_tokenizer = TextTokenizer.load(tokenizer)
    train, held_out = expand_tars(tars), expand_tars(eval_tars)
    if both := sorted(set(train) & set(held_out)):
        raise DataError(f"{both[0]} is given for training and for evaluation: name it once")
    kind: Kind = "text" if len(fields) == 1 else "pairs"
    dtype = "u16" if text_tokenizer.vocab_size <= 2**16 else "u32"
    layout = SampleLayout(
        kind, np.dtype("<u4"), text_tokenizer.vocab_size, True, fields, Path(tokenizer).absolute()
    )
    found: dict[str, _Found] = {}
    with Workers(n_workers) as workers:
        for place, result in workers.run(partial(_index_tar, layout=layout, remote=remote), train + held_out):
            found[place] = result
            advance(1)
    out.mkdir(parents=True, exist_ok=True)
    text_tokenizer.save(out / TOKENIZER_NAME)
    manifest = Manifest(
        root=out,
        kind=kind,
        train=tuple(found[place].info for place in train),
        eval=tuple(found[place].info for place in held_out),
        tokenizer_sha256=text_tokenizer.sha256,
        vocab_size=text_tokenizer.vocab_size,
        token_dtype=dtype,
        samples="raw",
        fields=fields,
    )
    manifest.save()
    return IndexSummary(manifest, sum(result.n_bad for result in found.values()))


def expand_tars(patterns: Sequence[str]) -> list[str]:
    """The tars that patterns name: URLs as they are, paths made absolute."""
    places = [place for pattern in patterns for place in expand_braces(pattern)]
    places = [place if is_url(place) else str(Path(place).absolute()) for place in places]
    for place in places:
        check_file_name(place.rsplit("/", 1)[-1], "the command line")
    if len(set(places)) < len(places):
        raise DataError("a tar is named twice")
    return places


def _check_fields(fields: tuple[str, ...]) -> None:
    for field in fields:
        name, colon, key = field.partition(":")
        if not name or "/" in name or (colon and not (key and name.rsplit(".", 1)[-1] == "json")):
            raise DataError(
                f"field {field!r}: give a member's name behind its key, such as txt, or json:text for the text "
                "in a JSON object"
            )
        if name.rsplit(".", 1)[-1].lower() in PICKLES:
            raise DataError(f"field {field!r}: pickles are never loaded, since that can run any code")
    if len(set(fields)) < len(fields):
        raise DataError(f"source and target are both {fields[0]!r}: name two fields")


def _check_folder(out: Path, overwrite: bool) -> None:
    present = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
    if others := present - {MANIFEST_NAME, TOKENIZER_NAME}:
        raise DataError(f"{out} holds other things ({min(others)}): give a new or empty folder with --out")
    if present and not overwrite:
        raise DataError(f"{out} has a manifest already: give another --out, or --overwrite")


def _index_tar(place: str, layout: SampleLayout, remote: RemoteConfig) -> tuple[str, _Found]:
    with _open(place, remote) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        size = file.tell()
        scanner = ShardReader(place, file, layout)
        examples = scanner.scan(_EXAMPLES)
        rest = scanner.scan()
        window = ShardReader(place, file, layout, skip_bad=True).read(_EXAMPLES)
        scanner.check_end()
    if not scanner.position:
        names = " and ".join(f"KEY.{name}" for name in layout.members)
        raise DataError(f"{place} has no member {names}: see --field, --source-field and --target-field")
    share = (examples.n_bytes + rest.n_bytes) / max(1, examples.n_bytes)
    n_tokens = [round(int(lengths.sum()) * share) for _, lengths in window.fields] + [0]
    base, name = place.rsplit("/", 1)
    marks = examples.marks + rest.marks
    info = ShardInfo(name, scanner.position, size, sha256, n_tokens[0], n_tokens[1], marks, base or "/")
    return place, _Found(info, examples.n_bad + rest.n_bad)


def _open(place: str, remote: RemoteConfig) -> BinaryIO:
    if is_url(place):
        return ShardCache(remote).fetch_unknown(place)
    try:
        return Path(place).open("rb", buffering=0)
    except OSError as error:
        raise DataError(f"{place} cannot be opened ({error.strerror})") from error
