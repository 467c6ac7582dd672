"""Span corruption against T5's own algorithm and figures; pairs and their policies."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_transformer.data.objectives import Pairs, Samples, SpanCorruption
from dist_transformer.errors import DataError

SENTINELS = tuple(range(900, 1000))


def corruption(
    max_source_len: int = 512, max_target_len: int = 114, n_sentinels: int = 100, **changes: float
) -> SpanCorruption:
    values = {"density": 0.15, "mean_span": 3.0} | changes
    return SpanCorruption(
        **values,
        max_source_len=max_source_len,
        max_target_len=max_target_len,
        eos_id=1,
        sentinel_ids=SENTINELS[:n_sentinels],
    )


def split(samples: Samples) -> list[tuple[list[int], list[int]]]:
    sources = np.split(samples.source_tokens, np.cumsum(samples.source_lengths)[:-1])
    targets = np.split(samples.target_tokens, np.cumsum(samples.target_lengths)[:-1])
    return [(s.tolist(), t.tolist()) for s, t in zip(sources, targets, strict=True)]


def restore(source: list[int], target: list[int]) -> list[int]:
    """The document that a corrupted source and its target came from."""
    assert source[-1] == 1 and target[-1] == 1
    spans: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token >= SENTINELS[0]:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    assert all(spans.values()), "a sentinel without tokens"
    sentinels = [token for token in source if token >= SENTINELS[0]]
    assert sentinels == list(spans) == list(SENTINELS[: len(spans)])
    return [x for token in source[:-1] for x in spans.get(token, [token])]


def documents(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.array(lengths, np.int64)
    return np.random.default_rng(0).integers(3, 900, int(sizes.sum())).astype(np.uint16), sizes


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 300), max_size=8),
    st.sampled_from([(512, 114, 100), (64, 20, 100), (512, 512, 3), (8, 100, 100), (3, 3, 1)]),
    st.sampled_from([(0.15, 3.0), (0.5, 1.0), (0.5, 32.0), (0.01, 3.0), (0.9, 2.0)]),
    st.integers(0, 2**63),
)
def test_source_and_target_restore_the_document(
    lengths: list[int], rows: tuple[int, int, int], noise: tuple[float, float], key: int
) -> None:
    objective = corruption(*rows, density=noise[0], mean_span=noise[1])
    try:
        longest = objective.longest_piece()
    except DataError:
        return
    tokens, sizes = documents(lengths)
    samples = objective(tokens, sizes, np.arange(len(sizes)), key)
    pieces = split(samples) if len(samples) else []
    assert [token for piece in pieces for token in restore(*piece)] == tokens.tolist()
    assert all(len(source) <= rows[0] and len(target) <= rows[1] for source, target in pieces)
    assert all(len(target) >= 3 for _, target in pieces)
    assert samples.n_dropped == lengths.count(0)
    assert int(samples.is_split.sum()) == sum(length > longest for length in lengths)


def test_statistics_are_those_of_the_paper() -> None:
    """15 % of tokens in spans of mean 3 (Raffel et al. 2020, 3.3.4), and 512 tokens of source from 568 to
    114.
    """
    objective = corruption()
    assert objective.longest_piece() == 568
    n = 2000
    tokens, sizes = documents([568] * n)
    samples = objective(tokens, sizes, np.arange(n), 7)
    assert set(samples.source_lengths.tolist()) == {512} and set(samples.target_lengths.tolist()) == {114}
    is_sentinel = samples.target_tokens >= SENTINELS[0]
    n_noise = int((~is_sentinel).sum()) - n
    assert n_noise / tokens.size == pytest.approx(0.15, abs=0.001)
    assert n_noise / is_sentinel.sum() == pytest.approx(3.0, abs=0.05)


def test_span_lengths_follow_t5s_random_segmentation() -> None:
    """All cuts of n items into k parts are equally likely: compared with T5's algorithm, which shuffles the
    cuts.
    """
    n_noise, n_spans = 9, 3
    tokens, sizes = documents([60] * 20_000)
    objective = corruption()
    assert [int(x[0]) for x in objective.plan(np.array([60]))] == [n_noise, n_spans, 51]
    firsts = []
    for source, target in split(objective(tokens, sizes, np.arange(len(sizes)), 3)):
        firsts.append((source.index(SENTINELS[0]), target.index(SENTINELS[1]) - 1))
    kept, noise = np.array(firsts).T
    rng = np.random.default_rng(1)

    def t5_first_length(n_items: int) -> np.ndarray:
        cuts = np.arange(n_items - 1) < n_spans - 1
        shuffled = rng.permuted(np.tile(cuts, (20_000, 1)), axis=1)
        return np.asarray(shuffled.argmax(1) + 1)

    for ours, n_items in ((noise, n_noise), (kept, 51)):
        theirs = t5_first_length(n_items)
        largest_gap = max(abs((ours <= x).mean() - (theirs <= x).mean()) for x in range(n_items))
        assert largest_gap < 1.95 * np.sqrt(2 / 20_000), "Kolmogorov-Smirnov, one time in a thousand"


def test_noise_depends_on_key_index_and_piece_alone() -> None:
    objective = corruption(64, 24)
    tokens, sizes = documents([50, 400, 50, 7])
    together = split(objective(tokens, sizes, np.array([10, 11, 12, 13]), 5))
    alone = split(objective(tokens[450:500], sizes[2:3], np.array([12]), 5))
    assert alone[0] == together[-2]
    assert split(objective(tokens[450:500], sizes[2:3], np.array([12]), 6)) != alone
    assert split(objective(tokens[450:500], sizes[2:3], np.array([13]), 5)) != alone
    same = np.tile(tokens[:44], 3), np.array([132])
    pieces = split(objective(*same, np.array([0]), 5))
    shapes = {tuple(token >= SENTINELS[0] for token in source) for source, _ in pieces[:-1]}
    assert len(shapes) == len(pieces) - 1, "each piece of a document has its own noise"


def test_documents_of_one_and_two_tokens() -> None:
    (one, two) = split(corruption()(np.array([5, 6, 7], np.uint16), np.array([1, 2]), np.arange(2), 1))
    assert one == ([900, 1], [900, 5, 1])
    assert two == ([6, 900, 1], [900, 7, 1])


def test_sentinels_bound_the_pieces_not_the_noise() -> None:
    objective = corruption(4096, 4096, n_sentinels=4)
    longest = objective.longest_piece()
    n_noise, n_spans, _ = objective.plan(np.array([longest]))
    assert n_spans[0] == 4 and n_noise[0] / longest == pytest.approx(0.15, abs=0.01)


def test_rows_too_short_for_span_corruption() -> None:
    with pytest.raises(
        DataError, match="does not fit rows of 512 source and 2 target tokens with 100 sentinels"
    ):
        corruption(512, 2).longest_piece()
    with pytest.raises(DataError, match="with 0 sentinels: use a tokenizer with <extra_id_N> tokens"):
        corruption(n_sentinels=0).longest_piece()


@pytest.mark.parametrize("policy", ["truncate", "drop", "error"])
def test_pairs_too_long(policy: str) -> None:
    objective = Pairs(5, 4, policy, eos_id=1)  # type: ignore[arg-type]
    source, target = np.arange(10, 22, dtype=np.uint16), np.arange(30, 38, dtype=np.uint16)
    arguments = (source, np.array([4, 5, 3]), target, np.array([3, 1, 4]), "shard s")
    if policy == "error":
        with pytest.raises(DataError, match="shard s: a pair of 5 source and 1 target tokens"):
            objective(*arguments)
        return
    samples = objective(*arguments)
    expected = [([10, 11, 12, 13, 1], [30, 31, 32, 1])]
    if policy == "truncate":
        expected += [([14, 15, 16, 17, 1], [33, 1]), ([19, 20, 21, 1], [34, 35, 36, 1])]
    assert split(samples) == expected
    assert samples.n_dropped == (2 if policy == "drop" else 0)
    assert samples.is_truncated.tolist() == ([False, True, True] if policy == "truncate" else [False])
