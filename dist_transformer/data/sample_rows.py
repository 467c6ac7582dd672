"""Rows of a run as text, span by span: what the model is shown, for people to look at."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np

from dist_transformer.data.cursor import Cursor
from dist_transformer.data.hashing import Int64
from dist_transformer.data.lanes import LaneReader
from dist_transformer.data.manifest import Kind
from dist_transformer.data.order import lane_shards
from dist_transformer.data.plan import RunPlan
from dist_transformer.data.ragged import Tokens
from dist_transformer.data.rows import Rows
from dist_transformer.data.tokenizer import EOS_TOKEN, TextTokenizer

Role = Literal["text", "sentinel", "removed", "mode", "end"]


@dataclass(frozen=True)
class Part:
    """Tokens that play one role."""

    role: Role
    """text: kept, or of a pair; removed: what a target restores; mode: UL2's denoiser; end: EOS."""
    text: str
    span: int | None = None
    """Which removed span a sentinel or a removed part belongs to, from 0 in each sample."""


@dataclass(frozen=True)
class ShownSample:
    """One (source, target) pair of a row."""

    n_source_tokens: int
    n_target_tokens: int
    source: tuple[Part, ...]
    target: tuple[Part, ...]


@dataclass(frozen=True)
class ShownRow:
    """One row of the run, and where it comes from."""

    number: int
    """Place in the run's global order of rows."""
    corpus: str
    lane: int
    epoch: int
    shard: str
    """Location."""
    window: int
    """Number of the window in the shard."""
    samples: tuple[ShownSample, ...]

    @property
    def n_source_tokens(self) -> int:
        """Without padding."""
        return sum(sample.n_source_tokens for sample in self.samples)

    @property
    def n_target_tokens(self) -> int:
        """Without padding."""
        return sum(sample.n_target_tokens for sample in self.samples)


def show_rows(plan: RunPlan, tokenizer: TextTokenizer, first: int, n_rows: int) -> Iterator[ShownRow]:
    """Rows `first`, `first` + 1, ... of a run.

    A lane has to be walked from its beginning, so the time grows with `first` / lanes.

    Args:
        plan: Of the run.
        tokenizer: Of its shards.
        first: Rows of the run that come before.
        n_rows: How many to show.

    Raises:
        DataError: a shard on the way is damaged or unreachable (`data.on_bad_shard=error`).
    """
    readers: dict[tuple[int, int], LaneReader] = {}
    n_taken: Counter[tuple[int, int]] = Counter()
    for number in range(first, first + n_rows):
        turn, lane = divmod(number, plan.n_lanes)
        corpus = plan.mixture.corpus_of(number)
        place, corpus_plan = (corpus, lane), plan.corpora[corpus]
        if place not in readers:
            readers[place] = LaneReader(corpus_plan, lane, plan.n_lanes, Cursor())
        # Of the lane's turns up to this one, those that were this corpus's.
        turns = (plan.mixture.corpus_of(t * plan.n_lanes + lane) for t in range(turn + 1))
        for _ in range(sum(found == corpus for found in turns) - n_taken[place]):
            rows = readers[place].next_row().row
            n_taken[place] += 1
        window = readers[place].window
        windows = corpus_plan.windows
        shards = lane_shards(
            len(corpus_plan.shards), plan.n_lanes, lane, windows.seed, window.epoch, windows.shuffle
        )
        yield ShownRow(
            number=number,
            corpus=corpus_plan.name,
            lane=lane,
            epoch=window.epoch,
            shard=corpus_plan.shards.location(shards[window.shard]),
            window=window.window,
            samples=tuple(_show_samples(rows, tokenizer, windows.objective.kind)),
        )


def _show_samples(row: Rows, tokenizer: TextTokenizer, kind: Kind) -> Iterator[ShownSample]:
    sources = _split(row.source_tokens, row.source_lengths)
    targets = _split(row.target_tokens, row.target_lengths)
    for source, target in zip(sources, targets, strict=True):
        yield ShownSample(
            n_source_tokens=len(source),
            n_target_tokens=len(target),
            source=tuple(parts_of(source, tokenizer, restored=False)),
            # All of the target is restored text; where no sentinel says which span, there is one.
            target=tuple(parts_of(target, tokenizer, restored=kind == "text")),
        )


def _split(tokens: Tokens, lengths: Int64) -> list[list[int]]:
    return [tokens[end - n : end].tolist() for end, n in zip(np.cumsum(lengths), lengths, strict=True)]


def parts_of(tokens: Sequence[int], tokenizer: TextTokenizer, *, restored: bool) -> Iterator[Part]:
    """The tokens of one side of a sample, those of one role together.

    Args:
        tokens: With sentinels, mode token and EOS.
        tokenizer: That made them.
        restored: Text is what a target restores: it belongs to the sentinel before it, or to span 0.
    """
    spans = {token: span for span, token in enumerate(tokenizer.sentinel_ids)}
    roles: dict[int, Role] = dict.fromkeys(spans, "sentinel")
    roles |= dict.fromkeys(tokenizer.mode_ids.values(), "mode")
    roles[tokenizer.eos_id] = "end"
    span: int | None = 0 if restored else None
    for role, group in groupby(tokens, lambda token: roles.get(token, "removed" if restored else "text")):
        if role in ("text", "removed"):
            yield Part(role, tokenizer.decode(group, keep_sentinels=True), span)
            continue
        for token in group:
            if role == "sentinel" and restored:
                span = spans[token]
            yield Part(role, tokenizer.decode([token], keep_sentinels=True) or EOS_TOKEN, spans.get(token))
