"""Our count of operations against torch's own, on the same step: dense and packed, each preset family."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dist_transformer.config import ModelConfig, RecomputeConfig, build_config
from dist_transformer.model import EncoderDecoder, build_model, initialize
from dist_transformer.model.flops import (
    Work,
    executed_work,
    forward_flops,
    hardware_flops,
    training_flops,
    useful_work,
)
from dist_transformer.parallel.cross_entropy import linear_cross_entropy
from dist_transformer.parallel.recompute import apply_recompute

WITHIN = 0.02
N_ROWS, SOURCE_LEN, TARGET_LEN = 2, 48, 24
TINY = {
    "d_model": 32,
    "d_ff": 72,
    "n_heads": 4,
    "head_dim": 12,
    "n_encoder_layers": 3,
    "n_decoder_layers": 2,
    "vocab_size": 160,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "vaswani2017_base": {"dropout": 0.1},
    "t5_v1_1_small": {},
    "modern_small": {"n_kv_heads": 2},
    # Stacks of unlike width, feed-forward and heads: every term has figures of its own.
    "t5_v1_1_base": {
        "tie_embeddings": "none",
        "encoder": {"d_model": 40, "d_ff": 56, "n_heads": 2, "head_dim": 16},
        "decoder": {"d_ff": 96, "n_heads": 6, "head_dim": 8},
    },
}


def tiny(family: str) -> ModelConfig:
    tree = {
        "run": {"dir": "unused"},
        "model": {"preset": family, **TINY, **FAMILIES[family]},
        "data": {"train": "unused"},
        "train": {"steps": 1},
    }
    return build_config(tree).model


def build(config: ModelConfig) -> EncoderDecoder:
    model = build_model(config)
    initialize(model, 1, torch.device("cpu"))
    return model.train()


def packed(lengths: list[list[int]], width: int) -> torch.Tensor:
    """Segment ids [B, width] of samples of these lengths, then padding."""
    rows = [[i for i, n in enumerate(row, 1) for _ in range(n)] for row in lengths]
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int32)


PACKED = {
    "dense": (packed([[SOURCE_LEN]] * N_ROWS, SOURCE_LEN), packed([[TARGET_LEN]] * N_ROWS, TARGET_LEN)),
    "packed": (
        packed([[20, 9, 13], [40]], SOURCE_LEN),
        packed([[4, 8, 12], [11]], TARGET_LEN),
    ),
}


def loss_of(model: EncoderDecoder, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The training objective of rows with these segments."""
    sources, targets = (torch.arange(s.numel()).view(s.shape) % 100 + 3 for s in (source, target))
    hidden = model(
        sources,
        source,
        torch.arange(source.shape[1]).expand_as(source),
        targets,
        target,
        torch.arange(target.shape[1]).expand_as(target),
    )
    return linear_cross_entropy(
        hidden.flatten(0, 1),
        model.output_weight,
        (targets * (target != 0)).flatten(),
        ignore_id=0,
        chunk_rows=16,
    ).objective


def counted(model: EncoderDecoder, source: torch.Tensor, target: torch.Tensor, backward: bool = True) -> int:
    """torch's count of a step. Its registry knows no in-place addmm and no fused attention of the CPU."""
    # The operators of the loss, which adds to its gradient in place.
    in_place = {torch.ops.aten.addmm_: lambda _self, a, b, *_, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, sdpa_kernel(SDPBackend.MATH):
        with torch.set_grad_enabled(backward):
            loss = loss_of(model, source, target)
        if backward:
            loss.backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


@pytest.mark.parametrize("rows", PACKED)
@pytest.mark.parametrize("family", FAMILIES)
def test_executed_operations_equal_torchs_count(family: str, rows: str) -> None:
    """Forward alone, and forward with backward; a mask hides pairs and saves nothing."""
    config = tiny(family)
    work = executed_work(N_ROWS, SOURCE_LEN, TARGET_LEN)
    model, (source, target) = build(config), PACKED[rows]
    expected = counted(model, source, target)
    assert training_flops(config, work) == pytest.approx(expected, rel=WITHIN)
    assert hardware_flops(config, work, RecomputeConfig(), fused_attention=False) == pytest.approx(
        expected, rel=WITHIN
    )
    expected = counted(model, source, target, backward=False)
    assert forward_flops(config, work).total == pytest.approx(expected, rel=WITHIN)


@pytest.mark.parametrize("rows", PACKED)
@pytest.mark.parametrize("family", FAMILIES)
def test_useful_operations_equal_torchs_count_of_each_sample_by_itself(family: str, rows: str) -> None:
    """Each sample without padding or neighbours; torch counts both triangles of the causal scores, we one."""
    config, (source, target) = tiny(family), PACKED[rows]
    model, expected, n_hidden_pairs = build(config), 0, 0
    for source_row, target_row in zip(source, target, strict=True):
        for segment in range(1, int(source_row.max()) + 1):
            n_source, n_target = int((source_row == segment).sum()), int((target_row == segment).sum())
            ones = (
                torch.ones(1, n_source, dtype=torch.int32),
                torch.ones(1, n_target, dtype=torch.int32),
            )
            expected += counted(model, *ones)
            n_hidden_pairs += n_target * (n_target - 1) // 2
    work = useful_work(source, target)
    hidden = training_flops(config, Work(target_pairs=n_hidden_pairs))
    assert hidden > 0
    assert training_flops(config, work) + hidden == pytest.approx(expected, rel=WITHIN)


def test_counts_of_packed_rows() -> None:
    work = useful_work(*PACKED["packed"])
    assert work == Work(
        n_source=82,
        n_target=35,
        source_pairs=20**2 + 9**2 + 13**2 + 40**2,
        target_pairs=10 + 36 + 78 + 66,
        cross_pairs=20 * 4 + 9 * 8 + 13 * 12 + 40 * 11,
    )
    # A sample with one empty side, rows of padding, no rows.
    assert useful_work(packed([[3, 2], []], 8), packed([[5], []], 6)) == Work(5, 5, 13, 15, 15)
    assert useful_work(torch.zeros(0, 4, dtype=torch.int32), torch.zeros(0, 4, dtype=torch.int32)) == Work()
    assert work + Work() == work and Work(*work.as_tuple()) == work


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "sides",
    [
        ("full", "none"),
        ("none", "full"),
        ("full", "full"),
        ("selective", "selective"),
        ("every_n", "every_n"),
    ],
)
def test_recomputed_operations_are_counted(family: str, sides: tuple[Any, Any]) -> None:
    config, recompute = tiny(family), RecomputeConfig(encoder=sides[0], decoder=sides[1])
    model = build(config)
    apply_recompute(model, recompute)
    work = executed_work(N_ROWS, SOURCE_LEN, TARGET_LEN)
    found = hardware_flops(config, work, recompute, fused_attention=False)
    assert found == pytest.approx(counted(model, *PACKED["dense"]), rel=WITHIN)
    assert found > 1.02 * training_flops(config, work)


def test_fused_attention_computes_the_scores_again() -> None:
    """One of the two products of the forward pass."""
    config, work = tiny("modern_small"), Work(source_pairs=100, target_pairs=50, cross_pairs=70)
    extra = hardware_flops(config, work, RecomputeConfig()) - training_flops(config, work)
    assert extra == forward_flops(config, work).attention / 2 > 0


def test_a_known_model() -> None:
    """The paper's base model: 6 N per token but for embeddings, on sequences short enough that attention is little."""
    tree = {
        "run": {"dir": "unused"},
        "model": {"preset": "vaswani2017_base", "vocab_size": 37000},
        "data": {"train": "unused"},
        "train": {"steps": 1},
    }
    config = build_config(tree).model
    flops = forward_flops(config, executed_work(1, 1, 1))
    layer_weights = 6 * (4 * 512**2 + 2 * 512 * 2048), 6 * (8 * 512**2 + 2 * 512 * 2048)
    assert flops.encoder == 2 * layer_weights[0]
    assert flops.decoder == 2 * layer_weights[1]
    assert flops.output == 2 * 512 * 37000
