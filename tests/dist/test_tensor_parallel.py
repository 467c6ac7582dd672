"""Every layer that ranks share, forward and backward, against the same layer on one rank; dropout; recomputation."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from dist_transformer.config import RecomputeConfig, TrainConfig
from dist_transformer.data.batch import Batch
from dist_transformer.model import EncoderDecoder, build_model
from dist_transformer.model.attention import may_attend, scores_mask
from dist_transformer.model.initialize import fill
from dist_transformer.model.positions import Rotation
from dist_transformer.parallel import cross_entropy
from dist_transformer.parallel.cross_entropy import linear_cross_entropy
from dist_transformer.parallel.objective import TrainingModule
from dist_transformer.parallel.random import first_seed, own_draws
from dist_transformer.parallel.recompute import apply_recompute
from dist_transformer.parallel.regions import TensorParallel, own_positions
from dist_transformer.parallel.sharding import gather_whole, partition_of, place, shard
from tests.dist.harness import Mesh, run_ranks
from tests.unit.model.small import PRESETS, random_samples, rows_of, small_config, small_model

RELATIVE = 1e-5
EXACT = 1e-12
"""For whole models, which are compared in float64: what sums in another order round otherwise in float32 grows from
layer to layer, past 1e-5 where attention is steep."""
SHAPE = {"vocab_size": 52}
B, S, T, D = 3, 12, 8, 32


def twins(
    kind: str, tp: TensorParallel, dtype: torch.dtype = torch.float32, **overrides: Any
) -> tuple[EncoderDecoder, EncoderDecoder]:
    """A model with random weights, and this rank's part of it."""
    overrides = {**SHAPE, **overrides}
    whole = small_model(kind, dtype, noise=0.05, **overrides).train()
    weights = dict(whole.named_parameters())
    part = build_model(small_config(kind, **overrides)).train()
    shard(part, tp)

    def cut(name: str, empty: nn.Parameter) -> nn.Parameter:
        partition, value = partition_of(empty), weights[name].detach()
        return place(empty, (value if partition is None else partition.cut(value)).clone(), tp)

    fill(part, cut)
    return whole, part


def error(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Relative error; below `floor` an expected norm counts as that."""
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / expected.norm().clamp(min=max(floor, 1e-30)))


def compare_gradients(
    part: EncoderDecoder, whole: EncoderDecoder, tp: TensorParallel, what: str, relative: float = RELATIVE
) -> int:
    expected = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    found = {name: p for name, p in part.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys(), what
    # A key's bias moves all scores of a query alike, so that its true gradient is 0 and what is found is rounding only.
    floor = 1e-2 * float(torch.stack([gradient.norm() for gradient in expected.values()]).norm())
    for name, parameter in found.items():
        assert parameter.grad is not None
        gradient = gather_whole(parameter.grad, partition_of(parameter), tp)
        assert error(gradient, expected[name], floor) < relative, f"{what}: gradient of {name}"
    return len(found)


Layer = Callable[[EncoderDecoder, Tensor, TensorParallel | None], Tensor]


def residual_ffn(model: EncoderDecoder, x: Tensor, tp: TensorParallel | None) -> Tensor:
    layer: Any = model.encoder.layers[0]
    found: Tensor = layer.feed_forward_residual(x, layer.feed_forward)
    return found


def feed_forward(model: EncoderDecoder, x: Tensor, tp: TensorParallel | None) -> Tensor:
    layer: Any = model.encoder.layers[0]
    found: Tensor = layer.feed_forward(x)
    return found


def self_attention(model: EncoderDecoder, x: Tensor, tp: TensorParallel | None) -> Tensor:
    attention: Any = model.encoder.layers[1].self_attention  # type: ignore[union-attr]
    segments = torch.tensor([[1] * 7 + [2] * 5] * B)
    bias = (
        None if model.encoder.relative_bias is None else model.encoder.relative_bias(*[torch.arange(S)] * 2)
    )
    rotation = None
    if model.config.positions == "rotary":
        rotation = Rotation(torch.arange(S).expand(B, S), S, model.encoder.stack.head_dim, 10000.0)
    q, keys_values = attention.project_self(x, rotation)
    found: Tensor = attention(q, keys_values, scores_mask(may_attend(segments, segments), bias, q.dtype))
    return found


def cross_attention(model: EncoderDecoder, memory: Tensor, tp: TensorParallel | None) -> Tensor:
    """Queries are a fixed tensor: the gradient that is compared is the memory's."""
    attention: Any = model.decoder.layers[0].cross_attention  # type: ignore[union-attr]
    target = torch.randn(B, T, D, generator=torch.Generator().manual_seed(7))
    target = target if tp is None else own_positions(target, tp)
    keys_values = attention.keys_values(model.decoder.memory_input(memory))
    found: Tensor = attention(attention.queries(target), keys_values, None)
    return found


LAYERS: dict[str, tuple[Layer, str]] = {
    "ReLU": (feed_forward, "vaswani2017_base"),
    "gated, with biases": (feed_forward, "ffn_swiglu"),
    "layer norm around feed-forward": (residual_ffn, "vaswani2017_base"),
    "RMS norm before feed-forward": (residual_ffn, "modern_small"),
    "multi-head": (self_attention, "vaswani2017_base"),
    "T5's bias on scores": (self_attention, "positions_relative_bias"),
    "grouped-query, QK-norm, rotary": (self_attention, "grouped_query_rotary"),
    "multi-query": (self_attention, "multi_query"),
    "cross": (cross_attention, "vaswani2017_base"),
    "cross, grouped-query": (cross_attention, "grouped_query_rotary"),
    "cross, multi-query": (cross_attention, "multi_query"),
}


def check_layers(tp: TensorParallel) -> None:
    generator = torch.Generator().manual_seed(5)
    for what, (layer, kind) in LAYERS.items():
        whole, part = twins(kind, tp)
        x = torch.randn(B, S, D, generator=generator).requires_grad_()
        own_x = own_positions(x.detach(), tp).clone().requires_grad_()
        y, own_y = layer(whole, x, None), layer(part, own_x, tp)
        upstream = torch.randn(y.shape, generator=generator)
        y.backward(upstream)  # type: ignore[no-untyped-call]
        own_y.backward(own_positions(upstream, tp))  # type: ignore[no-untyped-call]
        assert x.grad is not None and own_x.grad is not None
        assert error(own_y, own_positions(y, tp)) < RELATIVE, what
        assert error(own_x.grad, own_positions(x.grad, tp)) < RELATIVE, f"{what}: gradient of the input"
        assert compare_gradients(part, whole, tp, what) >= 2


def check_embeddings(tp: TensorParallel) -> None:
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(0, SHAPE["vocab_size"], (B, S), generator=generator)
    positions = torch.arange(S).expand(B, S).contiguous()
    for kind in ("positions_learned", "norm_embeddings", "vaswani2017_base", "t5_v1_1_small"):
        whole, part = twins(kind, tp)
        y, own_y = (
            model.encoder.input(model.source_embedding(tokens), positions, S) for model in (whole, part)
        )
        upstream = torch.randn(y.shape, generator=generator)
        y.backward(upstream)
        own_y.backward(own_positions(upstream, tp))
        assert error(own_y, own_positions(y, tp)) < RELATIVE, kind
        compare_gradients(part, whole, tp, f"embedding of {kind}")


def check_loss(tp: TensorParallel) -> None:
    generator = torch.Generator().manual_seed(8)
    for r_drop in (0.0, 5.0):
        for label_smoothing, z_loss, cached in ((0.0, 0.0, 2**18), (0.1, 1e-3, 2**18), (0.1, 1e-3, 60)):
            with mock.patch.object(cross_entropy, "_CACHED", cached):  # the last one: several blocks a chunk
                check_loss_with(tp, generator, label_smoothing, z_loss, r_drop)


def check_loss_with(
    tp: TensorParallel, generator: torch.Generator, label_smoothing: float, z_loss: float, r_drop: float
) -> None:
    whole, part = twins("vaswani2017_base", tp)
    n_rows = 2 * B if r_drop else B
    hidden = torch.randn(n_rows, T, D, generator=generator).requires_grad_()
    own = own_positions(hidden.detach(), tp).clone().requires_grad_()
    targets = torch.randint(0, SHAPE["vocab_size"], (B * T,), generator=generator)  # 0 does not count
    targets = targets.repeat(n_rows // B)
    options: dict[str, Any] = {
        "ignore_id": 0,
        "r_drop": r_drop,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "chunk_rows": 5,
    }
    expected = linear_cross_entropy(hidden.flatten(0, 1), whole.output_weight, targets, **options)
    entered = part.decoder.output_input(own).flatten(0, 1)
    found = linear_cross_entropy(entered, part.output_weight, targets, tp=tp, **options)
    for name, mine, theirs in zip(expected._fields, found, expected, strict=True):
        assert torch.allclose(mine.double(), theirs.double(), rtol=RELATIVE, atol=0), name
    expected.objective.backward()  # type: ignore[no-untyped-call]
    found.objective.backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None and own.grad is not None
    assert error(own.grad, own_positions(hidden.grad, tp)) < RELATIVE
    compare_gradients(part, whole, tp, "output projection")


KINDS = [
    *PRESETS,
    "positions_learned",
    "norm_embeddings",
    "relative_bias_widths",
    "grouped_query_relative_bias",
    "multi_query",
    "tie_none",
    "scaled_logits",
    "qk_norm",
]


def batch_of(packs: int = 3) -> Batch:
    """Packed rows whose lengths no number of ranks divides."""
    rows = rows_of([random_samples(2, seed=row) for row in range(packs)], source_len=17, target_len=15)
    return Batch(decoder_target_tokens=rows.pop("targets"), **rows)


def check_models(tp: TensorParallel) -> None:
    """Loss and every gradient of whole models."""
    train = TrainConfig(steps=1, label_smoothing=0.1, z_loss=1e-3, loss_chunk_rows=7)
    alone = TensorParallel(tp.group, 0, 1, sequence=False)
    batch = batch_of()
    for kind in KINDS:
        whole, part = twins(kind, tp, torch.float64)
        expected = TrainingModule(whole, train, alone).train()(batch)
        found = TrainingModule(part, train, tp).train()(batch)
        for mine, theirs in zip(found, expected, strict=True):
            if mine.dim():  # positions are padded to what the ranks can share equally
                n_rows = len(batch.decoder_target_tokens)
                mine = mine.view(n_rows, -1)[:, : theirs.numel() // n_rows].flatten()
            assert torch.allclose(mine.double(), theirs.double(), rtol=EXACT, atol=0), kind
        (expected.objective / expected.n_tokens).backward()
        (found.objective / found.n_tokens).backward()
        compare_gradients(part, whole, tp, kind, EXACT)


def check_dropout(tp: TensorParallel) -> None:
    """What ranks hold alike is dropped alike, what they share out is not; recomputation draws the same again."""
    torch.manual_seed(first_seed(1, 0, tp))
    everywhere = [torch.empty(16) for _ in range(tp.size)]
    torch.distributed.all_gather(everywhere, torch.rand(16), group=tp.group)
    assert torch.equal(everywhere[0], everywhere[-1]) == (not tp.sequence)
    with own_draws(tp):
        torch.distributed.all_gather(everywhere, torch.rand(16), group=tp.group)
    assert not torch.equal(everywhere[0], everywhere[-1])
    train, batch = TrainConfig(steps=1), batch_of()
    gradients: dict[str, list[Tensor]] = {}
    for policy in ("none", "full", "selective"):
        _, part = twins("modern_small", tp, dropout=0.4)
        apply_recompute(part, RecomputeConfig(encoder=policy, decoder=policy))
        torch.manual_seed(first_seed(2, 0, tp))
        TrainingModule(part, train, tp).train()(batch).objective.backward()
        gradients[policy] = [p.grad for p in part.parameters() if p.grad is not None]
        if not tp.sequence:
            # Had replicas been dropped differently, their gradients would differ between ranks.
            for parameter in part.parameters():
                if partition_of(parameter) is None and parameter.grad is not None:
                    copies = [torch.empty_like(parameter.grad) for _ in range(tp.size)]
                    torch.distributed.all_gather(copies, parameter.grad, group=tp.group)
                    torch.testing.assert_close(copies[0], copies[-1], rtol=1e-5, atol=1e-5)
    for policy in ("full", "selective"):
        for found, expected in zip(gradients[policy], gradients["none"], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def checks(mesh: Mesh) -> int:
    n = 0
    for sequence in (True, False):
        tp = TensorParallel.of(mesh, sequence)
        assert tp.sequence == sequence
        for check in (check_layers, check_embeddings, check_loss, check_models, check_dropout):
            check(tp)
            n += 1
    return n


@pytest.mark.parametrize("size", [2, 4])
def test_shared_layers_are_their_whole_twins(size: int) -> None:
    assert run_ranks(size, checks, tp_degree=size) == [10] * size
