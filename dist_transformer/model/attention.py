"""Multi-head attention (the paper, section 3.2) and what a query may attend to."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_transformer.config import ModelConfig, StackConfig
from dist_transformer.model.dropout import dropout
from dist_transformer.model.flex import FlexMask
from dist_transformer.model.layers import Project
from dist_transformer.model.positions import Rotation

Kernel = Literal["sdpa", "flex"]
"""What computes attention: torch's scaled_dot_product_attention, or `FlexMask`."""
_ALIGNED = 8
_LEAST_QUERIES = 4
"""CPUs add up products of fewer rows in another order: with so many, a result does not depend on who else asks."""


class MultiHeadAttention(nn.Module):
    """MultiHead(Q, K, V) = Concat(head_1, ..., head_H) W^O, head_i = softmax(Q_i K_i^T / sqrt(d_k)) V_i.

    With fewer key-value heads than query heads, groups of query heads share one (grouped-query attention,
    Ainslie et al. 2023). Self-attention and cross-attention are this one class: queries, keys and values come from
    `project_self`, or from `queries` and `keys_values`, so that a decoder can keep the latter.

    Args:
        d_memory: width of what is attended to; `stack.d_model` for self-attention.
    """

    def __init__(self, model: ModelConfig, stack: StackConfig, d_memory: int) -> None:
        super().__init__()
        self.n_heads, self.head_dim = stack.n_heads, stack.head_dim
        self.n_groups = stack.n_heads // stack.n_kv_heads
        self.scale = 1.0 / math.sqrt(stack.head_dim) if model.scale_attention else 1.0
        self.dropout = model.dropout if model.attention_dropout is None else model.attention_dropout
        d_queries, d_keys = stack.n_heads * stack.head_dim, stack.n_kv_heads * stack.head_dim
        self.q_proj = nn.Linear(stack.d_model, d_queries, bias=model.bias)
        self.k_proj = nn.Linear(d_memory, d_keys, bias=model.bias)
        self.v_proj = nn.Linear(d_memory, d_keys, bias=model.bias)
        self.o_proj = nn.Linear(d_queries, stack.d_model, bias=model.bias)
        self.project = Project()
        self.q_norm = nn.RMSNorm(stack.head_dim, eps=model.norm_eps) if model.qk_norm else None
        self.k_norm = nn.RMSNorm(stack.head_dim, eps=model.norm_eps) if model.qk_norm else None

    def project_self(
        self, x_BTD: Tensor, rotation: Rotation | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What attends to itself [B, T, D] to queries, and keys and values, all [B, H, T, K]."""
        q_BTQ, k_BTQ, v_BTQ = self.project(x_BTD, self.q_proj, self.k_proj, self.v_proj)
        return self._queries(q_BTQ, rotation), self._keys_values(k_BTQ, v_BTQ, rotation)

    def queries(self, x_BTD: Tensor) -> Tensor:
        """What attends [B, T, D] to queries [B, H, T, K]."""
        (q_BTQ,) = self.project(x_BTD, self.q_proj)
        return self._queries(q_BTQ, None)

    def keys_values(self, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """What is attended to [B, S, D] to keys and values [B, H, S, K] each, H the key-value heads."""
        return self._keys_values(self.k_proj(memory_BSD), self.v_proj(memory_BSD), None)

    def forward(
        self, q_BHTK: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | FlexMask | None
    ) -> Tensor:
        """Attend from queries to keys and values; returns [B, T, D].

        Args:
            mask: what `build_mask` gives; a tensor is broadcastable to [B, H, T, S] and added to the scores.
        """
        k_BHSK, v_BHSK = keys_values
        if isinstance(mask, FlexMask):
            heads_BHTK = mask.attend(q_BHTK, k_BHSK, v_BHSK, self.scale)
        else:
            if self.n_groups > 1:
                k_BHSK = k_BHSK.repeat_interleave(self.n_groups, dim=1)
                v_BHSK = v_BHSK.repeat_interleave(self.n_groups, dim=1)
            dropped = self.dropout if self.training else 0.0
            heads_BHTK = _attend(q_BHTK, k_BHSK, v_BHSK, mask, self.scale, dropped)
        out_BTD: Tensor = self.o_proj(heads_BHTK.transpose(1, 2).flatten(2))
        return out_BTD

    def attend_few(
        self, q_BHTK: Tensor, keys_values: tuple[Tensor, Tensor], scores_bias: Tensor | None
    ) -> Tensor:
        """As `forward`, for the few queries of a decoding step and without dropout; returns [B, T, D].

        Two batched products: fused kernels cut long queries into blocks, and for a handful of queries a source
        take up to twice the time. The query heads of a group are further queries of its keys, which are not copied.

        Args:
            scores_bias: broadcastable to [B, H, T, S], added to the scores.
        """
        k_BGSK, v_BGSK = keys_values
        n_rows, n_heads, n_queries, head_dim = q_BHTK.shape
        n_kv_heads, n_grouped = k_BGSK.shape[1], self.n_groups * n_queries
        q_XTK = (q_BHTK * self.scale).reshape(n_rows * n_kv_heads, n_grouped, head_dim)
        if n_grouped < _LEAST_QUERIES and q_XTK.device.type == "cpu":
            q_XTK = F.pad(q_XTK, (0, 0, 0, _LEAST_QUERIES - n_grouped))
        scores_XTS = torch.bmm(q_XTK, k_BGSK.flatten(0, 1).transpose(1, 2))
        # [B, G, heads of a group, Q, ...]
        split = (n_rows, n_kv_heads, q_XTK.shape[1], -1)
        if scores_bias is not None:
            of_all_heads = scores_bias.shape[1] == 1
            grouped = (1, 1) if of_all_heads else (n_kv_heads, self.n_groups)
            bias = scores_bias.reshape(scores_bias.shape[0], *grouped, *scores_bias.shape[2:])
            scores = scores_XTS.view(split)[:, :, :n_grouped]
            scores.view(n_rows, n_kv_heads, self.n_groups, n_queries, -1).add_(bias)
        heads_XTK = torch.bmm(scores_XTS.softmax(dim=-1), v_BGSK.flatten(0, 1))
        heads_BHTK = heads_XTK.view(split)[:, :, :n_grouped].reshape(n_rows, n_heads, n_queries, head_dim)
        out_BTD: Tensor = self.o_proj(heads_BHTK.transpose(1, 2).flatten(2))
        return out_BTD

    def _queries(self, q_BTQ: Tensor, rotation: Rotation | None) -> Tensor:
        return self._placed(self._split_heads(q_BTQ), self.q_norm, rotation).transpose(1, 2)

    def _keys_values(self, k_BSQ: Tensor, v_BSQ: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        k_BSHK = self._placed(self._split_heads(k_BSQ), self.k_norm, rotation)
        return k_BSHK.transpose(1, 2), self._split_heads(v_BSQ).transpose(1, 2)

    def _placed(self, x_BTHK: Tensor, norm: nn.Module | None, rotation: Rotation | None) -> Tensor:
        # Positions before heads, as in memory: behind a transposition each would make a copy.
        if norm is not None:
            x_BTHK = norm(x_BTHK)
        return x_BTHK if rotation is None else rotation(x_BTHK)

    def _split_heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.view(*x_BTD.shape[:-1], -1, self.head_dim)


def _attend(
    q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, scores_mask: Tensor | None, scale: float, dropped: float
) -> Tensor:
    """softmax(scale Q K^T) V, [B, H, T, K], with dropout of the weights."""
    # CPUs: torch has no fused kernel with dropout, and that for bfloat16 takes two to three times as long as products
    # do. In float32 the fused kernel is the faster one, by a fifth (docs/log.md).
    if q_BHTK.device.type == "cpu" and (dropped or q_BHTK.dtype == torch.bfloat16):
        return _attend_by_products(q_BHTK, k_BHSK, v_BHSK, scores_mask, scale, dropped)
    return F.scaled_dot_product_attention(
        q_BHTK, k_BHSK, v_BHSK, attn_mask=scores_mask, dropout_p=dropped, scale=scale
    )


def _attend_by_products(
    q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, scores_mask: Tensor | None, scale: float, dropped: float
) -> Tensor:
    n_rows, n_heads, n_queries, head_dim = q_BHTK.shape
    q_XTK, k_XSK, v_XSK = (x.reshape(n_rows * n_heads, -1, head_dim) for x in (q_BHTK, k_BHSK, v_BHSK))
    nothing = q_XTK.new_zeros(1)  # beta = 0: not even read
    scores_XTS = torch.baddbmm(nothing, q_XTK, k_XSK.transpose(1, 2), beta=0, alpha=scale)
    scores_BHTS = scores_XTS.view(n_rows, n_heads, n_queries, -1)
    if scores_mask is not None:
        scores_BHTS = scores_BHTS.add_(scores_mask)
    weights_BHTS = dropout(scores_BHTS.softmax(dim=-1), dropped, True)
    return torch.bmm(weights_BHTS.flatten(0, 1), v_XSK).view(n_rows, n_heads, n_queries, head_dim)


def build_mask(
    query_segments_BT: Tensor,
    key_segments_BS: Tensor,
    bias_1HTS: Tensor | None,
    dtype: torch.dtype,
    *,
    causal: bool = False,
    kernel: Kernel = "sdpa",
) -> Tensor | FlexMask:
    """What all layers of a stack attend by: who may see whom, and a bias on the scores."""
    if kernel == "flex":
        return FlexMask(query_segments_BT, key_segments_BS, causal, bias_1HTS)
    return scores_mask(may_attend(query_segments_BT, key_segments_BS, causal), bias_1HTS, dtype)


def may_attend(query_segments_BT: Tensor, key_segments_BS: Tensor, causal: bool = False) -> Tensor:
    """Which query may see which key, [B, 1, T, S]: the same sample only, and, if causal, nothing later.

    A query on padding (segment 0) may see every key: its output is never used, and a softmax over nothing
    would be NaN. No other query sees padding.
    """
    query_B1T1, key_B11S = query_segments_BT[:, None, :, None], key_segments_BS[:, None, None, :]
    allowed = (query_B1T1 == key_B11S) | (query_B1T1 == 0)
    if causal:
        n_queries, n_keys = query_segments_BT.shape[1], key_segments_BS.shape[1]
        allowed = allowed & torch.ones(n_queries, n_keys, dtype=torch.bool, device=allowed.device).tril()
    return allowed


def scores_mask(allowed_B1TS: Tensor, bias_1HTS: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What all layers of a stack add to their scores: the bias, or 0, where allowed; the least number elsewhere.

    Of a boolean mask each layer would make such a tensor of its own, and keep it for the backward pass.
    """
    bias = torch.zeros((), dtype=dtype, device=allowed_B1TS.device) if bias_1HTS is None else bias_1HTS
    return _aligned(torch.where(allowed_B1TS, bias, torch.finfo(bias.dtype).min))


def _aligned(mask: Tensor) -> Tensor:
    """CUDA's fused attention wants a mask's rows to begin at multiples of 8 elements; of another mask each layer would
    make, and keep, a copy that does.
    """
    n_keys = mask.shape[-1]
    missing = -n_keys % _ALIGNED
    if mask.device.type == "cpu" or not missing:
        return mask
    return F.pad(mask, (0, missing))[..., :n_keys]
