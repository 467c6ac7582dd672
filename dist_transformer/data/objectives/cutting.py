"""Cutting: which pieces of a window's documents share a row, so that both sides of every row are full.

T5 concatenates documents and cuts where a row ends. Here documents stay apart (each piece has its own segment),
and short ones stay whole; but where a row would otherwise end in a gap, a long document is cut so that its piece
fills the gap and its rest begins another row.
"""

from collections import deque
from collections.abc import Sequence
from itertools import combinations, islice
from typing import NamedTuple

from dist_transformer.data.objectives.denoisers import MIDDLE_DRAW, PieceSizes, draw_of

LONGEST_SCRAP = 32
"""No document is cut into pieces of less than this many tokens, or an eighth of a row where that is less."""

_LOOKAHEAD = 8
"""Documents of each queue that are tried where a row closes."""
_CUT_COST = 0.004
"""Share of a row that may stay empty before another cut is worth it."""
_CHEAP = 1.5 * _CUT_COST
"""Cost at which no better way to close a row is looked for."""
_GREEDY = 2.0
"""Documents that a row must have room for before it is closed with care."""


class Rest:
    """What is left of a document, and its next piece if a whole row is free."""

    __slots__ = ("begin", "draw", "key", "left", "length", "sample", "sizes", "source", "target")

    def __init__(self, sample: int, begin: int, left: int, key: int, sizes: PieceSizes) -> None:
        self.sample, self.begin, self.left = sample, begin, left
        self.key, self.sizes = key, sizes
        self.draw = draw_of(key, begin) if sizes.denoiser.mean_span is None else 0
        self.length = self.source = self.target = 0
        """Of the next piece, set by `Cutter`."""

    @property
    def all_source(self) -> int:
        """About how many source tokens all that is left takes."""
        return self.source * self.left // self.length

    @property
    def all_target(self) -> int:
        """About how many target tokens all that is left takes."""
        return self.target * self.left // self.length


Piece = tuple[int, int, int, int, int]
"""(sample, begin, length, source length, target length)"""


class Cutter:
    """Cuts documents into pieces.

    Args:
        max_source_len: Tokens of a row's source.
        max_target_len: Tokens of a row's target.
        sizes: Of the denoisers, each made for such rows.
    """

    def __init__(self, max_source_len: int, max_target_len: int, sizes: Sequence[PieceSizes]) -> None:
        self.max_source_len, self.max_target_len, self.sizes = max_source_len, max_target_len, sizes
        whole_rows = (s.longest(max_source_len, max_target_len, MIDDLE_DRAW) for s in sizes)
        self.scrap = min(LONGEST_SCRAP, max(1, min(whole_rows) // 8))
        """Tokens of the smallest piece that a cut makes."""

    def whole(self, sample: int, length: int, kind: int, key: int) -> Rest:
        """A document of which nothing is taken yet.

        Args:
            sample: Its place in the window.
            length: Its tokens, at least 1.
            kind: The number of its denoiser.
            key: What its noise is drawn from.
        """
        return self._measured(Rest(sample, 0, length, key, self.sizes[kind]))

    def cut_alone(self, documents: Sequence[Rest]) -> list[Piece]:
        """Each document by itself, in pieces as long as a row allows."""
        pieces = []
        for first in documents:
            rest: Rest | None = first
            while rest:
                pieces.append((rest.sample, rest.begin, rest.length, rest.source, rest.target))
                rest = self.after(rest, rest.length)
        return pieces

    def fill_rows(self, documents: Sequence[Rest]) -> tuple[list[Piece], list[int]]:
        """Pieces row by row, and how many each row has; documents are taken about in the order given."""
        pieces: list[Piece] = []
        n_pieces: list[int] = []
        if not documents:
            return pieces, n_pieces
        filler = _Filler(self, documents)
        while row := filler.next_row():
            pieces += row
            n_pieces.append(len(row))
        return pieces, n_pieces

    def after(self, rest: Rest, length: int) -> Rest | None:
        """What is left when a piece is taken."""
        if length == rest.left:
            return None
        return self._measured(
            Rest(rest.sample, rest.begin + length, rest.left - length, rest.key, rest.sizes)
        )

    def fit(self, rest: Rest, source: int, target: int) -> int:
        """Tokens of the longest next piece that fits and leaves no scrap; 0 if only a scrap would fit."""
        length = rest.sizes.longest(source, target, rest.draw)
        if length >= rest.left:
            return rest.left
        length = min(length, rest.left - self.scrap)
        return length if length >= self.scrap else 0

    def _measured(self, rest: Rest) -> Rest:
        rest.length = self.fit(rest, self.max_source_len, self.max_target_len)
        if not rest.length:
            # A row that is too short for this draw to respect the smallest piece.
            rest.length = min(
                rest.left, rest.sizes.longest(self.max_source_len, self.max_target_len, rest.draw)
            )
        rest.source, rest.target = rest.sizes.of(rest.length, rest.draw)
        return rest


class _Head(NamedTuple):
    """One of the next documents."""

    queue: int
    place: int
    rest: Rest


class _Closing(NamedTuple):
    """A way to end a row."""

    cost: float
    takes: list[tuple[int, int, int]]
    """(queue, place in it, tokens) of what is taken."""

    def or_less(self, cost: float, takes: list[tuple[int, int, int]]) -> "_Closing":
        """This one, or another one that costs less."""
        return _Closing(cost, takes) if cost < self.cost else self


class _Filler:
    """Rows from two queues of documents: those that need more of the source side than others, and those that
    need more of the target side.

    While there is room, whole documents are taken from the queue that the row is short of. A row is closed by the
    best of a few ways: one of the next documents whole and another one cut to what is left, or two cut so that both
    sides are full. With documents that are all alike (span corruption) rows then hold one cut document; with
    several kinds (UL2, prefix language modelling) complementary ones share a row.
    """

    def __init__(self, cutter: Cutter, rests: Sequence[Rest]) -> None:
        self._cutter = cutter
        self._row = cutter.max_source_len, cutter.max_target_len
        self._left = sum(r.all_source for r in rests), sum(r.all_target for r in rests)
        self._set_goal()
        self._queues: tuple[deque[Rest], deque[Rest]] = deque(), deque()
        for rest in rests:
            self._queues[self._queue_of(rest)].append(rest)
        self._turns = 1, 0

    def _set_goal(self) -> None:
        """What a row holds if all that are left are alike; the side that is not short of space cannot be full."""
        n_rows = max(self._left[0] / self._row[0], self._left[1] / self._row[1])
        if n_rows > 0:
            self._goal = self._left[0] / n_rows, self._left[1] / n_rows
            self._spare = self._row[0] - self._goal[0], self._row[1] - self._goal[1]

    def _queue_of(self, rest: Rest) -> int:
        return int(rest.source * self._goal[1] < rest.target * self._goal[0])

    def next_row(self) -> list[Piece]:
        """The pieces of the next row; none where no document is left."""
        self._pieces: list[Piece] = []
        self._free = self._row
        self._set_goal()
        # Neither queue may be cut more often: what is left of a cut document can change queues.
        self._turns = self._turns[::-1]
        while (queue := self._greedy()) is not None:
            self._take([(queue, 0, self._queues[queue][0].length)])
        while closing := self._best_closing():
            self._take(closing.takes)
        return self._pieces

    def _take(self, takes: list[tuple[int, int, int]]) -> None:
        rests = [(self._queues[queue][place], length) for queue, place, length in takes]
        for queue, place, _ in sorted(takes, reverse=True):  # from the back, so that places stay valid
            del self._queues[queue][place]
        for rest, length in rests:
            source, target = rest.sizes.of(length, rest.draw)
            self._pieces.append((rest.sample, rest.begin, length, source, target))
            self._free = self._free[0] - source, self._free[1] - target
            self._left = self._left[0] - rest.all_source, self._left[1] - rest.all_target
            if left := self._cutter.after(rest, length):
                self._left = self._left[0] + left.all_source, self._left[1] + left.all_target
                self._queues[self._queue_of(left)].appendleft(left)

    def _greedy(self) -> int | None:
        """The queue whose first piece should be taken as it is; None where the row should be closed."""
        lean_source, lean_target = (queue[0] if queue else None for queue in self._queues)
        if lean_source and lean_target:
            first, second = self._mix(lean_source, lean_target)
            if first + second < _GREEDY:
                return None
            queue = int(first < second)
            return queue if self._fits(self._queues[queue][0]) else None
        for queue, rest in enumerate((lean_source, lean_target)):
            if rest and min(self._free[0] / rest.source, self._free[1] / rest.target) >= _GREEDY:
                return queue
        return None

    def _mix(self, first: Rest, second: Rest) -> tuple[float, float]:
        """How much of each of two pieces together fills what is free of the goal."""
        source, target = self._free[0] - self._spare[0], self._free[1] - self._spare[1]
        determinant = first.source * second.target - first.target * second.source
        if determinant == 0:  # equal shapes
            share = min(source / first.source, target / first.target)
            return share, share
        return (
            (source * second.target - target * second.source) / determinant,
            (target * first.source - source * first.target) / determinant,
        )

    def _fits(self, rest: Rest) -> bool:
        return rest.source <= self._free[0] and rest.target <= self._free[1]

    def _best_closing(self) -> _Closing | None:
        """The cheapest way to use what is free, or the first that is cheap; None where nothing fits."""
        best = _Closing(self._wasted(*self._free), [])
        # The shortest pair is EOS on one side, a token and EOS on the other.
        if best.cost < _CHEAP or self._free[0] < 1 or self._free[1] < 2:
            return None
        heads = [
            _Head(queue, place, rest)
            for queue in self._turns
            for place, rest in enumerate(islice(self._queues[queue], _LOOKAHEAD))
        ]
        long = [head for head in heads if head.rest.left >= 2 * self._cutter.scrap]
        cuttable = [head for i, head in enumerate(long) if not i or head.queue != long[i - 1].queue]
        for cut in cuttable:
            best = self._with_cut(best, cut, self._free, 0.0, [])
        for head in heads:
            rest = head.rest
            free = self._free[0] - rest.source, self._free[1] - rest.target
            if min(free) < 0:
                continue
            if best.cost < _CHEAP:
                break
            takes = [(head.queue, head.place, rest.length)]
            cost = _CUT_COST * (rest.length < rest.left)
            best = best.or_less(cost + self._wasted(*free), takes)
            for cut in cuttable:
                if cut is not head:
                    best = self._with_cut(best, cut, free, cost, takes)
        for first, second in combinations(long, 2):
            if best.cost < 2 * _CHEAP:
                break
            best = self._with_two_cuts(best, first, second)
        return best if best.takes else None

    def _with_cut(
        self,
        best: _Closing,
        cut: _Head,
        free: tuple[int, int],
        cost: float,
        takes: list[tuple[int, int, int]],
    ) -> _Closing:
        """The better of `best` and of filling what is free with a piece of `cut`, after `takes` at `cost`."""
        rest = cut.rest
        length = self._cutter.fit(rest, *free)
        if not length:
            return best
        source, target = rest.sizes.of(length, rest.draw)
        cost += self._wasted(free[0] - source, free[1] - target) + _CUT_COST * (length < rest.left)
        return best.or_less(cost, [*takes, (cut.queue, cut.place, length)])

    def _with_two_cuts(self, best: _Closing, first: _Head, second: _Head) -> _Closing:
        """The better of `best` and of two pieces whose lengths fill both sides."""
        shares = self._mix(first.rest, second.rest)
        if min(shares) <= 0:
            return best
        for share, one, other in zip(shares, (first, second), (second, first), strict=True):
            rest = one.rest
            length = min(int(share * rest.length), rest.length, rest.left - self._cutter.scrap)
            if length < self._cutter.scrap:
                continue
            source, target = rest.sizes.of(length, rest.draw)
            free = self._free[0] - source, self._free[1] - target
            if min(free) >= 0:
                best = self._with_cut(best, other, free, _CUT_COST, [(one.queue, one.place, length)])
        return best

    def _wasted(self, source: int, target: int) -> float:
        """What is free beyond the spare, as shares of a row."""
        return (
            max(0.0, source - self._spare[0]) / self._goal[0]
            + max(0.0, target - self._spare[1]) / self._goal[1]
        )
