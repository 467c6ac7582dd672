"""The decoder: masked self-attention, attention to the encoder, feed-forward (the paper, figure 1, right)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dist_transformer.config import ModelConfig
from dist_transformer.model.attention import Kernel, MultiHeadAttention, build_mask
from dist_transformer.model.cache import KeyValueCache, LayerCache
from dist_transformer.model.dropout import dropout
from dist_transformer.model.flex import FlexMask
from dist_transformer.model.layers import AddNorm, FeedForward, StackInput, build_norm
from dist_transformer.model.positions import RelativeBias, Rotation


class DecoderLayer(nn.Module):
    """Masked self-attention, cross-attention and feed-forward, each with Add & Norm."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        stack = model.stack("decoder")
        self.self_attention = MultiHeadAttention(model, stack, stack.d_model)
        self.self_attention_residual = AddNorm(model, stack)
        self.cross_attention = MultiHeadAttention(model, stack, stack.d_memory)
        self.cross_attention_residual = AddNorm(model, stack)
        self.feed_forward = FeedForward(model, stack)
        self.feed_forward_residual = AddNorm(model, stack)

    def forward(
        self,
        x_BTD: Tensor,
        memory_BSD: Tensor,
        self_mask: Tensor | FlexMask,
        cross_mask: Tensor | FlexMask,
        rotation: Rotation | None,
    ) -> Tensor:
        """[B, T, D] to [B, T, D]: all target positions at once."""

        def attend_to_target(y_BTD: Tensor) -> Tensor:
            q_BHTK, keys_values = self.self_attention.project_self(y_BTD, rotation)
            out_BTD: Tensor = self.self_attention(q_BHTK, keys_values, self_mask)
            return out_BTD

        def attend_to_source(y_BTD: Tensor) -> Tensor:
            keys_values = self.cross_attention.keys_values(memory_BSD)
            out_BTD: Tensor = self.cross_attention(
                self.cross_attention.queries(y_BTD), keys_values, cross_mask
            )
            return out_BTD

        return self._residual(x_BTD, attend_to_target, attend_to_source)

    def step(
        self,
        x_BQD: Tensor,
        cache: LayerCache,
        self_bias: Tensor | None,
        cross_bias: Tensor | None,
        rotation: Rotation | None,
    ) -> Tensor:
        """[B, Q, D] to [B, Q, D]: new target positions, which are appended to the cache."""

        def attend_to_target(y_BQD: Tensor) -> Tensor:
            q_BHQK, keys_values = self.self_attention.project_self(y_BQD, rotation)
            return self.self_attention.attend_few(q_BHQK, cache.append(*keys_values), self_bias)

        def attend_to_source(y_BQD: Tensor) -> Tensor:
            return self.cross_attention.attend_few(
                self.cross_attention.queries(y_BQD), cache.cross, cross_bias
            )

        return self._residual(x_BQD, attend_to_target, attend_to_source)

    def _residual(
        self,
        x_BTD: Tensor,
        attend_to_target: Callable[[Tensor], Tensor],
        attend_to_source: Callable[[Tensor], Tensor],
    ) -> Tensor:
        x_BTD = self.self_attention_residual(x_BTD, attend_to_target)
        x_BTD = self.cross_attention_residual(x_BTD, attend_to_source)
        out_BTD: Tensor = self.feed_forward_residual(x_BTD, self.feed_forward)
        return out_BTD


class Decoder(nn.Module):
    """Embedded target and memory to the hidden states that the output projection reads."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.config, self.stack = model, model.stack("decoder")
        self.kernel: Kernel = "sdpa"  # of attention in training, as the encoder's
        self.input = StackInput(model, self.stack)
        self.layers = nn.ModuleList(DecoderLayer(model) for _ in range(self.stack.n_layers))
        self.relative_bias = (
            RelativeBias(
                model.relative_buckets, model.relative_max_distance, self.stack.n_heads, bidirectional=False
            )
            if model.positions == "relative_bias"
            else None
        )
        self.final_norm = build_norm(model, self.stack.d_model) if model.norm_position == "pre" else None
        # What enters cross-attention, and the output projection, of every layer once: a sharded model gathers here.
        self.memory_input, self.output_input = nn.Identity(), nn.Identity()

    def forward(
        self,
        x_BTD: Tensor,
        segment_ids_BT: Tensor,
        positions_BT: Tensor,
        memory_BSD: Tensor,
        memory_segment_ids_BS: Tensor,
    ) -> Tensor:
        """All target positions at once: embeddings [B, T, D] to hidden states [B, T, D]."""
        length = segment_ids_BT.shape[1]  # of whole rows: a sharded model has a part of x_BTD here
        memory_BSD = self.memory_input(memory_BSD)
        row = torch.arange(length, device=x_BTD.device)
        bias = None if self.relative_bias is None else self.relative_bias(row, row)
        kernel = self.kernel if self.training else "sdpa"
        dtype = x_BTD.dtype
        self_mask = build_mask(segment_ids_BT, segment_ids_BT, bias, dtype, causal=True, kernel=kernel)
        cross_mask = build_mask(segment_ids_BT, memory_segment_ids_BS, None, dtype, kernel=kernel)
        rotation = self._rotation(positions_BT, length)
        x_BTD = self.input(x_BTD, positions_BT, length)
        for layer in self.layers:
            x_BTD = layer(x_BTD, memory_BSD, self_mask, cross_mask, rotation)
        return self._finish(x_BTD)

    def start(self, memory_BSD: Tensor, memory_segment_ids_BS: Tensor) -> KeyValueCache:
        """A cache for decoding: cross-attention's keys and values are computed here, once."""
        memory_BSD = self.memory_input(memory_BSD)
        cross = [layer.cross_attention.keys_values(memory_BSD) for layer in self.layers]  # type: ignore[union-attr, operator]
        return KeyValueCache(cross, memory_segment_ids_BS != 0)

    def step(self, x_RTD: Tensor, cache: KeyValueCache) -> Tensor:
        """The next T positions of every hypothesis, given all before them in the cache; hidden states [R, T, D].

        Args:
            x_RTD: R = B x N rows: a source's hypotheses are neighbours.
        """
        n_rows, n_new, d_model = x_RTD.shape
        start, n_sources = cache.length, cache.n_sources
        bias, slot_positions_BS = cache.extend(n_new)
        new_T = torch.arange(start, start + n_new, device=x_RTD.device)
        if self.relative_bias is not None:
            positions = torch.arange(start + n_new, device=x_RTD.device)
            bias_HTL = self.relative_bias(new_T, positions)[0]
            bias_BHTS = bias_HTL[:, :, slot_positions_BS].permute(2, 0, 1, 3)
            if n_new > 1:
                bias_BHTS = bias_BHTS.repeat(1, 1, cache.n_hypotheses, 1)
            bias = bias_BHTS if bias is None else bias + bias_BHTS
        positions_1Q = new_T.repeat(n_rows // n_sources)[None]
        rotation = self._rotation(positions_1Q, start + n_new)
        x_BQD = x_RTD.reshape(n_sources, -1, d_model)
        x_BQD = self.input(x_BQD, positions_1Q.expand(n_sources, -1), start + n_new)
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x_BQD = layer.step(x_BQD, layer_cache, bias, cache.cross_bias, rotation)  # type: ignore[operator]
        return self._finish(x_BQD).view(n_rows, n_new, -1)

    def _rotation(self, positions_BT: Tensor, length: int) -> Rotation | None:
        if self.config.positions != "rotary":
            return None
        return Rotation(positions_BT, length, self.stack.head_dim, self.config.rope_theta)

    def _finish(self, x_BTD: Tensor) -> Tensor:
        if self.final_norm is not None:
            x_BTD = dropout(self.final_norm(x_BTD), self.stack.dropout, self.training)
        if self.config.scale_logits:
            x_BTD = x_BTD * self.stack.d_model**-0.5
        hidden_BTD: Tensor = self.output_input(x_BTD)
        return hidden_BTD
