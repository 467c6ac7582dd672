"""Inspection: what a folder of shards holds, and what a run would make of it. Figures only; the command line draws."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dist_transformer.config.data import CorpusConfig, DataConfig
from dist_transformer.data.hashing import Int64
from dist_transformer.data.manifest import SPLITS, Kind, Manifest, Split, Storage
from dist_transformer.data.mixture import UNIT
from dist_transformer.data.order import count_lanes
from dist_transformer.data.plan import Corpus, CorpusPlan, RunPlan, load_corpora
from dist_transformer.data.ragged import starts_of
from dist_transformer.data.row_lengths import suggest_row_lengths
from dist_transformer.data.rows import COUNTS, Rows
from dist_transformer.data.shards import RawWindow
from dist_transformer.data.tokenizer import TextTokenizer

N_BINS = 16
"""Bars of a histogram, at most about so many."""
N_WINDOWS_TRIED = 3
"""Windows that are packed again and again in search of row lengths."""
Layout = Literal["packed", "unpacked", "bucketed"]
Side = Literal["document", "source", "target"]
_SIDES: dict[Kind, tuple[Side, ...]] = {"text": ("document",), "pairs": ("source", "target")}


@dataclass(frozen=True)
class SplitFigures:
    """What the manifest says of a split; tokens without EOS."""

    split: Split
    n_shards: int
    n_samples: int
    n_bytes: int
    n_source_tokens: int
    """Of the sources, or of the documents."""
    n_target_tokens: int
    """0 for documents."""
    n_samples_of_smallest_shard: int
    n_samples_of_largest_shard: int


@dataclass(frozen=True)
class LengthFigures:
    """Lengths, in tokens without EOS, of the samples that were read."""

    side: Side
    n: int
    shortest: int
    mean: float
    median: int
    p99: int
    longest: int
    edges: tuple[int, ...]
    """Where the histogram's bins begin; the last one also holds whatever is longer."""
    counts: tuple[int, ...]
    """Samples in each bin."""


@dataclass(frozen=True)
class FillFigures:
    """How full the rows of the windows that were read are. For buckets, a row is a bucket of padded samples."""

    layout: Layout
    n_rows: int
    n_pieces: int
    """(source, target) pairs in the rows."""
    source_share: float
    """Of the positions of the encoder's side, those that hold a token."""
    target_share: float
    """Of the positions of the decoder's side, those that hold a token."""


@dataclass(frozen=True)
class CorpusFigures:
    """One corpus of a run."""

    name: str
    location: str
    kind: Kind
    storage: Storage
    objective: str
    vocab_size: int
    token_dtype: str
    prepared: dict[str, int]
    """What preparation counted: empty, split, repeated documents."""
    splits: tuple[SplitFigures, ...]
    window: int
    """Samples in a window."""
    n_windows_read: int
    n_windows: int
    n_samples_read: int
    lengths: tuple[LengthFigures, ...]
    fill: FillFigures
    counts: dict[str, int]
    """Of the samples read: truncated, split, dropped, bad; see `rows.COUNTS`."""
    problems: tuple[str, ...]
    """A sentence for each window of which samples were lost (policy `skip`)."""
    suggested_lengths: tuple[int, int] | None
    """Row lengths near the configured ones with which both sides of packed rows fill; None: nothing was read."""
    share_of_rows: float
    rows_per_epoch: float
    """Estimated from the windows that were read."""
    epochs_per_1000_steps: float


@dataclass(frozen=True)
class Inspection:
    """What a run would see."""

    max_source_len: int
    max_target_len: int
    global_batch_size: int
    seed: int
    n_lanes: int
    serves: tuple[int, ...]
    """The products of ranks and workers that the lanes divide into."""
    corpora: tuple[CorpusFigures, ...]


@dataclass(frozen=True)
class RunToInspect:
    """The data side of a run, as it would be built on any number of ranks."""

    data: DataConfig
    corpora: tuple[Corpus, ...]
    plan: RunPlan
    tokenizer: TextTokenizer
    """Of all corpora."""
    seed: int
    global_batch_size: int

    @classmethod
    def build(cls, data: DataConfig, *, seed: int, global_batch_size: int) -> "RunToInspect":
        """Load what a configuration names.

        Raises:
            DataError: as for a run, but lanes need not suit a number of ranks.
        """
        corpora = tuple(load_corpora(data))
        n_lanes = count_lanes(min(len(corpus.manifest.train) for corpus in corpora))
        plan = RunPlan.build(data, corpora, n_lanes=n_lanes, seed=seed)
        tokenizer = TextTokenizer.load(corpora[0].manifest.tokenizer_path)
        return cls(data, corpora, plan, tokenizer, seed, global_batch_size)


def inspect_run(run: RunToInspect, n_windows: int) -> Inspection:
    """All figures.

    Args:
        run: What to look at.
        n_windows: Windows of each corpus that are read, spread over its shards.

    Raises:
        DataError: a shard that is read is damaged or unreachable (`data.on_bad_shard=error`).
    """
    n_lanes = run.plan.n_lanes
    return Inspection(
        max_source_len=run.data.max_source_len,
        max_target_len=run.data.max_target_len,
        global_batch_size=run.global_batch_size,
        seed=run.seed,
        n_lanes=n_lanes,
        serves=tuple(n for n in range(1, n_lanes + 1) if n_lanes % n == 0),
        corpora=tuple(_inspect_corpus(run, i, n_windows) for i in range(len(run.corpora))),
    )


def _inspect_corpus(run: RunToInspect, number: int, n_windows: int) -> CorpusFigures:
    corpus, plan = run.corpora[number], run.plan.corpora[number]
    manifest, sample = corpus.manifest, _Sample(run.data, plan)
    places = _spread(plan, n_windows)
    for shard, window in places:
        sample.add(shard, window)
    share = run.plan.mixture.shares[number] / UNIT
    rows_per_epoch = len(sample) and sample.n_rows * corpus.n_samples / len(sample)
    return CorpusFigures(
        name=corpus.name,
        location=manifest.name,
        kind=manifest.kind,
        storage=manifest.samples,
        objective=str(corpus.config.objective),
        vocab_size=manifest.vocab_size,
        token_dtype=manifest.token_dtype,
        prepared={name: n for name, n in manifest.counts.items() if n},
        splits=tuple(split_figures(manifest, split) for split in SPLITS if manifest.shards(split)),
        window=plan.window,
        n_windows_read=len(places),
        n_windows=sum(map(plan.count_windows, range(len(plan.shards)))),
        n_samples_read=len(sample),
        lengths=sample.length_figures(manifest.kind),
        fill=sample.fill_figures(),
        counts=sample.counts(),
        problems=tuple(sample.problems),
        suggested_lengths=sample.suggested_lengths(corpus.config, run.tokenizer),
        share_of_rows=share,
        rows_per_epoch=rows_per_epoch,
        epochs_per_1000_steps=rows_per_epoch and 1000 * run.global_batch_size * share / rows_per_epoch,
    )


def split_figures(manifest: Manifest, split: Split) -> SplitFigures:
    """Totals of a split."""
    shards = manifest.shards(split)
    sizes = [shard.n_samples for shard in shards]
    return SplitFigures(
        split=split,
        n_shards=len(shards),
        n_samples=sum(sizes),
        n_bytes=sum(shard.bytes for shard in shards),
        n_source_tokens=sum(shard.n_source_tokens for shard in shards),
        n_target_tokens=sum(shard.n_target_tokens for shard in shards),
        n_samples_of_smallest_shard=min(sizes),
        n_samples_of_largest_shard=max(sizes),
    )


def _spread(plan: CorpusPlan, n_windows: int) -> list[tuple[int, int]]:
    """(shard, window) of so many windows at even distances over the corpus, the first one included."""
    ends = np.cumsum([plan.count_windows(shard) for shard in range(len(plan.shards))])
    total = int(ends[-1])
    chosen = np.unique(np.arange(min(n_windows, total)) * total // min(n_windows, total))
    shards = np.searchsorted(ends, chosen, side="right")
    before = np.append(0, ends)[shards]
    return [(int(shard), int(place)) for shard, place in zip(shards, chosen - before, strict=True)]


class _Sample:
    """The windows that were read of a corpus, and the rows they gave."""

    def __init__(self, data: DataConfig, plan: CorpusPlan) -> None:
        self._data, self._plan = data, plan
        self._lengths: list[list[Int64]] = []
        self._first: list[RawWindow] = []
        self._totals = np.zeros(len(COUNTS), np.int64)
        self.n_rows = 0
        self.problems: list[str] = []
        self._n_pieces = 0
        self._tokens, self._positions = np.zeros(2, np.int64), np.zeros(2, np.int64)

    def __len__(self) -> int:
        """Samples read."""
        return sum(len(lengths[0]) for lengths in self._lengths)

    def add(self, shard: int, window: int) -> None:
        """Read a window, as epoch 0 of a run would."""
        reader = self._plan.shards.open(shard)
        try:
            reader.skip(window * self._plan.window)
            raw = reader.read(self._plan.window)
        finally:
            reader.close()
        rows, n_dropped = self._plan.build_rows(raw, 0, shard)
        if len(self._first) < N_WINDOWS_TRIED:
            self._first.append(raw)
        self._lengths.append([lengths for _, lengths in raw.fields])
        self._totals += rows.counts.sum(0)
        self._totals[COUNTS.index("n_dropped")] += n_dropped
        self._totals[COUNTS.index("n_bad")] += raw.n_bad
        self.problems += [raw.problem] if raw.problem else []
        self.n_rows += len(rows)
        self._n_pieces += len(rows.source_lengths)
        self._tokens += len(rows.source_tokens), len(rows.target_tokens)
        self._positions += self._count_positions(rows)

    def _count_positions(self, rows: Rows) -> tuple[int, int]:
        """Of both sides, padding counted."""
        data = self._data
        if data.bucket_tokens is None:
            return len(rows) * data.max_source_len, len(rows) * data.max_target_len
        # A bucket is as wide as the longest of its samples.
        begins, sizes = starts_of(rows.n_samples), rows.n_samples
        widest = [
            np.maximum.reduceat(side, begins)
            for side in (rows.source_lengths, rows.target_lengths)
            if len(side)
        ]
        source, target = (int((sizes * width).sum()) for width in widest) if widest else (0, 0)
        return source, target

    def counts(self) -> dict[str, int]:
        """By the names of `rows.COUNTS`."""
        return dict(zip(COUNTS, self._totals.tolist(), strict=True))

    def length_figures(self, kind: Kind) -> tuple[LengthFigures, ...]:
        """Of each field of the samples; nothing where no sample could be read."""
        if not len(self):
            return ()
        columns = [np.concatenate(column) for column in zip(*self._lengths, strict=True)]
        return tuple(
            describe_lengths(side, column) for side, column in zip(_SIDES[kind], columns, strict=True)
        )

    def suggested_lengths(self, corpus: CorpusConfig, tokenizer: TextTokenizer) -> tuple[int, int] | None:
        """From the first windows: the configured source length, and the target length that fills with it."""
        if not self.n_rows:
            return None
        found = suggest_row_lengths(self._data, corpus, tokenizer, self._first)
        return found.max_source_len, found.max_target_len

    def fill_figures(self) -> FillFigures:
        """Of the rows."""
        source, target = (float(share) for share in self._tokens / np.maximum(1, self._positions))
        layout: Layout = (
            "packed" if self._data.packing else "bucketed" if self._data.bucket_tokens else "unpacked"
        )
        return FillFigures(layout, self.n_rows, self._n_pieces, source, target)


def describe_lengths(side: Side, lengths: Int64) -> LengthFigures:
    """Figures of the lengths of some samples, with a histogram whose bins are of one round width."""
    p99, shortest = int(np.percentile(lengths, 99, method="lower")), int(lengths.min())
    width = _round_up(max(1.0, (p99 - shortest + 1) / N_BINS))
    edges = np.arange(shortest // width * width, p99 + 1, width)
    bins = np.minimum((lengths - edges[0]) // width, len(edges) - 1)
    return LengthFigures(
        side=side,
        n=len(lengths),
        shortest=shortest,
        mean=float(lengths.mean()),
        median=int(np.percentile(lengths, 50, method="lower")),
        p99=p99,
        longest=int(lengths.max()),
        edges=tuple(edges.tolist()),
        counts=tuple(np.bincount(bins, minlength=len(edges)).tolist()),
    )


def _round_up(width: float) -> int:
    """1, 2 or 5 times a power of 10."""
    unit = int(10 ** math.floor(math.log10(width)))
    return next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= width)
