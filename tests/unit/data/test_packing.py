"""Packing: no row overflows, no sample is lost, and rows are full."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_transformer.data.objectives import SpanCorruption
from dist_transformer.data.packing import pack
from dist_transformer.data.tokenizer import TextTokenizer
from tests.unit.data.conftest import CORPORA


def fill(
    source: np.ndarray, target: np.ndarray, max_source_len: int, max_target_len: int
) -> tuple[float, float]:
    order, n_samples = pack(source, target, max_source_len, max_target_len)
    assert sorted(order.tolist()) == list(range(len(source)))
    starts = np.cumsum(n_samples) - n_samples
    assert np.add.reduceat(source[order], starts).max() <= max_source_len
    assert np.add.reduceat(target[order], starts).max() <= max_target_len
    n_rows = len(n_samples)
    return source.sum() / (n_rows * max_source_len), target.sum() / (n_rows * max_target_len)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 30)), min_size=1, max_size=60))
def test_rows_hold_every_sample_and_do_not_overflow(lengths: list[tuple[int, int]]) -> None:
    source, target = np.array(lengths).T
    fill(source, target, 20, 30)
    order, n_samples = pack(source, target, 20, 30)
    again = pack(source, target, 20, 30)
    assert (order == again[0]).all() and (n_samples == again[1]).all()


def test_nothing_to_pack() -> None:
    order, n_samples = pack(np.zeros(0, np.int64), np.zeros(0, np.int64), 8, 8)
    assert len(order) == len(n_samples) == 0


def test_a_window_of_4096_is_fast() -> None:
    rng = np.random.default_rng(0)
    source, target = rng.integers(2, 100, 4096), rng.integers(2, 100, 4096)
    seconds = []
    for _ in range(3):
        started = time.process_time()
        pack(source, target, 512, 512)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.4, "0.1 s on the machine where it was written"


@pytest.fixture(scope="module")
def multi30k() -> tuple[np.ndarray, np.ndarray]:
    folder = CORPORA / "multi30k"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    sides = [
        (folder / f"train.{side}").read_text(encoding="utf-8").split("\n")[:8192] for side in ("en", "de")
    ]
    tokenizer = TextTokenizer.train(iter(sides[0][:4000] + sides[1][:4000]), 8000)
    source, target = (np.array([len(ids) + 1 for ids in tokenizer.encode_batch(side)]) for side in sides)
    return source[:4096], target[:4096]


@pytest.mark.parametrize("longest", [128, 256, 512])
def test_multi30k_rows_are_full(multi30k: tuple[np.ndarray, np.ndarray], longest: int) -> None:
    source, target = multi30k
    ratio = target.sum() / source.sum()
    shares = fill(source, target, longest, round(longest * ratio))
    assert min(shares) > 0.97, shares
    # Equal sides: the longer language fills its side, the other follows by the ratio.
    shares = fill(source, target, longest, longest)
    assert max(shares) > 0.97, shares


@pytest.mark.parametrize(("max_source_len", "max_target_len"), [(512, 120), (512, 114), (256, 61)])
def test_novels_rows_are_full(tokenizer: TextTokenizer, max_source_len: int, max_target_len: int) -> None:
    path = CORPORA / "novels" / "train-00.txt"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    # About 4.2 characters make a token of a trained vocabulary of 32,000.
    lengths = np.array(
        [max(1, len(line) * 5 // 21) for line in path.read_text(encoding="utf-8").split("\n") if line]
    )
    lengths = np.random.default_rng(0).permutation(lengths)[:4096]
    objective = SpanCorruption(0.15, 3.0, max_source_len, max_target_len, 1, tuple(range(100)))
    samples = objective(np.zeros(int(lengths.sum()), np.uint16), lengths, np.arange(4096), 1)
    shares = fill(samples.source_lengths, samples.target_lengths, max_source_len, max_target_len)
    possible = np.array(
        [samples.source_lengths.sum() / max_source_len, samples.target_lengths.sum() / max_target_len]
    )
    assert min(shares / (possible / possible.max())) > 0.97, shares
