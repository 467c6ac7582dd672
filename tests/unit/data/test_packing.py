"""Packing: no row overflows, no sample is lost, and rows are full."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_transformer.config.data import DataConfig
from dist_transformer.data.packing import bucket, pack
from dist_transformer.data.reader import RawWindow
from dist_transformer.data.row_lengths import measure_fill, suggest_row_lengths
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


def test_the_last_two_samples_fill_a_row_to_the_last_token() -> None:
    # The largest that fits would be 7, and then one position of the row would stay free.
    source = np.array([12, 7, 6, 5, 3, 3, 2, 2])
    order, n_samples = pack(source, source, 20, 20)
    rows = np.split(source[order], np.cumsum(n_samples)[:-1])
    assert [int(row.sum()) for row in rows] == [20, 20]


@pytest.mark.parametrize(("row_len", "least"), [(64, 0.985), (128, 0.989)])
def test_rows_of_pairs_of_like_lengths_are_full(row_len: int, least: float) -> None:
    """Lengths as in a corpus of captions: about 15 tokens, the sides correlated."""
    random = np.random.default_rng(0)
    source = np.clip(random.gamma(9.0, 15 / 9, 1500).round(), 4, 50).astype(np.int64)
    target = np.clip((source * random.gamma(25.0, 1 / 25, 1500)).round(), 4, 50).astype(np.int64)
    assert min(fill(source, target, row_len, round(row_len * target.sum() / source.sum()))) > least


def test_nothing_to_pack() -> None:
    order, n_samples = pack(np.zeros(0, np.int64), np.zeros(0, np.int64), 8, 8)
    assert len(order) == len(n_samples) == 0


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 30)), max_size=60),
    st.integers(30, 200),
)
def test_buckets_hold_every_sample_and_are_bounded(lengths: list[tuple[int, int]], n_tokens: int) -> None:
    source, target = np.array(lengths, np.int64).reshape(-1, 2).T
    order, n_samples = bucket(source, target, n_tokens)
    assert sorted(order.tolist()) == list(range(len(source)))
    assert n_samples.sum() == len(source) and (n_samples > 0).all()
    starts = np.cumsum(n_samples) - n_samples
    for i, start in enumerate(starts.tolist()):
        mine = order[start : start + int(n_samples[i])]
        longest = max(source[mine].max(), target[mine].max())
        assert len(mine) * longest <= n_tokens or len(mine) == 1
        if i + 1 < len(starts):
            following = order[start + len(mine)]
            assert (len(mine) + 1) * max(source[following], target[following]) > n_tokens, "room was left"
    ties = np.flatnonzero((np.diff(source[order]) == 0) & (np.diff(target[order]) == 0))
    assert (order[ties] < order[ties + 1]).all(), "equal samples stay in the order given"


def tokenised(folder: str, sides: tuple[str, str], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of both sides, without EOS, of the first pairs of a corpus, in a fixed random order."""
    paths = [CORPORA / folder / f"train.{side}" for side in sides]
    if not paths[0].is_file():
        pytest.skip(f"{paths[0]} is not there")
    texts = [path.read_text(encoding="utf-8").split("\n")[:12_000] for path in paths]
    tokenizer = TextTokenizer.train(iter(texts[0][:4000] + texts[1][:4000]), vocab_size)
    source, target = (np.array([len(ids) for ids in tokenizer.encode_batch(side)]) for side in texts)
    order = np.random.default_rng(0).permutation(len(source))
    return source[order], target[order]


@pytest.fixture(scope="module")
def multi30k() -> tuple[np.ndarray, np.ndarray]:
    return tokenised("multi30k", ("en", "de"), 8000)


@pytest.fixture(scope="module")
def e2e() -> tuple[np.ndarray, np.ndarray]:
    return tokenised("e2e", ("mr", "ref"), 4000)


@pytest.fixture(scope="module")
def novels() -> tuple[np.ndarray, ...]:
    path = CORPORA / "novels" / "train-00.txt"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    paragraphs = [line for line in path.read_text(encoding="utf-8").split("\n") if line][:9000]
    tokenizer = TextTokenizer.train(iter(paragraphs[::20]), 8000)
    lengths = np.array([len(ids) for ids in tokenizer.encode_batch(paragraphs)])
    return (np.random.default_rng(0).permutation(lengths),)


def windows_of(sides: tuple[np.ndarray, ...], n_tokens: int, n_windows: int) -> list[RawWindow]:
    """Windows of so many tokens, or of 4096 samples; only their lengths are there."""
    n = min(4096, int(n_tokens / sum(side.mean() for side in sides)))
    assert len(sides[0]) >= n * n_windows
    no_tokens = np.zeros(0, np.uint16)
    return [
        RawWindow(i, tuple((no_tokens, side[i : i + n]) for side in sides), np.arange(i, i + n))
        for i in range(0, n * n_windows, n)
    ]


@pytest.mark.parametrize(("corpus", "max_source_len"), [("multi30k", 256), ("e2e", 512), ("novels", 512)])
def test_rows_of_suggested_lengths_are_full(
    corpus: str, max_source_len: int, tokenizer: TextTokenizer, request: pytest.FixtureRequest
) -> None:
    sides = request.getfixturevalue(corpus)
    objective = "span_corruption" if corpus == "novels" else "pairs"
    data = DataConfig(train=corpus, objective=objective, max_source_len=max_source_len)
    [part] = data.corpora()
    found = suggest_row_lengths(data, part, tokenizer, windows_of(sides, 262_144, 1))
    assert found.max_source_len == max_source_len
    assert found.emptier > 0.97, found
    # The rest of the corpus, and smaller windows, fill rows of these lengths too.
    suggested = data.model_copy(update={"max_target_len": found.max_target_len})
    for n_tokens, n_windows in ((262_144, 2), (65_536, 4)):
        measured = measure_fill(suggested, part, tokenizer, windows_of(sides, n_tokens, n_windows))
        assert measured.emptier > 0.97, measured
    wrong = data.model_copy(update={"max_target_len": found.max_target_len * 5 // 4})
    assert measure_fill(wrong, part, tokenizer, windows_of(sides, 262_144, 1)).target < 0.85


def test_the_source_length_is_suggested_for_a_target_length(
    e2e: tuple[np.ndarray, np.ndarray], tokenizer: TextTokenizer
) -> None:
    data = DataConfig(train="e2e", objective="pairs", max_target_len=256)
    windows = windows_of(e2e, 262_144, 1)
    found = suggest_row_lengths(data, data.corpora()[0], tokenizer, windows, keep="target")
    assert found.max_target_len == 256 and found.emptier > 0.97, found


@pytest.mark.parametrize(("corpus", "n_tokens", "most"), [("multi30k", 2048, 0.12), ("e2e", 2048, 0.13)])
def test_buckets_have_little_padding(
    corpus: str, n_tokens: int, most: float, request: pytest.FixtureRequest
) -> None:
    source, target = (side[:4096] + 1 for side in request.getfixturevalue(corpus))
    order, n_samples = bucket(source, target, n_tokens)
    starts = np.cumsum(n_samples) - n_samples
    n_positions = sum(
        (np.maximum.reduceat(side[order], starts) * n_samples).sum() for side in (source, target)
    )
    assert 1 - (source.sum() + target.sum()) / n_positions < most
