"""How positions enter: added to embeddings (sinusoidal, learned), as a bias on scores (T5), or by rotating q and k."""

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@lru_cache(maxsize=16)
def sinusoid_table(length: int, d_model: int, device: torch.device) -> Tensor:
    """The paper's fixed positional encoding (section 3.5), [length, d_model] float32.

    PE(pos, i) = sin(pos / 10000^(2i/d_model)) in the first half of the columns and cos in the second. The paper's
    formula interleaves the two; its own code and Marian keep them in halves, which is the same up to a
    permutation of the columns, and so do we.
    """
    half = d_model // 2
    # numpy's and torch's float64 agree to the last float32 bit, so that the table equals Marian's.
    exponent = 2 * torch.arange(half, dtype=torch.float64) / d_model
    angles = torch.arange(length, dtype=torch.float64)[:, None] / torch.pow(10000.0, exponent)[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(device=device, dtype=torch.float32)


class LearnedPositions(nn.Module):
    """A trained vector for each position, added to the embedding."""

    def __init__(self, max_positions: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_positions, d_model))

    def forward(self, positions_BT: Tensor) -> Tensor:
        """[B, T] positions to [B, T, D]."""
        return F.embedding(positions_BT, self.weight)


class RelativeBias(nn.Module):
    """T5's relative position bias: a scalar for each head and bucket of distances, shared by a stack's layers.

    Source: Raffel et al. 2020, section 2.1. Half of the buckets are exact distances, the others grow
    logarithmically up to `max_distance`; a bidirectional stack splits the buckets between the two directions.
    """

    def __init__(self, n_buckets: int, max_distance: int, n_heads: int, bidirectional: bool) -> None:
        super().__init__()
        self.n_buckets, self.max_distance, self.bidirectional = n_buckets, max_distance, bidirectional
        self.weight = nn.Parameter(torch.empty(n_buckets, n_heads))

    def forward(self, query_positions_T: Tensor, key_positions_S: Tensor) -> Tensor:
        """[T] and [S] positions in the row to a bias on scores [1, H, T, S]."""
        distance_TS = key_positions_S[None, :] - query_positions_T[:, None]
        bias_TSH = F.embedding(self.bucket(distance_TS), self.weight)
        # Heads first in memory too: fused kernels of GPUs refuse a mask whose last dimension is not dense.
        return bias_TSH.permute(2, 0, 1).contiguous().unsqueeze(0)

    def bucket(self, distance: Tensor) -> Tensor:
        """The bucket of each distance (key position minus query position), int64 in [0, n_buckets)."""
        n_buckets = self.n_buckets
        offset = torch.zeros_like(distance)
        if self.bidirectional:
            n_buckets //= 2
            offset = (distance > 0).long() * n_buckets
            distance = distance.abs()
        else:
            distance = -distance.clamp(max=0)
        n_exact = n_buckets // 2
        ratio = torch.log(distance.clamp(min=1).float() / n_exact) / math.log(self.max_distance / n_exact)
        logarithmic = n_exact + (ratio * (n_buckets - n_exact)).long()
        return offset + torch.where(distance < n_exact, distance, logarithmic.clamp(max=n_buckets - 1))


@lru_cache(maxsize=16)
def _rotary_table(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequency[None, :]
    return angles.cos().float().to(device), angles.sin().float().to(device)


class Rotation:
    """Rotary positions (Su et al. 2021) of one batch: turns each pair of a head's columns by position x frequency.

    Computed once per forward pass and shared by all layers. The pairs are (i, i + K/2), as in Llama.
    """

    def __init__(self, positions_BT: Tensor, length: int, head_dim: int, theta: float) -> None:
        cos, sin = _rotary_table(length, head_dim, theta, positions_BT.device)
        self.cos_BT1k, self.sin_BT1k = cos[positions_BT].unsqueeze(2), sin[positions_BT].unsqueeze(2)

    def __call__(self, x_BTHK: Tensor) -> Tensor:
        """Rotate queries or keys [B, T, H, K]."""
        rotated: Tensor = _Rotate.apply(x_BTHK, self.cos_BT1k, self.sin_BT1k)  # type: ignore[no-untyped-call]
        return rotated


class _Rotate(torch.autograd.Function):
    """Its gradient is the rotation back, so that nothing of the input is kept and no product is traced."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(d_y, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Computed in float32 or wider (`cos` and `sin` are), rounded once, in as few passes as go without a kernel of
    its own: converting all of `x` first, and joining the halves, would read and write twice as much.
    """
    rotated = torch.empty_like(x)
    first, second = x.chunk(2, dim=-1)
    rotated_first, rotated_second = rotated.chunk(2, dim=-1)
    rotated_first.copy_(torch.addcmul(first * cos, second, sin, value=-1))
    rotated_second.copy_(torch.addcmul(second * cos, first, sin))
    return rotated
