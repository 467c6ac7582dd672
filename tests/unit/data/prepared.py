"""What the tests of the preparation share: small options, and what a prepared folder holds."""

from pathlib import Path
from typing import Any

import numpy as np

from dist_transformer.config.data import DataConfig
from dist_transformer.data.manifest import Manifest, Split, load_manifest
from dist_transformer.data.shards import ShardSet
from dist_transformer.data.tokenizer import TextTokenizer
from tests.unit.data.conftest import sentences

OPTIONS: dict[str, Any] = {"vocab_size": 500, "workers": 1}


def texts_of(folder: Path | Manifest, split: Split = "train") -> list[tuple[str, ...]]:
    """The samples of a split as text, in the order of the shards."""
    manifest = folder if isinstance(folder, Manifest) else load_manifest(folder)
    tokenizer = TextTokenizer.load(manifest.tokenizer_path)
    shards = ShardSet.build(manifest, split, DataConfig(train=""))
    texts: list[tuple[str, ...]] = []
    for number, info in enumerate(shards.infos):
        columns = [
            [tokenizer.decode(tokens) for tokens in np.split(flat, np.cumsum(lengths)[:-1])]
            for flat, lengths in shards.open(number).read(info.n_samples).fields
        ]
        texts += zip(*columns, strict=True)
    return texts


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def numbered_lines(n: int, seed: int = 0) -> list[str]:
    """Made-up sentences, no two equal."""
    return [f"{i} {line}" for i, line in enumerate(sentences(n, seed))]


def write_pairs(folder: Path, n: int = 300) -> tuple[Path, Path]:
    """A source and a target file."""
    source, target = folder / "a.en", folder / "a.de"
    source.write_text("".join(f"{line} {i}\n" for i, line in enumerate(sentences(n))))
    target.write_text("".join(f"{i} {line}\n" for i, line in enumerate(sentences(n, seed=1))))
    return source, target
