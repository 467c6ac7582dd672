"""Lanes and hashing: pure functions with properties that everything else rests on."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_transformer.data.hashing import Shuffle, hash_array, hash_key, permutation
from dist_transformer.data.order import check_lanes, corpus_seed, count_lanes, lane_shards, window_samples
from dist_transformer.errors import DataError


@given(st.integers(1, 200), st.integers(0, 2**62), st.integers(0, 5), st.booleans())
def test_every_shard_is_in_one_lane_each_epoch(n_shards: int, seed: int, epoch: int, shuffle: bool) -> None:
    n_lanes = count_lanes(n_shards)
    assert 1 <= n_lanes <= n_shards
    lists = [lane_shards(n_shards, n_lanes, lane, seed, epoch, shuffle) for lane in range(n_lanes)]
    assert sorted(shard for shards in lists for shard in shards) == list(range(n_shards))
    assert max(map(len, lists)) - min(map(len, lists)) <= 1


def test_epochs_and_seeds_give_other_orders() -> None:
    orders = {tuple(lane_shards(100, 1, 0, seed, epoch, True)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_lane_counts_divide_well() -> None:
    expected = {
        1: 1,
        2: 2,
        3: 2,
        5: 4,
        9: 8,
        24: 24,
        25: 24,
        36: 36,
        400: 400,
        403: 360,
        404: 360,
        512: 512,
        1000: 1000,
    }
    assert {n: count_lanes(n) for n in expected} == expected


@given(st.lists(st.integers(1, 600), min_size=1, max_size=3), st.integers(1, 300), st.integers(0, 8))
def test_suggestions_for_lanes_work(sizes: list[int], dp_size: int, workers: int) -> None:
    n_shards = {f"corpus{i}": size for i, size in enumerate(sizes)}
    try:
        assert check_lanes(n_shards, dp_size, workers) % (dp_size * max(1, workers)) == 0
    except DataError as error:
        sentence = str(error)
        assert re.match(rf"{dp_size} ranks? x {max(1, workers)} workers? need a multiple of", sentence)
        if found := re.search(r"--shards (\d+)", sentence):
            short = [name for name in n_shards if re.search(rf"\b{name}\b", sentence.partition("prepare")[2])]
            prepared = dict.fromkeys(short or n_shards, int(found[1]))
            assert check_lanes(n_shards | prepared, dp_size, workers)
        if found := re.search(r"data.workers=(\d+)", sentence):
            assert check_lanes(n_shards, dp_size, int(found[1]))
        if found := re.search(r"use (\d+) ranks? x (\d+) worker", sentence):
            assert check_lanes(n_shards, int(found[1]), int(found[2]))
        assert (
            "--shards" in sentence
            or "data.workers=" in sentence
            or " or use " in sentence
            or "use " in sentence
        )


def test_the_sentence_names_the_corpora_that_limit() -> None:
    assert check_lanes({"books": 48, "code": 400, "news": 50}, 8, 6) == 48
    with pytest.raises(DataError) as error:
        check_lanes({"code": 400, "books": 9, "news": 12}, 2, 8)
    assert str(error.value) == (
        "2 ranks x 8 workers need a multiple of 16 lanes; the 9 shards of corpus books give 8: prepare books and news "
        "with --shards 16 or set data.workers=4"
    )


@given(
    st.integers(1, 10**9),
    st.integers(0, 10**12),
    st.integers(1, 5000),
    st.integers(1, 2**20),
    st.integers(1, 5000),
)
def test_windows_are_bounded_by_samples_and_by_tokens(
    n_samples: int, n_tokens: int, window: int, window_tokens: int, n_readers: int
) -> None:
    found = window_samples(n_samples, n_tokens, window, window_tokens, n_readers)
    assert min(window, 16) <= found <= window
    if found > 16:
        assert found * n_tokens <= n_samples * window_tokens
        assert found * n_tokens * n_readers <= n_samples * 64 * 2**20
    elif found < window:
        assert (found + 1) * n_tokens > n_samples * min(window_tokens, 64 * 2**20 // n_readers)


def test_corpora_have_seeds_of_their_own() -> None:
    assert corpus_seed(7, 0) == 7
    assert len({corpus_seed(seed, corpus) for seed in range(5) for corpus in range(5)}) == 25


def test_the_sentence_for_a_cluster() -> None:
    with pytest.raises(DataError) as error:
        check_lanes({"books": 403}, 128, 4)
    assert str(error.value) == (
        "128 ranks x 4 workers need a multiple of 512 lanes; these 403 shards give 360: prepare with "
        "--shards 512 or "
        "use 120 ranks x 3 workers"
    )


PERMUTATION = [0, 7, 5, 3, 6, 2, 1, 4]
KEY = 15020427595393229491
HASHES = [7134611160154358618, 7958955049054603978]
SHUFFLE = [5, 8, 9, 2, 7, 0, 1, 4, 6, 3]


def test_permutations_are_fixed_for_ever() -> None:
    """A resumed run must see the order it began with: these figures may never change."""
    assert permutation(8, 1, 2, 3).tolist() == PERMUTATION
    assert hash_key(1, 2, 3) == KEY
    assert hash_array(5, np.arange(2)).tolist() == HASHES
    assert Shuffle(10, 7)(np.arange(10)).tolist() == SHUFFLE


@given(st.integers(1, 3000), st.integers(0, 2**40))
def test_shuffle_is_a_bijection(n: int, seed: int) -> None:
    assert sorted(Shuffle(n, seed)(np.arange(n)).tolist()) == list(range(n))


def test_hashes_are_uniform() -> None:
    values = hash_array(hash_key(1), np.arange(100_000))
    for shift in (0, 24, 56):
        counts = np.bincount((values >> np.uint64(shift) & np.uint64(255)).astype(np.int64), minlength=256)
        # 255 degrees of freedom: beyond 380 one time in a million.
        assert ((counts - 100_000 / 256) ** 2 / (100_000 / 256)).sum() < 380
