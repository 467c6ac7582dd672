"""The encoder: a stack of layers of self-attention and feed-forward (the paper, figure 1, left)."""

import torch
from torch import Tensor, nn

from dist_transformer.config import ModelConfig
from dist_transformer.model.attention import Kernel, MultiHeadAttention, build_mask
from dist_transformer.model.dropout import dropout
from dist_transformer.model.flex import FlexMask
from dist_transformer.model.layers import AddNorm, FeedForward, StackInput, build_norm
from dist_transformer.model.positions import RelativeBias, Rotation


class EncoderLayer(nn.Module):
    """Self-attention, Add & Norm, feed-forward, Add & Norm."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        stack = model.stack("encoder")
        self.self_attention = MultiHeadAttention(model, stack, stack.d_model)
        self.self_attention_residual = AddNorm(model, stack)
        self.feed_forward = FeedForward(model, stack)
        self.feed_forward_residual = AddNorm(model, stack)

    def forward(self, x_BSD: Tensor, mask: Tensor | FlexMask, rotation: Rotation | None) -> Tensor:
        """[B, S, D] to [B, S, D]."""

        def attend(y_BSD: Tensor) -> Tensor:
            q_BHSK, keys_values = self.self_attention.project_self(y_BSD, rotation)
            out_BSD: Tensor = self.self_attention(q_BHSK, keys_values, mask)
            return out_BSD

        x_BSD = self.self_attention_residual(x_BSD, attend)
        out_BSD: Tensor = self.feed_forward_residual(x_BSD, self.feed_forward)
        return out_BSD


class Encoder(nn.Module):
    """Embedded source to the memory that the decoder attends to."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.config, self.stack = model, model.stack("encoder")
        self.kernel: Kernel = "sdpa"
        """Of attention in training; decoding and evaluation, whose shapes change, have SDPA."""
        self.input = StackInput(model, self.stack)
        self.layers = nn.ModuleList(EncoderLayer(model) for _ in range(self.stack.n_layers))
        self.relative_bias = (
            RelativeBias(
                model.relative_buckets, model.relative_max_distance, self.stack.n_heads, bidirectional=True
            )
            if model.positions == "relative_bias"
            else None
        )
        self.final_norm = build_norm(model, self.stack.d_model) if model.norm_position == "pre" else None

    def forward(self, x_BSD: Tensor, segment_ids_BS: Tensor, positions_BS: Tensor) -> Tensor:
        """Embeddings [B, S, D] to memory [B, S, D]; samples of a row do not see each other."""
        length = segment_ids_BS.shape[1]  # of whole rows: a sharded model has a part of x_BSD here
        bias = None
        if self.relative_bias is not None:
            # Within a sample the difference of places in the row is the difference of positions.
            row = torch.arange(length, device=x_BSD.device)
            bias = self.relative_bias(row, row)
        kernel = self.kernel if self.training else "sdpa"
        mask = build_mask(segment_ids_BS, segment_ids_BS, bias, x_BSD.dtype, kernel=kernel)
        rotation = None
        if self.config.positions == "rotary":
            rotation = Rotation(positions_BS, length, self.stack.head_dim, self.config.rope_theta)
        x_BSD = self.input(x_BSD, positions_BS, length)
        for layer in self.layers:
            x_BSD = layer(x_BSD, mask, rotation)
        if self.final_norm is not None:
            x_BSD = dropout(self.final_norm(x_BSD), self.stack.dropout, self.training)
        return x_BSD
