"""The table that shares layers out: every parameter of every kind of model has its place in it."""

import fnmatch
from typing import Any, cast

import pytest
import torch
from torch import nn

from dist_transformer.model import EncoderDecoder, build_model
from dist_transformer.parallel.partition import Partition, has_partial_gradient, partition_of
from dist_transformer.parallel.regions import TensorParallel
from dist_transformer.parallel.sharding import TABLE, shard
from tests.unit.model.small import KINDS, small_config

OTHER_HEADS = {"relative_bias_widths", "widths", "widths_rotary_pre"}
"""Kinds whose stacks' shapes four ranks cannot share equally."""


def part_of(kind: str, rank: int, size: int, sequence: bool = True) -> EncoderDecoder:
    model = build_model(small_config(kind, vocab_size=52))
    shard(model, TensorParallel(cast("Any", None), rank, size, sequence))
    return model


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_make_the_whole(kind: str, size: int) -> None:
    if size == 4 and kind in OTHER_HEADS:
        size = 2
    whole = dict(build_model(small_config(kind, vocab_size=52)).named_parameters())
    parts = [dict(part_of(kind, rank, size).named_parameters()) for rank in range(size)]
    assert all(list(part) == list(parts[0]) for part in parts)
    assert set(parts[0]) == set(whole)
    n_shared = 0
    for name, parameter in whole.items():
        partitions = [partition_of(part[name]) for part in parts]
        if partitions[0] is None:
            assert all(part[name].shape == parameter.shape for part in parts)
            assert not any(hasattr(part[name], "tensor_model_parallel") for part in parts), name
            # What is left whole is small, but for keys and values of which there are fewer than ranks.
            assert parameter.dim() == 1 or "_proj" in name or "learned" in name, name
            continue
        n_shared += 1
        for rank, (partition, part) in enumerate(zip(partitions, parts, strict=True)):
            assert partition == Partition(partitions[0].dim, size, rank)
            assert partition.whole_shape(part[name].shape) == parameter.shape, name
            assert part[name].tensor_model_parallel is True  # type: ignore[attr-defined]
            assert not has_partial_gradient(part[name])
    assert n_shared > 10


def test_partition() -> None:
    whole = torch.arange(24).view(4, 6)
    parts = [Partition(1, 3, i) for i in range(3)]
    assert torch.equal(torch.cat([part.cut(whole) for part in parts], dim=1), whole)
    assert parts[0].whole_shape(parts[0].cut(whole).shape) == whole.shape
    assert torch.equal(Partition(0, 2, 1).cut(whole), whole[2:])


def partial(kind: str, sequence: bool) -> set[str]:
    """Last two words of the names of parameters whose gradients are summed over ranks."""
    found = part_of(kind, 0, 4, sequence).named_parameters()
    return {".".join(name.split(".")[-2:]) for name, parameter in found if has_partial_gradient(parameter)}


def test_whose_gradients_are_parts_of_a_sum() -> None:
    norms = {"norm.weight", "norm.bias"}
    assert partial("vaswani2017_base", sequence=False) == set()
    assert partial("vaswani2017_base", sequence=True) == norms | {"o_proj.bias", "down.bias"}
    assert partial("positions_learned", sequence=True) > {"learned.weight"}
    whole = part_of("norm_embeddings", 0, 4, sequence=True).named_parameters()
    assert {
        name for name, parameter in whole if ".input.norm." in name and has_partial_gradient(parameter)
    } == {f"{side}.input.norm.{kind}" for side in ("encoder", "decoder") for kind in ("weight", "bias")}
    # Two key-value heads on four ranks; a gain for all heads.
    shared = {
        "k_proj.weight",
        "v_proj.weight",
        "k_proj.bias",
        "v_proj.bias",
        "q_norm.weight",
        "k_norm.weight",
    }
    assert partial("grouped_query_rotary", sequence=False) == shared
    assert partial("grouped_query_rotary", sequence=True) > shared


@pytest.mark.parametrize(("rank", "heads"), [(0, (0, 8)), (1, (0, 8)), (2, (8, 16)), (3, (8, 16))])
def test_each_rank_computes_the_key_value_head_that_it_needs(rank: int, heads: tuple[int, int]) -> None:
    attention: Any = part_of("grouped_query_rotary", rank, 4).decoder.layers[0].cross_attention  # type: ignore[union-attr]
    assert attention.k_proj.rows == attention.v_proj.rows == slice(*heads)
    assert attention.n_groups == attention.n_heads == 1
    assert attention.q_proj.rows is None


def test_a_module_without_a_row_is_refused() -> None:
    model = build_model(small_config("modern_small", vocab_size=52))
    model.encoder.adapter = nn.Linear(2, 2, device="meta")
    with pytest.raises(ValueError, match=r"no row for encoder\.adapter"):
        shard(model, TensorParallel(cast("Any", None), 0, 2, True))


def test_every_row_is_used() -> None:
    paths = {
        path
        for kind in ("modern_small", "t5_v1_1_small", "positions_learned", "norm_embeddings")
        for path, _ in build_model(small_config(kind)).named_modules()
    }
    for pattern, _ in TABLE:
        assert fnmatch.filter(paths, pattern), pattern
