"""Mixtures: which corpus gives a row, in what share, and in the same order whatever happens."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_transformer.config.data import DataConfig
from dist_transformer.data.batch import Batch
from dist_transformer.data.held_out import eval_batches
from dist_transformer.data.manifest import load_manifest
from dist_transformer.data.mixture import UNIT, Mixture
from dist_transformer.data.stream import TrainStream, check_data
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.errors import DataError
from tests.unit.data.conftest import MakeShards, numbered_pairs
from tests.unit.data.streaming import ROWS_A_STEP, pairs_config, rows_of, run, seen_by_epoch

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5)


@settings(max_examples=60)
@given(WEIGHTS, st.integers(1, 200), st.integers(0, 2**62), st.integers(0, 10**9), st.integers(1, 1500))
def test_shares_hold_in_every_lane_and_over_all_lanes(
    weights: list[float], n_lanes: int, seed: int, first_turn: int, n_turns: int
) -> None:
    mixture = Mixture.build(weights, 1.0, n_lanes, seed)
    assert sum(mixture.shares) == UNIT
    shares = np.array(mixture.shares) / UNIT
    assert np.allclose(shares, np.array(weights) / sum(weights), atol=1e-8)
    lane = seed % n_lanes
    in_lane = [mixture.corpus_of((first_turn + turn) * n_lanes + lane) for turn in range(n_turns)]
    in_turn = [mixture.corpus_of(first_turn * n_lanes + lane) for lane in range(n_lanes)]
    for corpora in (in_lane, in_turn):
        counts = np.bincount(corpora, minlength=len(weights))
        # Drawn at random, 1,500 rows would be off by some 20.
        assert np.abs(counts - len(corpora) * shares).max() < 5


def test_temperature_evens_shares_out() -> None:
    """T5's formula, section 3.5.2."""
    weights = [1.0, 8.0, 64.0]
    for temperature in (1.0, 2.0, 3.0):
        powers = np.array(weights) ** (1 / temperature)
        shares = np.array(Mixture.build(weights, temperature, 8, 1).shares) / UNIT
        assert np.allclose(shares, powers / powers.sum())
    assert np.allclose(np.array(Mixture.build(weights, 1e6, 8, 1).shares) / UNIT, 1 / 3, atol=1e-4)


def test_the_sequence_is_fixed_for_ever() -> None:
    """A resumed run must see the order it began with: these figures may never change."""
    mixture = Mixture.build([3, 1, 1], 1.0, 4, 7)
    assert [mixture.corpus_of(row) for row in range(24)] == SEQUENCE
    assert mixture.shares == (2576980378, 858993459, 858993459)


SEQUENCE = [2, 0, 0, 2, 0, 0, 1, 0, 1, 0, 0, 1, 0, 2, 0, 0, 1, 0, 2, 0, 0, 1, 0, 2]


def text(n_samples: int, seed: int) -> list[tuple[np.ndarray, ...]]:
    rng = np.random.default_rng(seed)
    return [(rng.integers(3, 400, int(rng.integers(5, 60))).astype(np.uint16),) for _ in range(n_samples)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, make_shards: MakeShards) -> dict[str, Path]:
    """Pairs in 9 shards, pairs in 4 of other sizes, and text in 6."""
    root = tmp_path_factory.mktemp("corpora")
    held = numbered_pairs(1, lambda _: 13, seed=9)
    make_shards(root / "one", numbered_pairs(9, lambda shard: 30 + 3 * shard), "pairs", held)
    make_shards(root / "two", numbered_pairs(4, lambda shard: 7 + shard, seed=1), "pairs")
    make_shards(root / "text", [text(20, shard) for shard in range(6)], "text", [text(10, 99)])
    return {name: root / name for name in ("one", "two", "text")}


def mixed(folders: dict[str, Path], **changes: Any) -> DataConfig:
    """60 % of one, 25 % of two, 15 % of text."""
    mixture = [
        {"train": str(folders["one"]), "eval": str(folders["one"]), "weight": 60},
        {"train": str(folders["two"]), "weight": 25, "name": "second"},
        {
            "train": str(folders["text"]), "eval": str(folders["text"]), "weight": 15,
            "objective": "span_corruption", "noise_density": 0.3,
        },
    ]  # fmt: skip
    return pairs_config(None, **({"mixture": mixture} | changes))


LAYOUTS: list[dict[str, Any]] = [{}, {"packing": False}, {"packing": False, "bucket_tokens": 64}]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["packed", "one sample a row", "buckets"])
def test_order_is_the_same_for_every_layout_and_history(
    folders: dict[str, Path], layout: dict[str, Any]
) -> None:
    data = mixed(folders, **layout)
    reference = run(data, 1, 60)
    assert len(set(reference.steps)) == 60
    steps: list[int] = []
    state = None
    for dp_size, workers, n_steps, micro in ((2, 2, 13, 4), (4, 0, 9, 1), (1, 1, 20, 8), (2, 0, 18, 2)):
        found = run(mixed(folders, workers=workers, **layout), dp_size, n_steps, state, micro)
        state = found.state
        steps += found.steps
    assert steps == reference.steps
    assert state == reference.state


def test_rows_come_from_the_corpora_in_their_shares(
    folders: dict[str, Path], tokenizer: TextTokenizer
) -> None:
    found = run(mixed(folders), 2, 100)
    per_corpus = Counter(
        Mixture.build([60, 25, 15], 1.0, 4, 5).corpus_of(row.number) for row in rows_of(found.batches)
    )
    assert [per_corpus[i] / (100 * ROWS_A_STEP) for i in range(3)] == pytest.approx(
        [0.6, 0.25, 0.15], abs=0.005
    )
    assert {corpus: len(lanes) for corpus, lanes in found.state["cursors"].items()} == {
        "0": 4,
        "1": 4,
        "2": 4,
    }
    # Spans of text are marked by sentinels, and no pair holds one.
    first_sentinel = tokenizer.sentinel_ids[0]
    sentinels = {
        row.number for batch in found.batches for row in rows_of([batch])
        if int(batch.encoder_input_tokens[batch.rows.index(row.number)].max()) >= first_sentinel
    }  # fmt: skip
    assert len(sentinels) == per_corpus[2]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=9), min_size=2, max_size=3),
    weights=st.lists(st.integers(1, 20), min_size=3, max_size=3),
    seed=st.integers(0, 2**40),
    window=st.integers(1, 30),
    packing=st.booleans(),
    kills=st.lists(
        st.tuples(st.sampled_from([1, 2, 4]), st.integers(0, 9), st.sampled_from([1, 2])),
        min_size=1,
        max_size=3,
    ),
)
def test_each_corpus_exactly_once_per_epoch_whatever_happens(
    tmp_path_factory: pytest.TempPathFactory,
    make_shards: MakeShards,
    sizes: list[list[int]],
    weights: list[int],
    seed: int,
    window: int,
    packing: bool,
    kills: list[tuple[int, int, int]],
) -> None:
    root = tmp_path_factory.mktemp("any")
    for i, corpus in enumerate(sizes):
        make_shards(root / f"corpus{i}", numbered_pairs(len(corpus), corpus.__getitem__), "pairs")
    mixture = [{"train": str(root / f"corpus{i}"), "weight": weights[i]} for i in range(len(sizes))]
    data = pairs_config(None, mixture=mixture, window=window, packing=packing)
    n_lanes = check_data(data, dp_size=1, workers=1).n_lanes
    state: dict[str, Any] | None = None
    batches: list[Batch] = []
    steps: list[int] = []
    for wanted, n_steps, micro in kills:
        dp_size = wanted if n_lanes % wanted == 0 else 1
        found = run(data, dp_size, n_steps, state, micro, seed)
        state, batches, steps = found.state, batches + found.batches, steps + found.steps
    while len(batches) < 100_000 and not _all_through(state, len(sizes), n_lanes):
        found = run(data, 1, 20, state, 8, seed)
        state, batches, steps = found.state, batches + found.batches, steps + found.steps
    assert steps == run(data, 1, len(steps), seed=seed).steps
    rows = rows_of(batches)
    assert [row.number for row in rows] == list(range(len(rows)))
    of_corpora = Mixture.build(weights[: len(sizes)], 1.0, n_lanes, seed)
    for i, corpus in enumerate(sizes):
        mine = [row for row in rows if of_corpora.corpus_of(row.number) == i]
        assert sorted(seen_by_epoch(mine)[0].elements()) == list(range(sum(corpus)))


def _all_through(state: Any, n_corpora: int, n_lanes: int) -> bool:
    places = [state["cursors"].get(str(corpus), {}) for corpus in range(n_corpora)] if state else [{}]
    return all(len(lanes) == n_lanes and all(c[0] >= 1 for c in lanes.values()) for lanes in places)


def test_the_same_shards_in_two_corpora_are_read_and_corrupted_differently(folders: dict[str, Path]) -> None:
    options = {"objective": "span_corruption", "noise_density": 0.5, "mean_noise_span": 2}
    parts = [{"train": str(folders["text"]), "name": name, **options} for name in "ab"]
    found = run(pairs_config(None, mixture=parts, packing=False), 1, 30)
    rows: list[list[tuple[int, ...]]] = [[], []]
    mixture = Mixture.build([1, 1], 1.0, 6, 5)
    for batch in found.batches:
        for tokens, number in zip(batch.encoder_input_tokens, batch.rows, strict=True):
            rows[mixture.corpus_of(number)].append(tuple(tokens[tokens > 0].tolist()))
    # Short documents have few ways to be corrupted, so some of them come out alike.
    long = [[row for row in corpus if len(row) > 15] for corpus in rows]
    assert len(long[0]) > 50 < len(long[1])
    assert not set(long[0]) & set(long[1])


def test_without_weights_rows_are_in_proportion_to_tokens(folders: dict[str, Path]) -> None:
    parts = [{"train": str(folders[name])} for name in ("one", "two")]
    summary = check_data(pairs_config(None, mixture=parts), dp_size=4, workers=1)
    tokens = [
        sum(shard.n_source_tokens + shard.n_target_tokens for shard in load_manifest(folders[name]).train)
        for name in ("one", "two")
    ]
    assert [corpus.share for corpus in summary.corpora] == pytest.approx([n / sum(tokens) for n in tokens])
    assert [corpus.name for corpus in summary.corpora] == ["one", "two"]
    first, second = (corpus.describe(1000) for corpus in summary.corpora)
    assert first.startswith(
        f"one: {100 * tokens[0] / sum(tokens):.3g} % of the rows, 378 samples in 9 shards, about"
    )
    assert second.startswith("two: ")


def test_each_corpus_is_held_out_by_itself(folders: dict[str, Path]) -> None:
    data = mixed(folders)
    one, two, spans = data.corpora()
    n_pairs = [
        sum(b.n_pairs for b in eval_batches(data, part, seed=1, dp_rank=0, dp_size=1, micro_batch_size=4))
        for part in (one, spans)
    ]
    assert n_pairs[0] == 13 and n_pairs[1] >= 10
    with pytest.raises(DataError, match="corpus second has no eval"):
        next(iter(eval_batches(data, two, seed=1, dp_rank=0, dp_size=1, micro_batch_size=4)))
    assert check_data(data, dp_size=1, workers=0).n_eval_samples == {"one": 13, "text": 10}


def test_corpora_that_do_not_fit_are_refused(
    folders: dict[str, Path], tmp_path: Path, make_shards: MakeShards
) -> None:
    with pytest.raises(
        DataError, match=r"3 ranks x 1 worker .* the 4 shards of corpus second give 4: prepare second"
    ):
        check_data(mixed(folders), dp_size=3, workers=1)
    parts = [{"train": str(folders["one"])}, {"train": str(folders["text"])}]
    with pytest.raises(
        DataError, match=r"data\.mixture\.1\.objective=pairs needs pairs shards, .*text holds text: set"
    ):
        check_data(pairs_config(None, mixture=parts), dp_size=1, workers=0)
    manifest = make_shards(tmp_path / "other", numbered_pairs(4, lambda _: 9), "pairs")
    content = manifest.tokenizer_path.read_text()
    manifest.tokenizer_path.write_text(content + "\n")
    written = (tmp_path / "other" / "manifest.json").read_text()
    sha256 = hashlib.sha256((content + "\n").encode()).hexdigest()
    (tmp_path / "other" / "manifest.json").write_text(written.replace(manifest.tokenizer_sha256, sha256))
    parts = [{"train": str(folders["one"])}, {"train": str(tmp_path / "other")}]
    with pytest.raises(
        DataError, match=r"other was prepared with another tokenizer than .*one, and a mixture has one"
    ):
        check_data(pairs_config(None, mixture=parts), dp_size=1, workers=0)


def test_resume_refuses_another_mixture(
    folders: dict[str, Path], tmp_path: Path, make_shards: MakeShards
) -> None:
    state = run(mixed(folders), 1, 3).state
    parts = [part.model_dump() for part in mixed(folders).mixture]

    def resumed(changed: list[dict[str, Any]], **changes: Any) -> TrainStream:
        data = pairs_config(None, mixture=changed, **changes)
        return TrainStream(data, seed=5, dp_rank=0, dp_size=1, micro_batch_size=8, state=state)

    heavier = [parts[0] | {"weight": 160}, *parts[1:]]
    with pytest.raises(
        DataError, match=r"the share of one was 60 % of the rows and is 80 %, the share of second was"
    ):
        resumed(heavier)
    with pytest.raises(DataError, match=r"the share of one was 60 % of the rows and is 4\d\.\d+ %"):
        resumed(parts, mixing_temperature=3)
    with pytest.raises(
        DataError, match=r"trained on 3 corpora \(one, second, text\), .* has 2 corpora \(one, second\)"
    ):
        resumed(parts[:2])
    with pytest.raises(DataError, match=r"denoisers of text was .*0\.3.* and is .*0\.4"):
        resumed([*parts[:2], parts[2] | {"noise_density": 0.4}])
    make_shards(tmp_path / "two", numbered_pairs(4, lambda _: 9, seed=4), "pairs")
    with pytest.raises(
        DataError, match=r"are not the ones this run was trained on .*give data\.mixture\.1\.train"
    ):
        resumed([parts[0], parts[1] | {"train": str(tmp_path / "two")}, parts[2]])
    # Names are for people only, and weights count relative to each other.
    renamed = [part | {"name": f"part{i}", "weight": part["weight"] * 3} for i, part in enumerate(parts)]
    assert next(iter(resumed(renamed))).fingerprint == run(mixed(folders), 1, 4).steps[3]
