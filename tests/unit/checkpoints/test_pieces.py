"""Any way of cutting a parameter gives back every element of any other way, exactly once."""

from collections.abc import Iterator
from itertools import pairwise
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_transformer.checkpoints.pieces import Piece, shared, whole

NAME = "encoder.layers.0.ffn.down.weight"


def cut(shape: tuple[int, ...], dim: int | None, n_parts: int, bounds: list[int]) -> Iterator[Piece]:
    """Every part along `dim`, each cut into runs at `bounds` (those that lie inside it)."""
    length = prod(shape) // n_parts
    edges = sorted({0, length, *(bound % (length + 1) for bound in bounds)})
    for part in range(n_parts):
        for start, stop in pairwise(edges):
            yield Piece(NAME, shape, dim, n_parts, part, start, stop - start)


def contents(piece: Piece, values: np.ndarray) -> np.ndarray:
    """A piece's elements by numpy's own means: the part along its dimension, flattened, the run out of it."""
    part = values if piece.dim is None else np.split(values, piece.n_parts, axis=piece.dim)[piece.part]
    return part.reshape(-1)[piece.start : piece.start + piece.length]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Piece], list[Piece]]:
    """A shape, and two ways of cutting it along the same dimension, or not at all."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    dim = draw(st.integers(0, len(shape) - 1))
    shape = tuple(n * 4 if i == dim else n for i, n in enumerate(shape))
    sides = []
    for _ in range(2):
        n_parts = draw(st.sampled_from([1, 2, 4]))
        marked = dim if n_parts > 1 or draw(st.booleans()) else None
        bounds = draw(st.lists(st.integers(0, prod(shape)), max_size=5))
        sides.append(list(cut(shape, marked, n_parts, bounds)))
    return shape, sides[0], sides[1]


@given(layouts())
def test_every_element_once(case: tuple[tuple[int, ...], list[Piece], list[Piece]]) -> None:
    shape, sources, targets = case
    values = np.arange(prod(shape)).reshape(shape)
    for target in targets:
        found = np.full(target.length, -1)
        n_copied = 0
        for source in sources:
            read = contents(source, values)
            for copy in shared(source, target):
                for row in range(copy.n_rows):
                    begin, into = (
                        copy.source + row * copy.source_stride,
                        copy.target + row * copy.target_stride,
                    )
                    assert begin >= 0
                    assert into >= 0
                    found[into : into + copy.n_columns] = read[begin : begin + copy.n_columns]
                    n_copied += copy.n_columns
        assert n_copied == target.length
        assert np.array_equal(found, contents(target, values))


@given(layouts())
def test_a_few_rectangles_whatever_the_size(case: tuple[tuple[int, ...], list[Piece], list[Piece]]) -> None:
    _, sources, targets = case
    for source in sources:
        for target in targets:
            assert len(list(shared(source, target))) <= 9


def test_json_and_back() -> None:
    piece = Piece(NAME, (8, 6), 1, 2, 1, 3, 7)
    assert Piece.from_json(piece.to_json()) == piece


def test_what_does_not_belong_together() -> None:
    with pytest.raises(ValueError, match="not one parameter"):
        list(shared(whole(NAME, (4, 2)), whole(NAME, (2, 4))))
    with pytest.raises(ValueError, match="along dimension 0 and along 1"):
        list(shared(Piece(NAME, (4, 4), 0, 2, 0, 0, 8), Piece(NAME, (4, 4), 1, 2, 0, 0, 8)))
