"""Cutting: rows are full, documents are whole where they can be, and no scraps arise."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_transformer.data.objectives.cutting import LONGEST_SCRAP
from dist_transformer.data.tokenizer import TextTokenizer
from tests.unit.data.denoised import documents, restore_all, text_objective, texts


def fill(tokenizer: TextTokenizer, lengths: np.ndarray, **options: Any) -> tuple[float, float]:
    """Shares of the two sides that hold tokens, after the checks that hold for all rows."""
    objective = text_objective(tokenizer, **options)
    window = documents(lengths.tolist())
    pieces, n_pieces = objective.fill_rows(window, np.random.default_rng(1).permutation(len(lengths)))
    row = np.repeat(np.arange(len(n_pieces)), n_pieces)
    sides = pieces.source_lengths, pieces.target_lengths
    limits = objective.max_source_len, objective.max_target_len
    for side, limit in zip(sides, limits, strict=True):
        assert np.bincount(row, side).max() <= limit
    assert np.array_equal(np.bincount(pieces.sample, pieces.length).astype(np.int64), lengths)
    source, target = (side.sum() / limit / len(n_pieces) for side, limit in zip(sides, limits, strict=True))
    return float(source), float(target)


def uniform(low: int, high: int, n_tokens: int) -> np.ndarray:
    """Documents of low to high tokens, about so many tokens in all."""
    return np.random.default_rng(0).integers(low, high + 1, n_tokens * 2 // (low + high))


@pytest.mark.parametrize("n_tokens", [65_536, 262_144])
@pytest.mark.parametrize(
    ("low", "high", "rows"),
    [
        (250, 750, (512, 115)),  # one and a half documents a row
        (200, 284, (512, 116)),  # two documents leave a gap, three do not fit
        (500, 568, (512, 114)),
        (200, 4000, (512, 115)),
        (250, 750, (1024, 231)),
        (250, 750, (128, 29)),
    ],
)
def test_rows_of_long_documents_are_full(
    tokenizer: TextTokenizer, n_tokens: int, low: int, high: int, rows: tuple[int, int]
) -> None:
    shares = fill(tokenizer, uniform(low, high, n_tokens), max_source_len=rows[0], max_target_len=rows[1])
    assert min(shares) > 0.97, shares


def test_rows_of_ul2_are_full(tokenizer: TextTokenizer) -> None:
    """A row takes complementary pieces: regular denoisers need the source side, extreme ones the target side."""
    options = {"objective": "ul2", "max_source_len": 512, "max_target_len": 256}
    shares = fill(tokenizer, uniform(250, 750, 1 << 20), **options)
    assert min(shares) > 0.97, shares


def test_rows_of_prefixes_are_full(tokenizer: TextTokenizer) -> None:
    """On the side that the draws of a window happen to need more of."""
    options = {"objective": "prefix_lm", "max_source_len": 512, "max_target_len": 512}
    for low, high in ((250, 750), (20, 120)):
        shares = fill(tokenizer, uniform(low, high, 1 << 19), **options)
        assert max(shares) > 0.97, shares


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 1500), min_size=1, max_size=40),
    rows=st.sampled_from([(512, 114), (512, 256), (128, 128)]),
    name=st.sampled_from(["span_corruption", "ul2", "prefix_lm"]),
)
def test_no_scraps(tokenizer: TextTokenizer, lengths: list[int], rows: tuple[int, int], name: str) -> None:
    objective = text_objective(tokenizer, objective=name, max_source_len=rows[0], max_target_len=rows[1])
    smallest = objective._cutter.scrap
    assert smallest == min(LONGEST_SCRAP, objective.longest_piece() // 8) >= 8
    window = documents(lengths)
    pieces, _ = objective.fill_rows(window, np.arange(len(lengths)))
    n_parts = np.bincount(pieces.sample)
    assert (pieces.length[n_parts[pieces.sample] > 1] >= smallest).all()
    short = np.array(lengths) < 2 * smallest
    assert (n_parts[short] == 1).all(), "short documents are whole"


def test_few_documents_are_cut(tokenizer: TextTokenizer) -> None:
    objective = text_objective(tokenizer, max_target_len=115)
    lengths = uniform(250, 750, 262_144)
    pieces, n_pieces = objective.fill_rows(documents(lengths.tolist()), np.arange(len(lengths)))
    # A row's end cuts a document at most once: T5 cuts once a row too.
    assert len(pieces) - len(lengths) <= 1.1 * len(n_pieces)
    short = np.random.default_rng(0).integers(8, 120, 4096)
    pieces, n_pieces = objective.fill_rows(documents(short.tolist()), np.arange(len(short)))
    assert len(pieces) < 1.12 * len(short)


@pytest.mark.parametrize("name", ["span_corruption", "ul2", "prefix_lm"])
def test_a_window_gives_back_every_token_once(tokenizer: TextTokenizer, name: str) -> None:
    objective = text_objective(tokenizer, objective=name, max_source_len=128, max_target_len=64)
    window = documents(np.random.default_rng(2).integers(0, 700, 300).tolist())
    found, places = restore_all(objective, window, objective.fill_rows(window, np.arange(300))[0])
    assert found == texts(window)
    assert len(set(places)) == len(places)


def test_the_same_window_gives_the_same_rows(tokenizer: TextTokenizer) -> None:
    objective = text_objective(tokenizer, objective="ul2", max_target_len=256)
    window, order = documents(uniform(20, 900, 40_000).tolist()), np.arange(86)
    first, n_first = objective.fill_rows(window, order)
    again, n_again = objective.fill_rows(window, order)
    assert all(np.array_equal(getattr(first, name), getattr(again, name)) for name in vars(first))
    assert np.array_equal(n_first, n_again)
    other, _ = objective.fill_rows(window, order[::-1].copy())
    assert not np.array_equal(first.sample, other.sample)
