"""FlexAttention (Dong et al. 2024) for packed rows: blocks of pairs in which no sample meets itself are left out."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


class FlexMask:
    """What may see what, and T5's bias: made once for all layers of a stack.

    As `attention.may_attend` and `attention.scores_mask` have it, but for queries on padding, which see nothing here
    and give 0: what they give is never used.

    Args:
        query_segments_BT, key_segments_BS: sample numbers, 0 for padding.
        bias_1HTS: added to the scores, with its gradient.
    """

    def __init__(
        self, query_segments_BT: Tensor, key_segments_BS: Tensor, causal: bool, bias_1HTS: Tensor | None
    ) -> None:
        # Late: with it comes torch's compiler, over a second of a start.
        from torch.nn.attention.flex_attention import create_block_mask

        def may_see(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            segment = query_segments_BT[row, query]
            return (segment == key_segments_BS[row, key]) & (segment != 0)

        def may_see_earlier(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return may_see(row, head, query, key) & (query >= key)

        (n_rows, n_queries), n_keys = query_segments_BT.shape, key_segments_BS.shape[1]
        self.blocks = create_block_mask(
            may_see_earlier if causal else may_see,
            n_rows, None, n_queries, n_keys,
            device=str(query_segments_BT.device),
        )  # fmt: skip
        self.bias_HTS: Tensor | None = None
        if bias_1HTS is not None:
            # All rows' gradients are added into this one, in its own precision. A copy: of a view that a compiled
            # kernel captures, torch 2.13 loses the gradient.
            wide = torch.promote_types(bias_1HTS.dtype, torch.float32)
            self.bias_HTS = bias_1HTS[0].to(wide, copy=True)

    def attend(self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, scale: float) -> Tensor:
        """softmax(scale Q K^T + bias) V, [B, H, T, K]; H a multiple of G, the key-value heads."""
        bias_HTS = self.bias_HTS

        def add_bias(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            assert bias_HTS is not None
            return score + bias_HTS[head, query, key]

        heads_BHTK: Tensor = _kernel(q_BHTK.device.type)(
            q_BHTK, k_BGSK, v_BGSK,
            score_mod=None if bias_HTS is None else add_bias,
            block_mask=self.blocks,
            scale=scale,
            enable_gqa=q_BHTK.shape[1] != k_BGSK.shape[1],
            # Fewer than 128 queries would go to a kernel for decoding, which has no blocks for groups of 32 to 127.
            kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
        )  # fmt: skip
        return heads_BHTK


def _kernel(device: str) -> Callable[..., Tensor]:
    """Compiled by itself, unless what calls it is being compiled. On a CPU the plain formula, all pairs of it."""
    from torch.nn.attention.flex_attention import flex_attention

    if device == "cpu" or torch.compiler.is_compiling():
        return flex_attention
    return _compiled()


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # A program for each of a layer's three attentions; rows are of one shape.
    return torch.compile(flex_attention, dynamic=False)
