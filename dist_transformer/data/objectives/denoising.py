"""Denoising of plain text: span corruption, prefix language modelling, and UL2's mixture of both."""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from dist_transformer.data.hashing import Int64, UInt64, hash_array
from dist_transformer.data.manifest import Kind
from dist_transformer.data.objectives.base import Pieces, Samples, Window
from dist_transformer.data.objectives.cutting import Cutter, Piece, Rest
from dist_transformer.data.objectives.denoisers import DRAW_BITS, MIDDLE_DRAW, Denoiser, PieceSizes, draws_of
from dist_transformer.data.objectives.spans import MAX_PIECES, Corruption, corrupt
from dist_transformer.data.ragged import ragged_indices, starts_of
from dist_transformer.errors import DataError

_DENOISER = 1 << 32
"""Numbers the choice of a document's denoiser; above every token of a document, which number its pieces."""


@dataclass(frozen=True)
class Denoising:
    """Each document gets one of several denoisers by a hash with their weights, and is cut into pieces that fit
    rows; each piece is corrupted by itself.

    All that is random is a hash of the window's key, the document's index and the place where the piece begins.
    A document of one token becomes a source of just the sentinel (or of nothing) and a target of the token; an
    empty one is dropped.

    Raises:
        DataError: rows are too short for a denoiser.
    """

    name: str
    denoisers: tuple[Denoiser, ...]
    max_source_len: int
    max_target_len: int
    eos_id: int
    sentinel_ids: tuple[int, ...]

    kind: ClassVar[Kind] = "text"

    def __post_init__(self) -> None:
        for denoiser in self.denoisers:
            sizes, n_sentinels = self._sizes_of(denoiser), len(self.sentinel_ids)
            # The most uneven draws of a prefix denoiser have the shortest pieces.
            draws = (0, (1 << DRAW_BITS) - 1)
            if min(sizes.longest(self.max_source_len, self.max_target_len, draw) for draw in draws) < 2:
                needed = f" with {n_sentinels} sentinels" if denoiser.has_sentinels else ""
                least = 2 + denoiser.has_sentinels
                least_source = least + (denoiser.mode_id is not None)
                raise DataError(
                    f"{self.name} does not fit rows of {self.max_source_len} source and {self.max_target_len} "
                    f"target tokens{needed}: use at least data.max_source_len={least_source} and "
                    f"data.max_target_len={least}"
                    + (" and a tokenizer with <extra_id_N> tokens" if denoiser.has_sentinels else "")
                )

    def longest_piece(self) -> int:
        """Tokens of the longest piece that fits a row whichever denoiser a document gets, with an even cut."""
        rows = self.max_source_len, self.max_target_len
        return min(sizes.longest(*rows, MIDDLE_DRAW) for sizes in self._cutter.sizes)

    def cut(self, window: Window) -> Pieces:
        """Documents in pieces that are as long as a row allows; see `Objective`."""
        documents = self._documents(window, np.arange(len(window)))
        return self._pieces(window, self._cutter.cut_alone(documents))

    def fill_rows(self, window: Window, order: Int64) -> tuple[Pieces, Int64]:
        """Rows that are full on both sides; see `Objective` and `cutting`."""
        pieces, n_pieces = self._cutter.fill_rows(self._documents(window, order))
        return self._pieces(window, pieces), np.asarray(n_pieces, np.int64)

    def write(self, window: Window, pieces: Pieces) -> Samples:
        """Corrupted sources and targets."""
        tokens, lengths = window.fields[0]
        starts = starts_of(lengths)
        parts = []
        for i in range(0, max(1, len(pieces)), MAX_PIECES):
            chunk = pieces.select(np.arange(i, min(i + MAX_PIECES, len(pieces))))
            keys = hash_array(self._document_keys(window)[chunk.sample], chunk.begin)
            gathered = tokens[ragged_indices(starts[chunk.sample] + chunk.begin, chunk.length)]
            plan = self._plan(window, chunk)
            parts.append(corrupt(gathered, chunk.length, keys, plan, self.sentinel_ids, self.eos_id))
        source, target = map(np.concatenate, zip(*parts, strict=True))
        return Samples(source, pieces.source_lengths, target, pieces.target_lengths)

    def expect(self, n_samples: int, n_source_tokens: int, n_target_tokens: int) -> tuple[int, int, int]:
        """As if all documents had the mean length; see `Objective`."""
        mean = max(1, round(n_source_tokens / max(1, n_samples)))
        total = sum(denoiser.weight for denoiser in self.denoisers)
        expected = np.zeros(3)
        rows = self.max_source_len, self.max_target_len
        for denoiser, sizes in zip(self.denoisers, self._cutter.sizes, strict=True):
            longest = sizes.longest(*rows, MIDDLE_DRAW)
            for count, length in ((mean // longest, longest), (int(mean % longest > 0), mean % longest)):
                pair = (1, *sizes.of(length, MIDDLE_DRAW)) if count else (0, 0, 0)
                expected += np.array(pair) * count * denoiser.weight / total
        n_pieces, n_source, n_target = (expected * n_samples).astype(np.int64).tolist()
        return n_pieces, n_source, n_target

    def describe(self) -> dict[str, Any]:
        """What decides the pairs."""
        options = asdict(self) | {"denoisers": [asdict(denoiser) for denoiser in self.denoisers]}
        options["n_sentinels"] = len(options.pop("sentinel_ids"))
        return {"objective": options.pop("name")} | options

    @cached_property
    def _cutter(self) -> Cutter:
        sizes = [self._sizes_of(denoiser) for denoiser in self.denoisers]
        return Cutter(self.max_source_len, self.max_target_len, sizes)

    def _sizes_of(self, denoiser: Denoiser) -> PieceSizes:
        return PieceSizes(denoiser, self.max_source_len, self.max_target_len, len(self.sentinel_ids))

    def _document_keys(self, window: Window) -> UInt64:
        return hash_array(window.key, window.indices)

    def _kinds(self, window: Window) -> Int64:
        """[N] the number of each document's denoiser."""
        bounds = np.cumsum([denoiser.weight for denoiser in self.denoisers])
        # 53 bits are what a float holds exactly.
        uniform = (hash_array(self._document_keys(window), _DENOISER) >> np.uint64(11)) * 2.0**-53
        return np.searchsorted(bounds[:-1] / bounds[-1], uniform, side="right")

    def _documents(self, window: Window, order: Int64) -> list[Rest]:
        order = order[window.fields[0][1][order] > 0]
        columns = window.fields[0][1], self._kinds(window), self._document_keys(window)
        values = (column[order].tolist() for column in columns)
        return [self._cutter.whole(*document) for document in zip(order.tolist(), *values, strict=True)]

    def _pieces(self, window: Window, pieces: list[Piece]) -> Pieces:
        table = np.asarray(pieces, np.int64).reshape(-1, 5)
        sample, begin, length, source, target = table.T
        is_split = (begin == 0) & (length < window.fields[0][1][sample])
        return Pieces(sample, begin, length, source, target, np.zeros_like(is_split), is_split)

    def _plan(self, window: Window, pieces: Pieces) -> Corruption:
        keys = self._document_keys(window)[pieces.sample]
        draws = draws_of(keys, pieces.begin)
        kinds = self._kinds(window)[pieces.sample]
        n_noise, n_spans = np.zeros_like(kinds), np.zeros_like(kinds)
        for kind, denoiser in enumerate(self.denoisers):
            mine = kinds == kind
            n_noise[mine], n_spans[mine] = denoiser.plan(pieces.length[mine], draws[mine])
        modes = [-1 if d.mode_id is None else d.mode_id for d in self.denoisers]
        return Corruption(
            n_noise,
            n_spans,
            np.array([d.has_sentinels for d in self.denoisers])[kinds],
            np.array(modes, np.int64)[kinds],
        )
