"""Inspection: its figures are those of the shards and of the rows that a run gets."""

from pathlib import Path

import numpy as np
import pytest

from dist_transformer.config.data import DataConfig
from dist_transformer.data.inspect import RunToInspect, describe_lengths, inspect_run
from dist_transformer.data.sample_rows import Part, parts_of, show_rows
from dist_transformer.data.stream import TrainStream
from dist_transformer.data.tokenizer import TextTokenizer
from tests.unit.data.conftest import MakeShards, sentences


def documents(
    tokenizer: TextTokenizer, n: int, seed: int, n_sentences: int = 1
) -> list[tuple[np.ndarray, ...]]:
    texts = sentences(n * n_sentences, seed)
    joined = (" ".join(texts[i * n_sentences : (i + 1) * n_sentences]) for i in range(n))
    return [(np.array(tokenizer.encode(text)),) for text in joined]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, tokenizer: TextTokenizer, make_shards: MakeShards) -> Path:
    """Four shards of 40, 50, 60 and 70 documents, and 9 held out."""
    folder = tmp_path_factory.mktemp("text")
    shards = [documents(tokenizer, 40 + 10 * i, seed=i, n_sentences=4) for i in range(4)]
    make_shards(folder, shards, eval_shards=[documents(tokenizer, 9, seed=9)])
    return folder


@pytest.fixture(scope="module")
def pairs(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: TextTokenizer, make_shards: MakeShards
) -> Path:
    """Four shards of 64 pairs whose targets are half as long as their sources, and four of them very long."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    shards = []
    for _ in range(4):
        lengths = [*rng.integers(4, 12, 63), 60]
        shards.append([(rng.integers(10, 250, 2 * n), rng.integers(10, 250, n)) for n in lengths])
    make_shards(folder, shards, kind="pairs")
    return folder


def inspect(n_windows: int = 100, batch: int = 8, **data: object):
    run = RunToInspect.build(DataConfig(**data), seed=3, global_batch_size=batch)
    return run, inspect_run(run, n_windows)


def test_counts_of_splits(text: Path, tokenizer: TextTokenizer) -> None:
    _, found = inspect(train=str(text), max_source_len=64, max_target_len=16)
    train, held_out = found.corpora[0].splits
    assert (train.n_shards, train.n_samples, held_out.n_shards, held_out.n_samples) == (4, 220, 1, 9)
    assert (train.n_samples_of_smallest_shard, train.n_samples_of_largest_shard) == (40, 70)
    expected = sum(len(d[0]) for i in range(4) for d in documents(tokenizer, 40 + 10 * i, i, 4))
    assert (train.n_source_tokens, train.n_target_tokens) == (expected, 0)
    assert train.n_bytes == sum(file.stat().st_size for file in text.glob("train-*.tar"))
    assert (found.n_lanes, found.serves) == (4, (1, 2, 4))


def test_figures_of_all_windows_are_those_of_an_epoch(text: Path) -> None:
    """Every window read once is an epoch: the stream's own rows give the same totals."""
    data = {"train": str(text), "max_source_len": 64, "max_target_len": 16, "window": 16, "workers": 0}
    _, found = inspect(**data)
    corpus = found.corpora[0]
    assert corpus.n_windows_read == corpus.n_windows
    assert corpus.n_samples_read == 220
    n_rows, tokens, n_pairs, n_split = 0, np.zeros(2), 0, 0
    with TrainStream(DataConfig(**data), seed=3, dp_rank=0, dp_size=1, micro_batch_size=1) as stream:
        # A lane's epoch ends where its cursor enters the next one; its later rows do not count.
        ended: set[int] = set()
        for batch in stream:
            lane = batch.lanes[0]
            if lane not in ended:
                n_rows += 1
                tokens += batch.n_source_tokens, batch.n_target_tokens
                n_pairs += batch.n_pairs
                n_split += batch.n_split
            if batch.cursors[0].epoch:
                ended.add(lane)
            if len(ended) == stream.n_lanes:
                break
    assert (corpus.fill.n_rows, corpus.fill.n_pieces) == (n_rows, n_pairs)
    assert corpus.counts["n_split"] == n_split > 0
    assert corpus.fill.source_share == pytest.approx(tokens[0] / (64 * n_rows))
    assert corpus.fill.target_share == pytest.approx(tokens[1] / (16 * n_rows))
    assert corpus.rows_per_epoch == n_rows
    assert corpus.epochs_per_1000_steps == pytest.approx(8000 / n_rows)


def test_windows_are_spread_over_the_shards(text: Path) -> None:
    _, found = inspect(n_windows=4, train=str(text), max_source_len=64, max_target_len=16, window=10)
    corpus = found.corpora[0]
    # 64 tokens a document make windows of at least 16 documents: 3 + 4 + 4 + 5 of them.
    assert (corpus.window, corpus.n_windows, corpus.n_windows_read) == (10, 22, 4)
    assert corpus.n_samples_read == 40
    assert 0.5 * 22 < corpus.rows_per_epoch / (corpus.fill.n_rows / 4) < 1.5 * 22


@pytest.mark.parametrize(("policy", "counted"), [("truncate", "n_truncated"), ("drop", "n_dropped")])
def test_pairs_and_what_does_not_fit(pairs: Path, policy: str, counted: str) -> None:
    _, found = inspect(
        train=str(pairs), objective="pairs", too_long=policy, max_source_len=64, max_target_len=64
    )
    corpus = found.corpora[0]
    assert corpus.counts[counted] == 4
    assert sum(corpus.counts.values()) == 4
    source, target = corpus.lengths
    assert (source.side, target.side) == ("source", "target")
    assert (source.n, target.n) == (256, 256)
    assert (source.longest, target.longest) == (120, 60)
    assert source.mean == pytest.approx(2 * target.mean)
    # Targets are half as long: half of the decoder's side is empty, and half its length is what fits.
    assert corpus.fill.source_share > 0.9 > 0.6 > corpus.fill.target_share
    assert corpus.suggested_lengths is not None
    assert corpus.suggested_lengths[0] == 64
    assert 30 <= corpus.suggested_lengths[1] <= 40


def test_suggested_lengths_fill_both_sides(pairs: Path) -> None:
    data = {"train": str(pairs), "objective": "pairs", "max_source_len": 128}
    _, found = inspect(**data, max_target_len=128)
    before = found.corpora[0]
    assert before.suggested_lengths is not None
    _, again = inspect(**data, max_target_len=before.suggested_lengths[1])
    after = again.corpora[0].fill
    assert before.fill.target_share < 0.5
    # 40 rows, of which each shard's last one is half empty.
    assert min(after.source_share, after.target_share) > 0.88


@pytest.mark.parametrize("bucket_tokens", [None, 256])
def test_unpacked_fill(pairs: Path, bucket_tokens: int | None) -> None:
    """Positions are those of the tensors that a run gets."""
    data = {"train": str(pairs), "objective": "pairs", "max_source_len": 128, "max_target_len": 64}
    data |= {"packing": False, "bucket_tokens": bucket_tokens, "workers": 0}
    _, found = inspect(**data)
    fill = found.corpora[0].fill
    assert fill.layout == ("bucketed" if bucket_tokens else "unpacked")
    tokens, positions, n_rows = np.zeros(2), np.zeros(2), 0
    with TrainStream(DataConfig(**data), seed=3, dp_rank=0, dp_size=1, micro_batch_size=1) as stream:
        for batch in stream:
            if batch.cursors[0].epoch > 1:
                break
            tokens += batch.n_source_tokens, batch.n_target_tokens
            positions += batch.encoder_input_tokens.numel(), batch.decoder_target_tokens.numel()
            n_rows += 1
    # Each epoch cuts buckets in another order, so shares of several agree only nearly.
    assert fill.source_share == pytest.approx(tokens[0] / positions[0], rel=0.05)
    assert fill.target_share == pytest.approx(tokens[1] / positions[1], rel=0.05)
    assert bucket_tokens is None or fill.source_share > 0.6


def test_lost_samples_are_counted_and_named(tmp_path: Path, text: Path) -> None:
    for file in text.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "train-00002.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    _, found = inspect(train=str(tmp_path), max_source_len=64, max_target_len=16, on_bad_shard="skip")
    corpus = found.corpora[0]
    assert 20 < corpus.counts["n_bad"] < 40
    assert corpus.n_samples_read == 220 - corpus.counts["n_bad"]
    assert len(corpus.problems) == 1
    assert str(shard) in corpus.problems[0]


def test_a_mixture_has_shares(text: Path) -> None:
    mixture = [
        {"train": str(text), "name": "spans", "weight": 3},
        {"train": str(text), "name": "prefixes", "weight": 1, "objective": "prefix_lm"},
    ]
    run, found = inspect(mixture=mixture, max_source_len=64, max_target_len=32, batch=10)
    assert [corpus.name for corpus in found.corpora] == ["spans", "prefixes"]
    assert [corpus.objective for corpus in found.corpora] == ["span_corruption", "prefix_lm"]
    assert [corpus.share_of_rows for corpus in found.corpora] == pytest.approx([0.75, 0.25])
    for corpus in found.corpora:
        per_step = 10 * corpus.share_of_rows
        assert corpus.epochs_per_1000_steps == pytest.approx(1000 * per_step / corpus.rows_per_epoch)
    shown = list(show_rows(run.plan, run.tokenizer, first=0, n_rows=400))
    assert sum(row.corpus == "spans" for row in shown) == pytest.approx(300, abs=4)


@pytest.mark.parametrize("first", [0, 3, 161])
def test_shown_rows_are_the_runs(first: int, text: Path, tokenizer: TextTokenizer) -> None:
    mixture = [{"train": str(text), "name": "a", "weight": 2}, {"train": str(text), "name": "b", "weight": 1}]
    data = DataConfig(mixture=mixture, max_source_len=48, max_target_len=12, window=16, workers=0)
    run = RunToInspect.build(data, seed=7, global_batch_size=8)
    shown = list(show_rows(run.plan, run.tokenizer, first, 5))
    with TrainStream(data, seed=7, dp_rank=0, dp_size=1, micro_batch_size=1) as stream:
        batches = [batch for batch, _ in zip(stream, range(first + 5), strict=False)][first:]
    for row, batch in zip(shown, batches, strict=True):
        assert [row.number] == batch.rows
        assert [row.lane] == batch.lanes
        assert (row.n_source_tokens, row.n_target_tokens) == (batch.n_source_tokens, batch.n_target_tokens)
        after = batch.cursors[0]
        assert after.row == 0 or (row.epoch, row.window) == (after.epoch, after.window)
        for side, tokens in (("source", batch.encoder_input_tokens), ("target", batch.decoder_target_tokens)):
            text_of_row = "".join(
                part.text for s in row.samples for part in getattr(s, side) if part.role != "end"
            )
            assert text_of_row == tokenizer.decode(tokens[0].tolist(), keep_sentinels=True)


def test_parts(tokenizer: TextTokenizer) -> None:
    first, second = tokenizer.sentinel_ids[:2]
    red, house = tokenizer.encode(" red"), tokenizer.encode(" house")
    source = [tokenizer.mode_ids["X"], *red, first, *house, second, tokenizer.eos_id]
    assert list(parts_of(source, tokenizer, restored=False)) == [
        Part("mode", "[X]"),
        Part("text", " red"),
        Part("sentinel", "<extra_id_0>", 0),
        Part("text", " house"),
        Part("sentinel", "<extra_id_1>", 1),
        Part("end", "</s>"),
    ]
    target = [first, *red, second, *house, tokenizer.eos_id]
    assert list(parts_of(target, tokenizer, restored=True)) == [
        Part("sentinel", "<extra_id_0>", 0),
        Part("removed", " red", 0),
        Part("sentinel", "<extra_id_1>", 1),
        Part("removed", " house", 1),
        Part("end", "</s>"),
    ]
    # The end of a document, which a prefix denoiser removes, has no sentinel.
    assert next(parts_of([*red, tokenizer.eos_id], tokenizer, restored=True)) == Part("removed", " red", 0)


@pytest.mark.parametrize(
    "lengths",
    [[5], [3, 3, 3], list(range(1, 1000)), [10] * 500 + [100000], [0, 1], [2048] * 99 + [1]],
)
def test_histogram_holds_every_sample(lengths: list[int]) -> None:
    found = describe_lengths("document", np.array(lengths))
    assert sum(found.counts) == found.n == len(lengths)
    assert (found.shortest, found.longest) == (min(lengths), max(lengths))
    assert 1 <= len(found.edges) == len(found.counts) <= 18
    assert found.edges[0] <= min(lengths)
    widths = set(np.diff(found.edges).tolist())
    assert len(widths) <= 1
    for i, edge in enumerate(found.edges):
        upper = found.edges[i + 1] if i + 1 < len(found.edges) else float("inf")
        assert found.counts[i] == sum(edge <= length < upper for length in lengths)
