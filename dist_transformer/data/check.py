"""All that can be known to be wrong with the data before training starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_transformer.config.data import DataConfig
from dist_transformer.data.held_out import held_out_plan, load_held_out
from dist_transformer.data.manifest import Manifest
from dist_transformer.data.mixture import UNIT
from dist_transformer.data.order import check_lanes
from dist_transformer.data.plan import Corpus, CorpusPlan, RunPlan, load_corpora, shards_of
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.errors import DataError

PACKED_FILL = 0.97
"""Share of the fuller side that packing usually fills; for estimates only."""


@dataclass(frozen=True)
class CorpusSummary:
    """What one corpus of a run is."""

    name: str
    share: float
    """Of the run's rows."""
    n_shards: int
    n_samples: int
    n_source_tokens: int
    """Tokens of the sources, or of the documents, without EOS."""
    n_target_tokens: int
    """Tokens of the targets; 0 for plain text."""
    window: int
    """Samples that are shuffled and packed together."""
    rows_per_epoch: int
    """An estimate: exact figures need packing."""

    def describe(self, n_rows: int) -> str:
        """A sentence for people.

        Args:
            n_rows: Rows of the whole run.
        """
        share = f"{100 * self.share:.3g} % of the rows, " if self.share < 1 else ""
        epochs = n_rows * self.share / self.rows_per_epoch
        return (
            f"{self.name}: {share}{self.n_samples:,} samples in {self.n_shards:,} shards, about "
            f"{self.rows_per_epoch:,} rows an epoch: {epochs:.3g} epochs in this run"
        )


@dataclass(frozen=True)
class DataSummary:
    """What a run's data is."""

    n_lanes: int
    vocab_size: int
    tokenizer_path: Path
    corpora: tuple[CorpusSummary, ...]
    n_eval_samples: dict[str, int]
    """Held-out samples of each corpus that has some."""


def check_data(data: DataConfig, *, dp_size: int, workers: int) -> DataSummary:
    """Check everything that a run reads before any rank starts to train.

    Args:
        data: The configuration's `data` section.
        dp_size: Data-parallel ranks.
        workers: Loader processes per rank.

    Raises:
        DataError: folders missing, empty or half-written, a tokenizer that is not the shards', an objective
            that does not fit them, ranks and workers that the lanes do not divide into, or corpora, train and
            eval folders that do not belong together.
    """
    corpora = load_corpora(data)
    n_lanes = check_lanes(shards_of(corpora), dp_size, workers)
    # The seed decides nothing that is checked.
    plan = RunPlan.build(data, corpora, n_lanes=n_lanes, seed=0)
    manifest = corpora[0].manifest
    _check_tokenizer(manifest)
    return DataSummary(
        n_lanes=n_lanes,
        vocab_size=manifest.vocab_size,
        tokenizer_path=manifest.tokenizer_path,
        corpora=summarise(data, corpora, plan),
        n_eval_samples={c.name: _check_held_out(data, c) for c in corpora if c.config.eval is not None},
    )


def summarise(data: DataConfig, corpora: Sequence[Corpus], plan: RunPlan) -> tuple[CorpusSummary, ...]:
    """What the corpora of a run are."""
    return tuple(
        CorpusSummary(
            name=corpus.name,
            share=share / UNIT,
            n_shards=len(corpus.manifest.train),
            n_samples=corpus.n_samples,
            n_source_tokens=sum(shard.n_source_tokens for shard in corpus.manifest.train),
            n_target_tokens=sum(shard.n_target_tokens for shard in corpus.manifest.train),
            window=corpus_plan.window,
            rows_per_epoch=_estimate_rows(data, corpus, corpus_plan),
        )
        for corpus, share, corpus_plan in zip(corpora, plan.mixture.shares, plan.corpora, strict=True)
    )


def _check_tokenizer(manifest: Manifest) -> None:
    tokenizer = TextTokenizer.load(manifest.tokenizer_path)
    if tokenizer.vocab_size != manifest.vocab_size:
        raise DataError(
            f"the tokenizer does not match the shards: {manifest.tokenizer_path} has "
            f"{tokenizer.vocab_size} ids, the manifest says {manifest.vocab_size}: prepare again with --overwrite"
        )


def _check_held_out(data: DataConfig, corpus: Corpus) -> int:
    """The number of held-out samples."""
    held_out, split = load_held_out(data, corpus.config)
    if held_out.tokenizer_sha256 != corpus.manifest.tokenizer_sha256:
        raise DataError(
            f"{corpus.config.eval} was prepared with another tokenizer than {corpus.config.train}: prepare it again "
            f"with --tokenizer {corpus.manifest.tokenizer_path}"
        )
    held_out_plan(data, corpus.config, 0, corpus.section)
    return sum(shard.n_samples for shard in held_out.shards(split))


def _estimate_rows(data: DataConfig, corpus: Corpus, plan: CorpusPlan) -> int:
    """Rows of an epoch, by what the objective expects to make of the manifest's counts."""
    shards = corpus.manifest.train
    n_tokens = (sum(s.n_source_tokens for s in shards), sum(s.n_target_tokens for s in shards))
    n_pairs, n_source, n_target = plan.windows.objective.expect(corpus.n_samples, *n_tokens)
    if data.packing:
        return int(max(n_source / data.max_source_len, n_target / data.max_target_len) / PACKED_FILL) + 1
    if data.bucket_tokens is None:
        return n_pairs
    # Buckets hold samples of one length, more or less.
    return -(-max(n_source, n_target) // data.bucket_tokens)
