"""Which elements of a parameter a rank holds, and which of them another rank's piece has: plain integers.

A parameter of shape [.., D, ..] that tensor parallelism cuts along dimension D into n parts is, seen as a matrix of
`outer` rows (the dimensions before D) and `width` columns (D and those behind it), cut into n bands of columns. ZeRO
then flattens a band row by row and gives each rank a run of its elements. A run is at most three rectangles of the
matrix: the end of a first row, whole rows, the beginning of a last row. What two pieces share is therefore a few
rectangles, whatever the layouts they come from.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any


@dataclass(frozen=True)
class Piece:
    """A run of elements of one rank's part of a parameter."""

    name: str
    """The model's own name of the parameter."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    dim: int | None
    """Dimension that tensor parallelism cuts; None: it does not, and there is one part."""
    n_parts: int
    part: int
    start: int
    """First element, counted in the flattened part."""
    length: int

    def to_json(self) -> list[Any]:
        """As it stands in a file's header and in `index.json`."""
        return [self.name, list(self.shape), self.dim, self.n_parts, self.part, self.start, self.length]

    @classmethod
    def from_json(cls, value: list[Any]) -> "Piece":
        """Raises:
        ValueError: it is not what `to_json` gives.
        """
        name, shape, dim, n_parts, part, start, length = value
        return cls(str(name), tuple(map(int, shape)), dim, int(n_parts), int(part), int(start), int(length))


@dataclass(frozen=True)
class Copy:
    """A rectangle that two pieces share: `n_rows` runs of `n_columns` elements, in elements from each one's first."""

    source: int
    source_stride: int
    target: int
    target_stride: int
    n_rows: int
    n_columns: int


def whole(name: str, shape: tuple[int, ...]) -> Piece:
    """The piece that is all of a parameter."""
    return Piece(name, shape, None, 1, 0, 0, prod(shape))


def shared(source: Piece, target: Piece) -> Iterator[Copy]:
    """What of `target` can be copied from `source`: disjoint rectangles.

    Raises:
        ValueError: the pieces are not of one parameter, or are cut along different dimensions.
    """
    if source.name != target.name or source.shape != target.shape:
        raise ValueError(
            f"{source.name} {source.shape} and {target.name} {target.shape} are not one parameter"
        )
    if None not in (source.dim, target.dim) and source.dim != target.dim:
        raise ValueError(f"{source.name} is cut along dimension {source.dim} and along {target.dim}")
    dim = source.dim if source.dim is not None else target.dim or 0
    width = prod(source.shape[dim:])
    bands = [width // piece.n_parts for piece in (source, target)]
    for row, n_rows, column, n_columns in _rectangles(source, bands[0]):
        for other_row, other_n_rows, other_column, other_n_columns in _rectangles(target, bands[1]):
            top, bottom = max(row, other_row), min(row + n_rows, other_row + other_n_rows)
            left = max(column, other_column)
            right = min(column + n_columns, other_column + other_n_columns)
            if top < bottom and left < right:
                yield Copy(
                    _place(source, bands[0], top, left),
                    bands[0],
                    _place(target, bands[1], top, left),
                    bands[1],
                    bottom - top,
                    right - left,
                )


def _rectangles(piece: Piece, band: int) -> Iterator[tuple[int, int, int, int]]:
    """(row, rows, column, columns) in the whole matrix; `band` columns make a part."""
    if not piece.length:
        return
    left, stop = piece.part * band, piece.start + piece.length
    row, column = divmod(piece.start, band)
    if column:
        yield row, 1, left + column, min(band - column, piece.length)
        row += 1
    n_whole_rows = stop // band - row
    if n_whole_rows > 0:
        yield row, n_whole_rows, left, band
        row += n_whole_rows
    if stop > row * band:
        yield row, 1, left, stop - row * band


def _place(piece: Piece, band: int, row: int, column: int) -> int:
    return row * band + column - piece.part * band - piece.start
