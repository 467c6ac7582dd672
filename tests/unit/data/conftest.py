"""Small corpora and folders of shards that the tests of the data package share."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from dist_transformer.data.manifest import Kind, Manifest, sha256_of
from dist_transformer.data.shards import write_shard
from dist_transformer.data.tokenizer import TextTokenizer

CORPORA = Path(__file__).resolve().parents[3] / "../shared/data"

WORDS = [
    "the",
    "a",
    "small",
    "red",
    "house",
    "stands",
    "near",
    "old",
    "river",
    "and",
    "nobody",
    "knows",
    "who",
    "built",
    "it",
    "or",
    "why",
    "they",
    "left",
]


def sentences(n: int, seed: int = 0) -> list[str]:
    """Made-up sentences of 3 to 30 words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 30))) for _ in range(n)]


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    """A byte-level BPE of 600 ids."""
    return TextTokenizer.train(iter(sentences(200)), 600)


MakeShards = Callable[..., Manifest]


@pytest.fixture(scope="session")
def make_shards(tokenizer: TextTokenizer) -> MakeShards:
    """A function that writes a folder of shards from token arrays, without the preparation."""

    def make(
        folder: Path,
        shards: Sequence[Sequence[tuple[np.ndarray, ...]]],
        kind: Kind = "text",
        eval_shards: Sequence[Sequence[tuple[np.ndarray, ...]]] = (),
        vocab_size: int | None = None,
        token_dtype: str = "u16",
    ) -> Manifest:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder / "tokenizer.json")
        dtype = np.dtype("<u2" if token_dtype == "u16" else "<u4")
        infos = [write_shard(folder / f"train-{i:05d}.tar", kind, dtype, s) for i, s in enumerate(shards)]
        held = [write_shard(folder / f"eval-{i:05d}.tar", kind, dtype, s) for i, s in enumerate(eval_shards)]
        manifest = Manifest(
            root=folder,
            kind=kind,
            train=tuple(infos),
            eval=tuple(held),
            tokenizer_sha256=sha256_of(folder / "tokenizer.json"),
            vocab_size=vocab_size or tokenizer.vocab_size,
            token_dtype=token_dtype,
        )
        manifest.save()
        return manifest

    return make


def numbered_pairs(
    n_shards: int, n_samples: Callable[[int], int], seed: int = 0
) -> list[list[tuple[np.ndarray, ...]]]:
    """Pairs that can be told apart: the source begins with the sample's number in base 200."""
    rng = np.random.default_rng(seed)
    shards, number = [], 0
    for shard in range(n_shards):
        samples = []
        for _ in range(n_samples(shard)):
            name = [3 + number // 40000, 3 + number // 200 % 200, 3 + number % 200]
            source = np.array(name + [250] * int(rng.integers(0, 9)), np.uint16)
            samples.append((source, rng.integers(3, 400, int(rng.integers(1, 12))).astype(np.uint16)))
            number += 1
        shards.append(samples)
    return shards


def numbers_in(tokens: np.ndarray, segment_ids: np.ndarray) -> list[int]:
    """The sample numbers in a row of `numbered_pairs`."""
    found = []
    for segment in range(1, int(segment_ids.max(initial=0)) + 1):
        a, b, c = (int(t) - 3 for t in tokens[segment_ids == segment][:3])
        found.append(a * 40000 + b * 200 + c)
    return found
