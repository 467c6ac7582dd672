"""What benchmarks/data.py reads: corpora that are at hand and made-up ones, prepared as shards, and their stream."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dist_transformer.config import DataConfig
from dist_transformer.data.manifest import DTYPES, Manifest, ShardInfo, load_manifest, sha256_of
from dist_transformer.data.prepare import prepare_pairs, prepare_text
from dist_transformer.data.shards import write_shard
from dist_transformer.data.stream import TrainStream
from dist_transformer.data.tokenizer import TextTokenizer

ROWS = 16
"""Rows of a micro-batch in all measurements."""


def stream(data: DataConfig, **options: Any) -> TrainStream:
    """The stream of a run on one rank."""
    return TrainStream(data, seed=1, dp_rank=0, dp_size=1, micro_batch_size=ROWS, **options)


def prepared(folder: Path, prepare: Callable[[], Any]) -> Path:
    """The folder of shards, prepared where it is not there yet."""
    if not (folder / "manifest.json").exists():
        prepare()
    return folder


def corpora(options: argparse.Namespace) -> Iterator[tuple[str, DataConfig]]:
    """The corpora that are there, with row lengths that suit them."""
    yield "documents of 250 to 750 tokens", documents(options)
    if options.corpora is None:
        return
    for name, sides, vocabulary, source_len in (
        ("Multi30k en-de", ("multi30k/train.en", "multi30k/train.de"), 6000, 128),
        ("E2E NLG", ("e2e/train.mr", "e2e/train.ref"), 2000, 256),
    ):
        files = [options.corpora / side for side in sides]
        if files[0].exists():
            folder = options.work / sides[0].split("/")[0]
            yield name, pairs_config(pair_shards(folder, files, vocab_size=vocabulary), source_len)
    if novels := sorted((options.corpora / "novels").glob("train*")):
        folder = options.work / "novels"
        prepared(folder, lambda: prepare_text(novels, folder, documents="paragraph", vocab_size=8000))
        lengths = {"max_source_len": 512, "max_target_len": 114}
        yield "novels, span corruption", DataConfig(train=str(folder), workers=0, **lengths)
        yield "novels, UL2", DataConfig(train=str(folder), workers=0, objective="ul2", max_target_len=248)


def documents(options: argparse.Namespace, **changes: Any) -> DataConfig:
    """Tokenised documents of 250 to 750 random tokens: 24 shards, 24 M tokens, 4 windows a lane."""
    folder = options.work / "documents"
    prepared(folder, lambda: write_synthetic(folder, [2000] * 24))
    return DataConfig(train=str(folder), max_source_len=512, max_target_len=114, **{"workers": 0} | changes)


def raw_corpus(options: argparse.Namespace) -> tuple[str, Path, DataConfig]:
    """Raw shards of pairs: Multi30k where it is at hand, else made-up sentences."""
    name, files = "Multi30k", []
    if options.corpora is not None:
        files = [options.corpora / "multi30k" / f"train.{side}" for side in ("en", "de")]
    if not files or not files[0].exists():
        name, files = "made-up pairs", [options.work / f"raw.{side}" for side in ("source", "target")]
        for i, file in enumerate(files):
            file.write_text("\n".join(made_up_sentences(20000, seed=i)) + "\n", encoding="utf-8")
    folder = pair_shards(options.work / "raw", files, vocab_size=6000, raw=True)
    lengths = {"max_source_len": 128, "max_target_len": 128}
    return name, folder, DataConfig(train=str(folder), objective="pairs", workers=1, **lengths)


def pair_shards(folder: Path, files: list[Path], **options: Any) -> Path:
    """A source and a target file, prepared."""
    return prepared(folder, lambda: prepare_pairs([(files[0], files[1])], folder, **options))


def pairs_config(folder: Path, source_len: int) -> DataConfig:
    """Rows of so many source tokens, and of as many target tokens as stand against them in the corpus."""
    shards = load_manifest(folder).train
    n_source = sum(shard.n_source_tokens + shard.n_samples for shard in shards)
    n_target = sum(shard.n_target_tokens + shard.n_samples for shard in shards)
    lengths = {"max_source_len": source_len, "max_target_len": round(source_len * n_target / n_source)}
    return DataConfig(train=str(folder), objective="pairs", workers=0, **lengths)


def write_synthetic(folder: Path, sizes: list[int], token_dtype: str = "u16", n_copies: int = 1) -> None:
    """A prepared folder of documents of 250 to 750 random tokens.

    Args:
        folder: To write.
        sizes: Documents of each shard.
        token_dtype: u16 or u32.
        n_copies: Names under which each shard is listed (hard links: only the first takes time and space).
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = TextTokenizer.train(iter(["some text for a tokenizer of bytes"]), 1000)
    tokenizer.save(folder / "tokenizer.json")
    infos: list[ShardInfo] = []
    for shard, n_documents in enumerate(sizes):
        random = np.random.default_rng(shard)
        lengths = random.integers(250, 751, n_documents)
        # Ids of bytes: those below are special, and those above may not exist.
        texts = ((random.integers(10, 250, n, dtype=np.uint16),) for n in lengths)
        info = write_shard(folder / f"train-{len(infos):05d}.tar", "text", DTYPES[token_dtype], texts)
        for _ in range(n_copies):
            infos.append(replace(info, file=f"train-{len(infos):05d}.tar"))
            if infos[-1].file != info.file:
                (folder / infos[-1].file).hardlink_to(folder / info.file)
    Manifest(
        root=folder,
        kind="text",
        train=tuple(infos),
        eval=(),
        tokenizer_sha256=sha256_of(folder / "tokenizer.json"),
        vocab_size=tokenizer.vocab_size,
        token_dtype=token_dtype,
    ).save()


def made_up_sentences(n: int, seed: int) -> Iterator[str]:
    """Sentences of 5 to 20 words from a vocabulary of 5,000."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, 10, 5000)
    words = ["".join(chr(97 + c) for c in random.integers(0, 26, length)) for length in lengths]
    for length in random.integers(5, 20, n):
        yield " ".join(words[i] for i in random.zipf(1.5, length) % 5000)
