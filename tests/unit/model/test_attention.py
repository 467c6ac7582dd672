"""What may be attended to, attention by its formula, and the two position schemes that act on scores."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5Attention

from dist_transformer.model.attention import (
    MultiHeadAttention,
    _attend,
    _attend_by_products,
    may_attend,
    scores_mask,
)
from dist_transformer.model.positions import RelativeBias, Rotation, sinusoid_table
from tests.unit.model.small import small_config

Segments = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(Segments, Segments, st.booleans())
def test_may_attend_equals_a_slow_loop(queries: list[int], keys: list[int], causal: bool) -> None:
    if causal:
        keys = queries
    allowed = may_attend(torch.tensor([queries]), torch.tensor([keys]), causal)
    assert allowed.shape == (1, 1, len(queries), len(keys))
    for i, query in enumerate(queries):
        for j, key in enumerate(keys):
            expected = (query == key or query == 0) and not (causal and j > i)
            assert bool(allowed[0, 0, i, j]) == expected


def test_every_query_sees_something() -> None:
    """Or its softmax would be NaN, and NaN times a weight of 0 is NaN."""
    segments = torch.tensor([[1, 1, 2, 0, 0], [0, 0, 0, 0, 0]])
    for causal in (False, True):
        assert may_attend(segments, segments, causal).any(-1).all()


def test_scores_mask_keeps_a_bias_where_allowed() -> None:
    allowed = torch.tensor([[[[True, False]]]])
    bias = torch.tensor([[[[0.5, 0.25]], [[1.5, 1.25]]]])
    joined = scores_mask(allowed, bias, torch.float32)
    assert torch.equal(joined[..., 0], bias[..., 0])
    assert (joined[..., 1] == torch.finfo(torch.float32).min).all()
    assert scores_mask(allowed, None, torch.bfloat16).tolist() == [[[[0.0, torch.finfo(torch.bfloat16).min]]]]


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_attention_by_the_formula(n_kv_heads: int) -> None:
    config = small_config("positions_none", n_kv_heads=n_kv_heads)
    torch.manual_seed(0)
    attention = MultiHeadAttention(config, config.stack("encoder"), d_memory=32).eval().double()
    x, memory = torch.randn(2, 3, 32).double(), torch.randn(2, 5, 32).double()
    allowed = torch.rand(2, 1, 3, 5) < 0.7
    allowed[..., 0] = True
    actual = attention(
        attention.queries(x), attention.keys_values(memory), scores_mask(allowed, None, x.dtype)
    )

    heads = []
    for head in range(4):
        own = slice(8 * head, 8 * head + 8)
        shared = head * n_kv_heads // 4  # a group of neighbouring query heads has one key-value head
        theirs = slice(8 * shared, 8 * shared + 8)
        q, k, v = (
            attention.q_proj(x)[..., own],
            attention.k_proj(memory)[..., theirs],
            attention.v_proj(memory)[..., theirs],
        )
        scores = (q @ k.transpose(1, 2) / math.sqrt(8)).masked_fill(~allowed[:, 0], -math.inf)
        heads.append(scores.softmax(-1) @ v)
    torch.testing.assert_close(actual, attention.o_proj(torch.cat(heads, dim=-1)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("with_bias", [False, True])
def test_products_do_what_the_fused_kernel_does(with_bias: bool) -> None:
    """Values and gradients, with a mask of zeros and with one that is trained."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 8, dtype=torch.float64).transpose(1, 2) for n in (5, 7, 7))
    allowed = may_attend(torch.tensor([[1, 1, 2, 2, 0]] * 2), torch.tensor([[1, 1, 1, 2, 2, 2, 0]] * 2))
    bias = torch.randn(1, 3, 5, 7, dtype=torch.float64)
    results = []
    for attend in (_attend, _attend_by_products):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, bias)]
        mask = scores_mask(allowed, leaves[3] if with_bias else None, q.dtype)
        out = attend(*leaves[:3], mask, 0.3, 0.0)
        out.square().sum().backward()
        results.append([out, *(x.grad for x in leaves if x.grad is not None)])
    assert len(results[0]) == len(results[1]) == 4 + with_bias
    for fused, products in zip(*results, strict=True):
        assert torch.allclose(fused, products, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (16, 20), (64, 1000), (8, 128)])
def test_relative_buckets_equal_huggingface(n_buckets: int, max_distance: int, bidirectional: bool) -> None:
    distance = torch.arange(-3000, 3001)
    bias = RelativeBias(n_buckets, max_distance, n_heads=2, bidirectional=bidirectional)
    expected = T5Attention._relative_position_bucket(
        distance, bidirectional=bidirectional, num_buckets=n_buckets, max_distance=max_distance
    )
    assert torch.equal(bias.bucket(distance), expected)


def test_relative_bias_looks_up_key_minus_query() -> None:
    bias = RelativeBias(8, 20, n_heads=3, bidirectional=True)
    torch.nn.init.normal_(bias.weight)
    out = bias(torch.tensor([2, 3]), torch.tensor([0, 1, 2, 3, 4]))
    assert out.shape == (1, 3, 2, 5)
    for t, query in enumerate((2, 3)):
        for s, key in enumerate((0, 1, 2, 3, 4)):
            assert torch.equal(out[0, :, t, s], bias.weight[int(bias.bucket(torch.tensor(key - query)))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_with_bias_is_dense(dtype: torch.dtype) -> None:
    """Fused kernels of GPUs refuse a mask with any other stride than 1 in its last dimension."""
    bias = RelativeBias(8, 20, n_heads=3, bidirectional=True).to(dtype)
    torch.nn.init.normal_(bias.weight)
    segments = torch.tensor([[1, 1, 2, 2, 0]] * 2)
    mask = scores_mask(may_attend(segments, segments), bias(torch.arange(5), torch.arange(5)), dtype)
    assert mask.shape == (2, 3, 5, 5) and mask.is_contiguous()


def rotate(x: Tensor, position: int) -> Tensor:
    return Rotation(torch.tensor([[position]]), position + 1, x.shape[-1], 10000.0)(x[None, None, None])[
        0, 0, 0
    ]


def test_rotary_scores_depend_on_distance_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(8), torch.randn(8)
    near, far = rotate(q, 5) @ rotate(k, 3), rotate(q, 105) @ rotate(k, 103)
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-5)
    assert (near - rotate(q, 5) @ rotate(k, 4)).abs() > 1e-3
    assert torch.equal(rotate(q, 0), q)
    torch.testing.assert_close(rotate(q, 77).norm(), q.norm())


def test_rotation_by_the_formula() -> None:
    """Each pair as a complex number, times exp(i x position x frequency)."""
    torch.manual_seed(0)
    x, positions = torch.randn(2, 3, 4, 8, dtype=torch.float64), torch.tensor([[0, 1, 2], [7, 0, 30]])
    angle = positions[:, :, None, None] * 100.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    # The table holds float32.
    torch.testing.assert_close(Rotation(positions, 31, 8, 100.0)(x), expected, rtol=1e-6, atol=1e-6)


def test_gradient_of_a_rotation() -> None:
    torch.manual_seed(0)
    rotation = Rotation(torch.tensor([[0, 1, 2], [7, 0, 30]]), 31, 8, 100.0)
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rotation, (x,))
    assert rotation(x.bfloat16()).dtype == torch.bfloat16


def test_sinusoids_by_the_formula() -> None:
    table = sinusoid_table(50, 16, torch.device("cpu"))
    for position in (0, 1, 49):
        for i in range(8):
            angle = position / 10000 ** (2 * i / 16)
            assert abs(float(table[position, i]) - math.sin(angle)) < 1e-6
            assert abs(float(table[position, 8 + i]) - math.cos(angle)) < 1e-6
