"""What decides the rows of a run: its corpora, the lanes that they share, and how they take turns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from dist_transformer.config.data import CorpusConfig, DataConfig
from dist_transformer.data.manifest import Kind, Manifest, Split, load_manifest
from dist_transformer.data.mixture import Mixture
from dist_transformer.data.order import corpus_seed, count_windows, window_samples
from dist_transformer.data.rows import Rows
from dist_transformer.data.shards import RawWindow, ShardSet
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.data.window import WindowPlan
from dist_transformer.errors import DataError


@dataclass(frozen=True)
class Corpus:
    """One corpus of the configuration with what its training folder holds."""

    number: int
    """Its place in the mixture."""
    config: CorpusConfig
    """With every null filled in."""
    manifest: Manifest
    section: str
    """Where the configuration speaks of it: `data`, or `data.mixture.N`."""

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.config.name or ""

    @property
    def n_samples(self) -> int:
        """Training samples."""
        return sum(shard.n_samples for shard in self.manifest.train)

    @property
    def n_tokens(self) -> int:
        """Training tokens of both sides, without EOS."""
        return sum(shard.n_source_tokens + shard.n_target_tokens for shard in self.manifest.train)


def load_corpora(data: DataConfig) -> list[Corpus]:
    """The corpora of a run.

    Raises:
        DataError: a folder cannot be read or has no train split, or the corpora have different tokenizers.
    """
    corpora = []
    for number, config in enumerate(data.corpora()):
        section = f"data.mixture.{number}" if data.mixture else "data"
        manifest = load_manifest(config.train, data)
        if not manifest.train:
            raise DataError(f"{manifest.name} has no train split: name a folder with one in {section}.train")
        corpora.append(Corpus(number, config, manifest, section))
    first = corpora[0]
    for other in corpora[1:]:
        if other.manifest.tokenizer_sha256 != first.manifest.tokenizer_sha256:
            raise DataError(
                f"{other.config.train} was prepared with another tokenizer than {first.config.train}, and a mixture "
                f"has one: prepare it again with --tokenizer {first.manifest.tokenizer_path}"
            )
    return corpora


def shards_of(corpora: Sequence[Corpus]) -> dict[str, int]:
    """Training shards of each corpus, for `check_lanes`."""
    return {corpus.name: len(corpus.manifest.train) for corpus in corpora}


@dataclass(frozen=True)
class CorpusPlan:
    """All that decides the rows of a split of one corpus: plain values, so that it travels to loader workers."""

    name: str
    """What messages call it."""
    shards: ShardSet
    windows: WindowPlan
    window: int
    """Samples in a window."""

    @classmethod
    def build(
        cls,
        data: DataConfig,
        corpus: CorpusConfig,
        manifest: Manifest,
        split: Split,
        *,
        seed: int,
        shuffle: bool,
        n_readers: int = 1,
        section: str = "data",
    ) -> Self:
        """The plan of a split.

        Args:
            data: The configuration's `data` section.
            corpus: One of its corpora.
            manifest: What is read for it.
            split: Which split of that.
            seed: Of order and noise; see `corpus_seed`.
            shuffle: Permute shards, samples and rows.
            n_readers: How many windows exist at the same time in the whole run.
            section: What messages call the corpus's part of the configuration.

        Raises:
            DataError: the objective does not fit the kind of shards, or the rows are too short for it.
        """
        tokenizer = TextTokenizer.load(manifest.tokenizer_path)
        windows = WindowPlan.build(data, corpus, tokenizer, seed, shuffle)
        _check_kind(corpus, manifest, windows.objective.kind, section)
        infos = manifest.shards(split)
        n_tokens = sum(info.n_source_tokens + info.n_target_tokens for info in infos)
        n_samples = sum(info.n_samples for info in infos)
        window = window_samples(n_samples, n_tokens, data.window, data.window_tokens, n_readers)
        return cls(corpus.name or "", ShardSet.build(manifest, split, data), windows, window)

    def count_windows(self, shard: int) -> int:
        """Windows of a shard."""
        return count_windows(self.shards.infos[shard].n_samples, self.window)

    def build_rows(self, raw: RawWindow, epoch: int, shard: int) -> tuple[Rows, int]:
        """The rows of a window in the order of training, and how many samples were dropped."""
        window, location = raw.first // self.window, self.shards.location(shard)
        return self.windows.build_rows(raw, epoch=epoch, shard=shard, window=window, location=location)

    def order_options(self) -> dict[str, Any]:
        """What besides the shards and the run's seed decides the rows: a resume must find the same values."""
        options = {"window": self.window} | self.windows.describe()
        del options["seed"]  # the corpus's own, made from the run's, which messages had better name
        return options


@dataclass(frozen=True)
class RunPlan:
    """All that decides the rows of a run: plain values, so that it travels to loader workers."""

    corpora: tuple[CorpusPlan, ...]
    mixture: Mixture

    @classmethod
    def build(cls, data: DataConfig, corpora: Sequence[Corpus], *, n_lanes: int, seed: int) -> Self:
        """The plan of a run.

        Args:
            data: The configuration's `data` section.
            corpora: From `load_corpora`.
            n_lanes: Lanes, which all corpora share; see `check_lanes`.
            seed: `run.seed`.

        Raises:
            DataError: an objective does not fit its shards or its rows, or a corpus without a weight has no tokens.
        """
        plans = tuple(
            CorpusPlan.build(
                data,
                corpus.config,
                corpus.manifest,
                "train",
                seed=corpus_seed(seed, corpus.number),
                shuffle=data.shuffle,
                n_readers=n_lanes * len(corpora),
                section=corpus.section,
            )
            for corpus in corpora
        )
        weights = [_weight(corpus) for corpus in corpora] if len(corpora) > 1 else [1.0]
        return cls(plans, Mixture.build(weights, data.mixing_temperature, n_lanes, seed))

    @property
    def n_lanes(self) -> int:
        """Lanes of every corpus."""
        return self.mixture.n_lanes


def _weight(corpus: Corpus) -> float:
    weight = corpus.config.weight or corpus.n_tokens
    if not weight:
        raise DataError(
            f"{corpus.manifest.name} does not say how many tokens it holds: give every corpus of data.mixture a weight"
        )
    return weight


def _check_kind(corpus: CorpusConfig, manifest: Manifest, wanted: Kind, section: str) -> None:
    if manifest.kind != wanted:
        fitting = "pairs" if manifest.kind == "pairs" else "span_corruption"
        raise DataError(
            f"{section}.objective={corpus.objective} needs {wanted} shards, {manifest.name} holds {manifest.kind}: set "
            f"{section}.objective={fitting} or prepare with `dist-transformer prepare {wanted}`"
        )
