"""Row lengths: how full rows get, and which lengths fill both sides of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dist_transformer.config.data import CorpusConfig, DataConfig
from dist_transformer.data.objectives import Window, build_objective
from dist_transformer.data.reader import RawWindow
from dist_transformer.data.tokenizer import TextTokenizer

_SHORTEST = 8
"""Shortest side that is tried."""
_N_ROUNDS = 8
"""Times that the ratio is corrected by what rows of the last lengths hold."""


@dataclass(frozen=True)
class RowFill:
    """How full the rows of a sample of windows are."""

    max_source_len: int
    max_target_len: int
    source: float
    """Share of the encoder's positions that hold tokens."""
    target: float
    """Share of the decoder's positions that hold tokens."""
    n_rows: int

    @property
    def emptier(self) -> float:
        """The fill of the emptier side."""
        return min(self.source, self.target)


def measure_fill(
    data: DataConfig, corpus: CorpusConfig, tokenizer: TextTokenizer, windows: Sequence[RawWindow]
) -> RowFill:
    """Pack windows of a corpus as training does.

    Args:
        data: The configuration's `data` section.
        corpus: One of `data.corpora()`.
        tokenizer: The corpus's.
        windows: Any windows of its shards; only lengths count.

    Raises:
        DataError: as `build_objective`, or a pair is too long and `data.too_long` is `error`.
    """
    objective = build_objective(data, corpus, tokenizer)
    n_rows = n_source = n_target = 0
    for number, raw in enumerate(windows):
        window = Window(raw.fields, raw.indices, key=number, location="a sample of the corpus")
        pieces, n_pieces = objective.fill_rows(window, np.arange(len(window)))
        n_rows += len(n_pieces)
        n_source += int(pieces.source_lengths.sum())
        n_target += int(pieces.target_lengths.sum())
    rows = max(1, n_rows)
    lengths = data.max_source_len, data.max_target_len
    return RowFill(*lengths, n_source / rows / lengths[0], n_target / rows / lengths[1], n_rows)


def suggest_row_lengths(
    data: DataConfig,
    corpus: CorpusConfig,
    tokenizer: TextTokenizer,
    windows: Sequence[RawWindow],
    keep: Literal["source", "target"] = "source",
) -> RowFill:
    """The row lengths that fill both sides best where one of them is given.

    The ratio of the corpus's tokens on the two sides gives the other length; since pieces depend on the rows that they
    are cut for, that is repeated, and lengths around the last one are tried.

    Args:
        data: The configuration's `data` section; the length of the side to keep is its.
        corpus: One of `data.corpora()`.
        tokenizer: The corpus's.
        windows: Windows of its shards; a few are enough.
        keep: The side whose length stays.

    Raises:
        DataError: as `measure_fill`.
    """
    field, kept = (
        ("max_target_len", data.max_source_len)
        if keep == "source"
        else ("max_source_len", data.max_target_len)
    )

    def measure(length: int) -> RowFill:
        return measure_fill(data.model_copy(update={field: length}), corpus, tokenizer, windows)

    # With room to spare on the other side, nothing is cut or truncated there.
    longest = max((int(lengths.max(initial=0)) for raw in windows for _, lengths in raw.fields), default=0)
    ample = measure(max(2 * kept, longest + 2, _SHORTEST))
    best = measure(_balanced(ample, field))
    for _ in range(_N_ROUNDS):
        tried = measure(_balanced(best, field))
        if tried.emptier <= best.emptier:
            break
        best = tried
    step = 0.02
    while step * getattr(best, field) >= 0.5:
        length = getattr(best, field)
        for other in (round(length * (1 - step)), round(length * (1 + step))):
            if other >= _SHORTEST and other != length:
                tried = measure(other)
                best = tried if tried.emptier > best.emptier else best
        step /= 2
    return best


def _balanced(fill: RowFill, field: str) -> int:
    """The length of one side at which both would be equally full, if the tokens of a row stayed the same."""
    if field == "max_target_len":
        return max(_SHORTEST, round(fill.max_target_len * fill.target / fill.source))
    return max(_SHORTEST, round(fill.max_source_len * fill.source / fill.target))
