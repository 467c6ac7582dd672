"""Held-out data: every sample exactly once, over any number of ranks."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dist_transformer.data.held_out import eval_batches, held_out_texts
from dist_transformer.data.stream import check_data
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.errors import DataError
from tests.unit.data.conftest import MakeShards, numbered_pairs, numbers_in, sentences
from tests.unit.data.streaming import pairs_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_shards: MakeShards) -> Path:
    path = tmp_path_factory.mktemp("held_out")
    eval_shards = numbered_pairs(2, lambda shard: 21 + shard)
    make_shards(path, numbered_pairs(4, lambda _: 20), "pairs", eval_shards)
    return path


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("packing", [True, False])
def test_every_sample_once_and_equal_numbers_of_batches(folder: Path, dp_size: int, packing: bool) -> None:
    data = pairs_config(folder, eval=str(folder), packing=packing)
    parts = [
        list(eval_batches(data, data.corpora()[0], seed=1, dp_rank=rank, dp_size=dp_size, micro_batch_size=4))
        for rank in range(dp_size)
    ]
    assert len({len(part) for part in parts}) == 1
    seen: Counter[int] = Counter()
    for batch in (batch for part in parts for batch in part):
        assert batch.encoder_input_tokens.shape == (4, 32)
        for tokens, segments in zip(batch.encoder_input_tokens, batch.encoder_segment_ids, strict=True):
            seen.update(numbers_in(tokens.numpy(), segments.numpy()))
    assert seen == Counter(range(43))


def test_max_rows_counts_rows_of_all_ranks(folder: Path) -> None:
    data = pairs_config(folder, eval=str(folder), packing=False)
    for rank in range(2):
        batches = list(
            eval_batches(
                data, data.corpora()[0], seed=1, dp_rank=rank, dp_size=2, micro_batch_size=3, max_rows=7
            )
        )
        assert len(batches) == 2
        assert sum(batch.n_pairs for batch in batches) == (4 if rank == 0 else 3)
        assert int(batches[1].decoder_segment_ids[1:].sum()) == 0


def test_texts(tmp_path: Path, tokenizer: TextTokenizer, make_shards: MakeShards) -> None:
    texts = sentences(6)
    samples = [(np.array(tokenizer.encode(text)), np.array(tokenizer.encode(text[::-1]))) for text in texts]
    make_shards(tmp_path, [samples], "pairs", [samples[:3]])
    data = pairs_config(tmp_path, eval=str(tmp_path))
    assert held_out_texts(data, data.corpora()[0], 2) == [(text, text[::-1]) for text in texts[:2]]


def test_a_folder_without_a_held_out_split(tmp_path: Path, make_shards: MakeShards) -> None:
    make_shards(tmp_path, numbered_pairs(4, lambda _: 20), "pairs")
    with pytest.raises(DataError, match="no held-out split: prepare it with --held-out N"):
        check_data(pairs_config(tmp_path, eval=str(tmp_path)), dp_size=1, workers=0)
