"""Objectives: what they make of text is what their papers say, and it can be undone."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_transformer.config.data import UL2_DENOISERS, DataConfig
from dist_transformer.data.objectives import Pairs, Window, build_objective
from dist_transformer.data.objectives.denoisers import (
    DRAW_BITS,
    Denoiser,
    PieceSizes,
    draw_of,
    draws_of,
)
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.errors import DataError
from tests.unit.data.denoised import (
    cut_pairs,
    documents,
    pairs_of,
    restore_all,
    text_objective,
    texts,
)

KS_ONE_IN_A_THOUSAND = 1.95
"""Times sqrt(1 / n): what a Kolmogorov-Smirnov distance exceeds by chance once in a thousand."""


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 300), max_size=8),
    rows=st.sampled_from([(512, 114), (64, 20), (8, 100), (4, 4), (30, 200)]),
    options=st.sampled_from(
        [
            {"noise_density": 0.15, "mean_noise_span": 3.0},
            {"noise_density": 0.5, "mean_noise_span": 1.0},
            {"noise_density": 0.01, "mean_noise_span": 3.0},
            {"noise_density": 0.9, "mean_noise_span": 2.0},
            {"objective": "prefix_lm"},
            {"objective": "ul2"},
            {"objective": "ul2", "mode_tokens": False},
        ]
    ),
    key=st.integers(0, 2**63),
    packed=st.booleans(),
)
def test_pieces_restore_the_documents_and_fit_rows(
    tokenizer: TextTokenizer,
    lengths: list[int],
    rows: tuple[int, int],
    options: dict[str, Any],
    key: int,
    packed: bool,
) -> None:
    objective = text_objective(tokenizer, max_source_len=rows[0], max_target_len=rows[1], **options)
    window = documents(lengths, key)
    order = np.random.default_rng(0).permutation(len(lengths))
    if packed:
        pieces, n_pieces = objective.fill_rows(window, order)
        assert n_pieces.sum() == len(pieces) and (n_pieces > 0).all()
        row = np.repeat(np.arange(len(n_pieces)), n_pieces)
        assert np.bincount(row, pieces.source_lengths).max(initial=0) <= rows[0]
        assert np.bincount(row, pieces.target_lengths).max(initial=0) <= rows[1]
    else:
        pieces = objective.cut(window)
        assert (pieces.source_lengths <= rows[0]).all() and (pieces.target_lengths <= rows[1]).all()
    found, _ = restore_all(objective, window, pieces)
    assert found == texts(window)
    n_parts = np.bincount(pieces.sample, minlength=len(lengths))
    assert int(pieces.is_split.sum()) == int((n_parts > 1).sum())
    assert (pieces.target_lengths >= 2).all() and not pieces.is_truncated.any()


def test_span_corruption_has_the_papers_statistics(tokenizer: TextTokenizer) -> None:
    """15 % of tokens in spans of mean 3 (Raffel et al. 2020, 3.3.4), and 512 tokens of source from 568 to 114."""
    objective = text_objective(tokenizer)
    assert objective.longest_piece() == 568
    n = 2000
    window = documents([568] * n)
    samples = objective.write(window, objective.cut(window))
    assert set(samples.source_lengths.tolist()) == {512} and set(samples.target_lengths.tolist()) == {114}
    is_sentinel = np.isin(samples.target_tokens, objective.sentinel_ids)
    n_noise = int((~is_sentinel).sum()) - n
    assert n_noise / (568 * n) == pytest.approx(0.15, abs=0.001)
    assert n_noise / is_sentinel.sum() == pytest.approx(3.0, abs=0.05)


@pytest.mark.parametrize(
    ("max_source_len", "max_target_len", "longest"), [(64, 14, 70), (256, 58, 284), (1024, 229, 1137)]
)
def test_lengths_of_t5(
    tokenizer: TextTokenizer, max_source_len: int, max_target_len: int, longest: int
) -> None:
    """As `random_spans_helper` computes them."""
    objective = text_objective(tokenizer, max_source_len=max_source_len, max_target_len=max_target_len)
    assert objective.longest_piece() == longest
    [piece] = objective.cut(documents([longest])).source_lengths.tolist()
    assert piece == max_source_len


def test_span_lengths_follow_t5s_random_segmentation(tokenizer: TextTokenizer) -> None:
    """All cuts of n items into k parts are equally likely: compared with T5's algorithm, which shuffles the
    cuts.
    """
    n_noise, n_spans, n_kept = 9, 3, 51
    objective = text_objective(tokenizer)
    sentinels = objective.sentinel_ids
    firsts = [
        (source.index(sentinels[0]), target.index(sentinels[1]) - 1)
        for source, target in cut_pairs(objective, documents([60] * 20_000, 3))
    ]
    rng = np.random.default_rng(1)

    def t5_first_length(n_items: int) -> np.ndarray:
        cuts = np.arange(n_items - 1) < n_spans - 1
        shuffled = rng.permuted(np.tile(cuts, (20_000, 1)), axis=1)
        return np.asarray(shuffled.argmax(1) + 1)

    for ours, n_items in zip(np.array(firsts).T, (n_kept, n_noise), strict=True):
        theirs = t5_first_length(n_items)
        largest_gap = max(abs((ours <= x).mean() - (theirs <= x).mean()) for x in range(n_items))
        assert largest_gap < KS_ONE_IN_A_THOUSAND * np.sqrt(2 / 20_000)


def ks_to_uniform(values: np.ndarray, low: int, high: int) -> float:
    """Largest distance of the distribution of integers from the uniform one on low, ..., high."""
    steps = np.arange(low, high + 1)
    return float(max(abs((values <= x).mean() - (x - low + 1) / (high - low + 1)) for x in steps))


@pytest.mark.parametrize("n", [100, 101])
def test_prefixes_are_cut_uniformly(tokenizer: TextTokenizer, n: int) -> None:
    """T5's `random_prefix_noise_mask`: a prefix of 1 to n - 1 tokens, all equally likely; EOS on both sides."""
    objective = text_objective(tokenizer, objective="prefix_lm", max_target_len=512)
    pairs = cut_pairs(objective, documents([n] * 5000))
    prefixes = np.array([len(source) - 1 for source, _ in pairs])
    assert all(len(source) + len(target) == n + 2 for source, target in pairs)
    assert prefixes.min() == 1 and prefixes.max() == n - 1
    assert ks_to_uniform(prefixes, 1, n - 1) < KS_ONE_IN_A_THOUSAND / np.sqrt(5000)


def test_prefixes_are_cut_uniformly_in_packed_rows(tokenizer: TextTokenizer) -> None:
    """Choosing pieces by how they fill rows does not choose among draws: every document is used up."""
    objective = text_objective(tokenizer, objective="prefix_lm", max_target_len=512)
    window = documents(np.random.default_rng(0).integers(20, 900, 3000).tolist())
    pieces, _ = objective.fill_rows(window, np.arange(3000))
    draws = draws_of(objective._document_keys(window)[pieces.sample], pieces.begin)
    shares = (draws >> np.uint64(DRAW_BITS - 8)).astype(np.int64)
    assert ks_to_uniform(shares, 0, 255) < KS_ONE_IN_A_THOUSAND / np.sqrt(len(pieces))


def test_ul2_is_the_papers_mixture(tokenizer: TextTokenizer) -> None:
    """Tay et al. 2022, table 1: seven denoisers in equal shares, with their densities, spans and mode tokens."""
    n, length = 7000, 512
    objective = text_objective(tokenizer, objective="ul2", max_source_len=1024, max_target_len=1024)
    window = documents([length] * n)
    kinds = objective._kinds(window)
    counts = np.bincount(kinds, minlength=7)
    # Chi-square with 6 degrees of freedom: exceeded once in a thousand.
    assert ((counts - n / 7) ** 2 / (n / 7)).sum() < 22.5
    pairs = cut_pairs(objective, window)
    for kind, denoiser in enumerate(UL2_DENOISERS):
        mine = [pairs[i] for i in np.flatnonzero(kinds == kind)]
        assert {source[0] for source, _ in mine} == {tokenizer.mode_ids[denoiser.mode]}
        marks = np.array([sum(t in objective.sentinel_ids for t in target) for _, target in mine])
        lost = np.array([len(target) - 1 for _, target in mine]) - marks
        if denoiser.mean_span is None:
            assert marks.max() == 0
            # Uniform with a mean of a quarter, as T5 draws prefixes around a half.
            assert ks_to_uniform(lost, 1, length // 2 - 1) < KS_ONE_IN_A_THOUSAND / np.sqrt(len(lost))
            assert lost.mean() / length == pytest.approx(denoiser.density, abs=0.02)
        else:
            assert lost.mean() / length == pytest.approx(denoiser.density, abs=0.005)
            assert lost.sum() / marks.sum() == pytest.approx(
                denoiser.mean_span, rel=0.25 if denoiser.mean_span == 64 else 0.05
            )


def test_denoisers_are_drawn_by_weight(tokenizer: TextTokenizer) -> None:
    denoisers = [
        {"mode": "R", "mean_span": 3, "density": 0.15, "weight": 3},
        {"mode": "S", "density": 0.25, "weight": 1},
    ]
    objective = text_objective(tokenizer, objective="ul2", denoisers=denoisers)
    sources = [source[0] for source, _ in cut_pairs(objective, documents([50] * 4000))]
    assert sources.count(tokenizer.mode_ids["R"]) / 4000 == pytest.approx(0.75, abs=0.03)
    assert sources.count(tokenizer.mode_ids["S"]) / 4000 == pytest.approx(0.25, abs=0.03)


def test_all_pieces_of_a_document_have_one_denoiser(tokenizer: TextTokenizer) -> None:
    objective = text_objective(tokenizer, objective="ul2", max_source_len=64, max_target_len=64)
    window = documents([700] * 20)
    pieces, _ = objective.fill_rows(window, np.arange(20))
    modes: dict[int, set[int]] = {}
    for sample, (source, _) in zip(pieces.sample.tolist(), pairs_of(objective, window, pieces), strict=True):
        modes.setdefault(sample, set()).add(source[0])
    assert all(len(found) == 1 for found in modes.values())
    assert len(set.union(*modes.values())) == 3


@pytest.mark.parametrize("name", ["span_corruption", "prefix_lm", "ul2"])
def test_noise_depends_on_key_index_and_place_alone(tokenizer: TextTokenizer, name: str) -> None:
    objective = text_objective(tokenizer, objective=name, max_source_len=64, max_target_len=48)
    window = documents([50, 400, 50, 7], first=10)
    tokens, _ = window.fields[0]
    together = cut_pairs(objective, window)

    def alone(index: int, key: int) -> list[tuple[list[int], list[int]]]:
        one = Window(((tokens[450:500], np.array([50])),), np.array([index]), key)
        return cut_pairs(objective, one)

    own = alone(12, 5)
    places = objective.cut(window).sample.tolist()
    assert own == [pair for pair, sample in zip(together, places, strict=True) if sample == 2]
    assert alone(12, 6) != own and alone(13, 5) != own
    # Equal text at another place of a document has other noise.
    same = Window(((np.tile(tokens[:40], 3), np.array([120])),), np.array([0]), 5)
    pieces = objective.cut(same)
    by_place = {tuple(source) for source, _ in pairs_of(objective, same, pieces)}
    assert len(by_place) == len(pieces) > 1


def test_packing_changes_which_pieces_there_are_but_not_their_noise(tokenizer: TextTokenizer) -> None:
    """A piece with the same place and length is corrupted the same, whatever shares its row."""
    objective = text_objective(tokenizer, max_source_len=128, max_target_len=30)
    window = documents([40, 90, 60, 120, 30])
    alone = dict(zip(objective.cut(window).sample.tolist(), cut_pairs(objective, window), strict=True))
    pieces, _ = objective.fill_rows(window, np.array([3, 1, 4, 0, 2]))
    whole = 0
    for sample, split, pair in zip(
        pieces.sample.tolist(), pieces.is_split, pairs_of(objective, window, pieces), strict=True
    ):
        if not split and pieces.sample.tolist().count(sample) == 1:
            assert pair == alone[sample]
            whole += 1
    assert whole >= 3


@pytest.mark.parametrize(
    ("name", "one", "two"),
    [
        ("span_corruption", ([-1, 1], [-1, 5, 1]), ([6, -1, 1], [-1, 7, 1])),
        ("prefix_lm", ([1], [5, 1]), ([6, 1], [7, 1])),
    ],
)
def test_documents_of_one_and_two_tokens(
    tokenizer: TextTokenizer, name: str, one: tuple[list[int], list[int]], two: tuple[list[int], list[int]]
) -> None:
    window = Window(((np.array([5, 6, 7], np.uint16), np.array([1, 2])),), np.arange(2), 1)
    objective = text_objective(tokenizer, objective=name)
    found = [
        tuple([-1 if token == objective.sentinel_ids[0] else token for token in side] for side in pair)
        for pair in cut_pairs(objective, window)
    ]
    assert found == [one, two]


def test_sentinels_bound_the_pieces_not_the_noise(tokenizer: TextTokenizer) -> None:
    objective = text_objective(tokenizer, max_source_len=4096, max_target_len=4096)
    longest = objective.longest_piece()
    n_noise, n_spans = objective.denoisers[0].plan(np.array([longest]), np.zeros(1, np.uint64))
    assert n_spans[0] == 100 and n_noise[0] / longest == pytest.approx(0.15, abs=0.001)
    pieces, n_pieces = objective.fill_rows(documents([3000] * 4), np.arange(4))
    assert pieces.length.max() <= longest and n_pieces.max() > 1, "longer rows take several pieces"


def test_what_does_not_fit_is_one_sentence(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        DataError, match="span_corruption does not fit rows of 512 source and 2 target tokens with 100"
    ):
        text_objective(tokenizer, max_target_len=2)
    with pytest.raises(
        DataError, match=r"prefix_lm does not fit rows of 1 source .*: use at least data.max_source_len=2 and"
    ):
        text_objective(tokenizer, objective="prefix_lm", max_source_len=1)
    with pytest.raises(
        DataError, match=r"ul2 does not fit rows of 3 source .*: use at least data.max_source_len=4"
    ):
        text_objective(tokenizer, objective="ul2", max_source_len=3)
    monkeypatch.setattr(tokenizer, "sentinel_ids", ())
    with pytest.raises(DataError, match=r"with 0 sentinels: use .* and a tokenizer with <extra_id_N> tokens"):
        text_objective(tokenizer)
    assert text_objective(tokenizer, objective="prefix_lm").sentinel_ids == ()


def test_a_tokenizer_without_mode_tokens(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "mode_ids", {"R": 3})
    with pytest.raises(
        DataError,
        match=r"no mode token \[S\] and \[X\]: set data.mode_tokens=false, or prepare with a tokenizer",
    ):
        text_objective(tokenizer, objective="ul2")
    assert text_objective(tokenizer, objective="ul2", mode_tokens=False).denoisers[0].mode_id is None


@settings(deadline=None)
@given(
    density=st.sampled_from([0.05, 0.15, 0.25, 0.5, 0.8]),
    mean_span=st.sampled_from([None, 1.0, 3.0, 64.0]),
    mode_id=st.sampled_from([None, 3]),
    key=st.integers(0, 2**63),
    begin=st.integers(0, 1 << 20),
    rows=st.tuples(st.integers(4, 80), st.integers(4, 80)),
)
def test_sizes_one_at_a_time_are_those_of_windows(
    density: float, mean_span: float | None, mode_id: int | None, key: int, begin: int, rows: tuple[int, int]
) -> None:
    denoiser = Denoiser(density, mean_span, mode_id)
    draw = draw_of(key, begin)
    assert draw == int(draws_of(np.array([key], np.uint64), np.array([begin]))[0])
    sizes = PieceSizes(denoiser, *rows, n_sentinels=100)
    lengths = np.arange(1, sum(rows))
    source, target = denoiser.sizes(lengths, np.full(len(lengths), draw, np.uint64))
    assert (np.diff(source) >= 0).all() and (np.diff(target) >= 0).all()
    fitting = int(((source <= rows[0]) & (target <= rows[1])).sum())
    assert sizes.longest(*rows, draw) == fitting
    for length in range(1, fitting + 1):
        assert sizes.of(length, draw) == (source[length - 1], target[length - 1])


def test_what_decides_the_pairs_is_plain_json(tokenizer: TextTokenizer) -> None:
    import json

    for changes in ({}, {"objective": "ul2"}, {"objective": "prefix_lm"}, {"objective": "pairs"}):
        data = DataConfig(train="shards", **changes)  # type: ignore[arg-type]
        described = build_objective(data, data.corpora()[0], tokenizer).describe()
        assert json.loads(json.dumps(described)) == described
        other = data.model_copy(update={"max_target_len": 60})
        assert build_objective(other, other.corpora()[0], tokenizer).describe() != described
    data = DataConfig(train="shards", objective="ul2")
    weighted = data.model_copy(update={"denoisers": data.denoisers[:3]})
    unmarked = data.model_copy(update={"mode_tokens": False})
    three = [build_objective(d, d.corpora()[0], tokenizer).describe() for d in (data, weighted, unmarked)]
    assert three[0] != three[1] != three[2] != three[0]


@pytest.mark.parametrize("name", ["span_corruption", "prefix_lm", "ul2"])
def test_expected_counts_are_near_the_real_ones(tokenizer: TextTokenizer, name: str) -> None:
    objective = text_objective(tokenizer, objective=name, max_target_len=300)
    window = documents([400] * 700)
    pieces = objective.cut(window)
    real = len(pieces), int(pieces.source_lengths.sum()), int(pieces.target_lengths.sum())
    assert objective.expect(700, 280_000, 0) == pytest.approx(real, rel=0.3)


@pytest.mark.parametrize("policy", ["truncate", "drop", "error"])
def test_pairs_too_long(policy: str) -> None:
    objective = Pairs(5, 4, policy, eos_id=1)  # type: ignore[arg-type]
    source, target = np.arange(10, 22, dtype=np.uint16), np.arange(30, 38, dtype=np.uint16)
    fields = (source, np.array([4, 5, 3])), (target, np.array([3, 1, 4]))
    window = Window(fields, np.arange(3), 0, "shard s")
    if policy == "error":
        with pytest.raises(DataError, match="shard s: a pair of 5 source and 1 target tokens"):
            objective.cut(window)
        return
    pieces = objective.cut(window)
    expected = [([10, 11, 12, 13, 1], [30, 31, 32, 1])]
    if policy == "truncate":
        expected += [([14, 15, 16, 17, 1], [33, 1]), ([19, 20, 21, 1], [34, 35, 36, 1])]
    assert pairs_of(objective, window, pieces) == expected
    assert pieces.is_truncated.tolist() == ([False, True, True] if policy == "truncate" else [False])
    packed, n_pieces = objective.fill_rows(window, np.array([2, 0, 1]))
    assert n_pieces.sum() == len(expected)
    assert sorted(pairs_of(objective, window, packed)) == sorted(expected)
