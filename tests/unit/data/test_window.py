"""Windows: their rows in every layout, what is counted, and fingerprints that batches and padding do not change."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_transformer.config.data import DataConfig
from dist_transformer.data.assemble import assemble
from dist_transformer.data.held_out import eval_batches
from dist_transformer.data.objectives import Window
from dist_transformer.data.prepare import prepare_pairs
from dist_transformer.data.reader import RawWindow
from dist_transformer.data.rows import COUNTS, PlacedRows, Rows
from dist_transformer.data.subwords import SubwordDropout
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.data.window import WindowPlan
from dist_transformer.errors import DataError
from tests.unit.data.conftest import sentences
from tests.unit.data.prepared import OPTIONS, write_pairs

LENGTHS = {"max_source_len": 64, "max_target_len": 48}
LAYOUTS: list[dict[str, Any]] = [
    {"packing": True},
    {"packing": False},
    {"packing": False, "bucket_tokens": 256},
]


def plan_of(tokenizer: TextTokenizer, seed: int = 7, shuffle: bool = True, **options: Any) -> WindowPlan:
    data = DataConfig(**{"train": "x", **LENGTHS, **options})
    return WindowPlan.build(data, data.corpora()[0], tokenizer, seed, shuffle)


def raw_window(n_fields: int, n: int = 200, longest: int = 40) -> RawWindow:
    """Samples whose first token is their number."""
    rng = np.random.default_rng(1)
    fields = []
    for _ in range(n_fields):
        sizes = rng.integers(1, longest, n)
        tokens = rng.integers(6, 300, int(sizes.sum())).astype(np.uint16)
        tokens[np.cumsum(sizes) - sizes] = 1000 + np.arange(n)
        fields.append((tokens, sizes))
    return RawWindow(0, tuple(fields), np.arange(n))


def rows_of(plan: WindowPlan, raw: RawWindow, epoch: int = 0, window: int = 0) -> Rows:
    return plan.build_rows(raw, epoch=epoch, shard=3, window=window, location="shard 3")[0]


def placed(rows: Rows, numbers: np.ndarray | None = None) -> PlacedRows:
    numbers = np.arange(len(rows)) if numbers is None else numbers
    return PlacedRows(rows, numbers, numbers, np.zeros((len(rows), 4), np.int64))


def first_tokens(rows: Rows) -> list[int]:
    return rows.target_tokens[np.cumsum(rows.target_lengths) - rows.target_lengths].tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_pair_is_in_one_row(tokenizer: TextTokenizer, layout: dict[str, Any]) -> None:
    raw = raw_window(2)
    plan = plan_of(tokenizer, objective="pairs", **layout)
    rows = rows_of(plan, raw)
    assert sorted(first_tokens(rows)) == list(range(1000, 1200))
    assert first_tokens(rows) != first_tokens(rows_of(plan, raw, epoch=1))
    assert first_tokens(rows) == first_tokens(rows_of(plan, raw))
    in_order = first_tokens(rows_of(plan_of(tokenizer, shuffle=False, objective="pairs", **layout), raw))
    if layout == {"packing": False}:
        assert in_order == list(range(1000, 1200))
    else:
        firsts = rows_of(plan_of(tokenizer, shuffle=False, objective="pairs", **layout), raw).n_samples
        smallest = [min(part) for part in np.split(in_order, np.cumsum(firsts)[:-1])]
        assert smallest == sorted(smallest), "rows stand in the order of their first samples"


def test_what_is_counted(tokenizer: TextTokenizer) -> None:
    raw = raw_window(2, longest=100)
    too_long = int(((raw.fields[0][1] >= 64) | (raw.fields[1][1] >= 48)).sum())
    rows, n_dropped = plan_of(tokenizer, objective="pairs", too_long="drop").build_rows(
        raw, epoch=0, shard=0, window=0, location="x"
    )
    assert n_dropped == too_long > 0 and rows.counts.sum() == 0
    rows = rows_of(plan_of(tokenizer, objective="pairs"), raw)
    assert rows.counts.sum(0).tolist() == [too_long, 0, 0, 0]
    documents = RawWindow(0, ((np.zeros(900, np.uint16) + 7, np.array([400, 0, 10, 490])),), np.arange(4))
    rows, n_dropped = plan_of(tokenizer).build_rows(documents, epoch=0, shard=0, window=0, location="x")
    assert n_dropped == 1 and rows.counts.sum(0)[COUNTS.index("n_split")] == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_window_may_be_empty(tokenizer: TextTokenizer, layout: dict[str, Any]) -> None:
    nothing = np.zeros(0, np.uint16), np.zeros(0, np.int64)
    for name, n_fields in (("pairs", 2), ("span_corruption", 1), ("ul2", 1)):
        raw = RawWindow(0, (nothing,) * n_fields, np.zeros(0, np.int64))
        assert len(rows_of(plan_of(tokenizer, objective=name, **layout), raw)) == 0


def test_buckets_become_rows_of_one_sample_each(tokenizer: TextTokenizer) -> None:
    rows = rows_of(plan_of(tokenizer, objective="pairs", **LAYOUTS[2]), raw_window(2))
    assert rows.n_samples.sum() == 200 and rows.n_samples.max() > 5
    for i in range(0, len(rows), 2):
        two = rows.select(np.arange(i, min(i + 2, len(rows))))
        batch = assemble(placed(two), 64, 48, bucketed=True)
        n, n_rows = len(two.source_lengths), len(two)
        assert tuple(batch.encoder_input_tokens.shape) == (n, two.source_lengths.max())
        assert tuple(batch.decoder_input_tokens.shape) == (n, two.target_lengths.max())
        assert len(batch.rows) == len(batch.lanes) == len(batch.cursors) == n_rows
        assert batch.encoder_segment_ids.sum(1).tolist() == two.source_lengths.tolist()
        one = assemble(placed(two.select(np.array([0]))), 64, 48, bucketed=True)
        for side in (one.encoder_input_tokens, one.decoder_input_tokens):
            assert side.numel() <= 256
    none = Rows(
        *(getattr(rows, name)[:0] for name in list(vars(rows))[:4]),
        np.zeros(2, np.int64),
        rows.counts[:2] * 0,
    )
    empty = assemble(placed(none), 64, 48, bucketed=True)
    assert empty.encoder_input_tokens.shape == (1, 1) and int(empty.decoder_segment_ids.sum()) == 0


def test_fingerprints_do_not_depend_on_batches_or_padding(tokenizer: TextTokenizer) -> None:
    rows = rows_of(plan_of(tokenizer, objective="pairs"), raw_window(2))

    def fingerprint(groups: list[np.ndarray], source_len: int = 64, bucketed: bool = False) -> int:
        whole = placed(rows)
        batches = (
            assemble(whole.select(g), source_len, 48, bucketed=bucketed, fingerprint=True) for g in groups
        )
        return sum(batch.fingerprint for batch in batches)

    everything = np.arange(len(rows))
    expected = fingerprint([everything])
    assert expected == fingerprint([everything[::2], everything[1::2]])
    assert expected == fingerprint([everything[::-1]], source_len=80)
    assert expected == fingerprint([everything], bucketed=True)
    assert assemble(placed(rows), 64, 48).fingerprint == 0, "not asked for"


@pytest.mark.parametrize("change", ["source token", "target token", "samples swapped", "boundary", "number"])
def test_fingerprints_tell_rows_apart(tokenizer: TextTokenizer, change: str) -> None:
    rows = rows_of(plan_of(tokenizer, objective="pairs"), raw_window(2))
    before = assemble(placed(rows), 64, 48, fingerprint=True).fingerprint
    source, target = rows.source_tokens.copy(), rows.target_tokens.copy()
    numbers = np.arange(len(rows))
    if change == "source token":
        source[5] += 1
    elif change == "target token":
        target[-2] += 1
    elif change == "samples swapped":
        n = int(rows.source_lengths[0])
        source[:n] = source[:n][::-1]
    elif change == "boundary":
        source[[0, int(rows.source_lengths[0]) - 1]] = source[[int(rows.source_lengths[0]) - 1, 0]]
    else:
        numbers = numbers[::-1].copy()
    changed = Rows(source, target, rows.source_lengths, rows.target_lengths, rows.n_samples, rows.counts)
    assert assemble(placed(changed, numbers), 64, 48, fingerprint=True).fingerprint != before


def test_subword_dropout_changes_the_spelling_and_nothing_else(tokenizer: TextTokenizer) -> None:
    """Texts stay what they are; each epoch and each sample draws anew; where a sample stands does not matter."""
    texts = sentences(300)
    ids = tokenizer.encode_batch(texts)
    lengths = np.array([len(sample) for sample in ids])
    flat = np.concatenate(ids).astype(np.uint16)
    raw = RawWindow(0, ((flat, lengths), (flat, lengths)), np.arange(300))
    layout = {"objective": "pairs", "max_source_len": 512, "max_target_len": 512}
    plain = plan_of(tokenizer, **layout)
    noisy = plan_of(tokenizer, subword_dropout=0.2, **layout)

    def spellings(rows: Rows) -> list[list[int]]:
        return [part.tolist() for part in np.split(rows.target_tokens, np.cumsum(rows.target_lengths)[:-1])]

    def by_text(rows: Rows) -> dict[str, list[int]]:
        return {tokenizer.decode(spelling): spelling for spelling in spellings(rows)}

    rows = rows_of(noisy, raw)
    assert sorted(map(tokenizer.decode, spellings(rows))) == sorted(texts)
    assert by_text(rows) == by_text(rows_of(noisy, raw))
    again, whole = by_text(rows_of(noisy, raw, epoch=1)), by_text(rows_of(plain, raw))
    differ = [text for text in whole if by_text(rows)[text] != whole[text]]
    assert len(differ) > 0.5 * len(whole) and by_text(rows) != again
    assert rows.source_tokens.tolist() != rows.target_tokens.tolist(), "the sides draw by themselves"
    # The second half of the window alone: a sample's spelling is its own.
    half = RawWindow(
        150, tuple((flat[lengths[:150].sum() :], lengths[150:]) for _ in "12"), np.arange(150, 300)
    )
    assert by_text(rows_of(noisy, half)).items() <= by_text(rows).items()
    assert noisy.describe()["subword_dropout"] == 0.2 and "subword_dropout" not in plain.describe()
    # Of sources alone: they are spelt as before, and targets are whole.
    sources_only = plan_of(tokenizer, subword_dropout=0.2, subword_dropout_target=0.0, **layout)
    found = rows_of(sources_only, raw)
    assert by_text(found) == whole
    assert found.source_lengths.sum() == rows.source_lengths.sum() > rows_of(plain, raw).source_lengths.sum()
    assert sources_only.describe()["subword_dropout_target"] == 0.0
    targets_only = rows_of(plan_of(tokenizer, subword_dropout_target=0.2, **layout), raw)
    assert by_text(targets_only) == by_text(rows)
    assert targets_only.source_lengths.sum() == rows_of(plain, raw).source_lengths.sum()


def test_how_many_tokens_subword_dropout_splits(tokenizer: TextTokenizer) -> None:
    merged = int(np.flatnonzero(tokenizer.parents()[:, 0] >= 0)[0])  # of two bytes, which do not split again
    flat, lengths = np.full(20_000, merged, np.uint16), np.full(1, 20_000)
    dropout = SubwordDropout(0.1, tokenizer.parents())
    ((split, sizes),) = dropout(Window(((flat, lengths),), np.zeros(1, np.int64), key=5)).fields
    assert sizes.tolist() == [len(split)] and 1_800 < len(split) - 20_000 < 2_200
    assert tokenizer.decode(split.tolist()) == tokenizer.decode(flat.tolist())


def test_subword_dropout_needs_merges() -> None:
    unigram = TextTokenizer.train(iter(sentences(300)), 400, "unigram")
    with pytest.raises(DataError, match=r"data.subword_dropout .*Unigram.* prepare with --model bpe"):
        plan_of(unigram, objective="pairs", subword_dropout=0.1)


def test_held_out_text_is_never_split(tmp_path: Path) -> None:
    source, target = write_pairs(tmp_path)
    prepare_pairs([(source, target)], tmp_path / "shards", **OPTIONS)
    rows = []
    for p, p_target in ((0.0, None), (0.5, None), (0.0, 0.5)):
        data = DataConfig(
            train=str(tmp_path / "shards"),
            eval=str(tmp_path / "shards"),
            objective="pairs",
            subword_dropout=p,
            subword_dropout_target=p_target,
        )
        batches = eval_batches(data, data.corpora()[0], seed=1, dp_rank=0, dp_size=1, micro_batch_size=4)
        rows.append([batch.decoder_target_tokens.tolist() for batch in batches])
    assert rows[0] == rows[1] == rows[2]
