"""The decoder: masked self-attention, attention to the encoder, feed-forward (the paper, figure 1, right)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_transformer.config import ModelConfig
from dist_transformer.model.attention import MultiHeadAttention, may_attend, scores_mask
from dist_transformer.model.cache import KeyValueCache, LayerCache
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
        memory_BSD: Tensor | None,
        self_mask: Tensor | None,
        cross_mask: Tensor | None,
        rotation: Rotation | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """[B, T, D] to [B, T, D]. With a cache, T new positions are appended to it and `memory_BSD` is not read."""

        def attend_to_target(y_BTD: Tensor) -> Tensor:
            q_BHTK, keys_values = self.self_attention.project_self(y_BTD, rotation)
            if cache is not None:
                keys_values = cache.append(*keys_values)
            out_BTD: Tensor = self.self_attention(q_BHTK, keys_values, self_mask)
            return out_BTD

        def attend_to_source(y_BTD: Tensor) -> Tensor:
            if cache is not None:
                # A source's hypotheses are its queries: cross-attention knows no order among queries, and so
                # neither are the keys and values copied for each hypothesis nor read once for each.
                y_BTD = y_BTD.reshape(cache.cross[0].shape[0], -1, y_BTD.shape[-1])
                keys_values = cache.cross
            else:
                assert memory_BSD is not None
                keys_values = self.cross_attention.keys_values(memory_BSD)
            out_BTD: Tensor = self.cross_attention(
                self.cross_attention.queries(y_BTD), keys_values, cross_mask
            )
            return out_BTD.view_as(x_BTD)

        x_BTD = self.self_attention_residual(x_BTD, attend_to_target)
        x_BTD = self.cross_attention_residual(x_BTD, attend_to_source)
        out_BTD: Tensor = self.feed_forward_residual(x_BTD, self.feed_forward)
        return out_BTD


class Decoder(nn.Module):
    """Embedded target and memory to the hidden states that the output projection reads."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.config, self.stack = model, model.stack("decoder")
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
        self_mask = scores_mask(may_attend(segment_ids_BT, segment_ids_BT, causal=True), bias)
        cross_mask = may_attend(segment_ids_BT, memory_segment_ids_BS)
        rotation = self._rotation(positions_BT, length)
        x_BTD = self.input(x_BTD, positions_BT, length)
        for layer in self.layers:
            x_BTD = layer(x_BTD, memory_BSD, self_mask, cross_mask, rotation)
        return self._finish(x_BTD)

    def start(self, memory_BSD: Tensor, memory_segment_ids_BS: Tensor, max_len: int) -> KeyValueCache:
        """A cache for decoding up to `max_len` positions: cross-attention's keys and values are computed here, once."""
        memory_BSD = self.memory_input(memory_BSD)
        cross = [layer.cross_attention.keys_values(memory_BSD) for layer in self.layers]  # type: ignore[union-attr, operator]
        return KeyValueCache(cross, memory_segment_ids_BS != 0, max_len)

    def step(self, x_BTD: Tensor, cache: KeyValueCache) -> Tensor:
        """The next T positions of every row, given all before them in the cache; hidden states [B, T, D]."""
        start, length = cache.length, x_BTD.shape[1]
        keys = torch.arange(start + length, device=x_BTD.device)
        queries = keys[start:]
        bias = None if self.relative_bias is None else self.relative_bias(queries, keys)
        self_mask = bias  # a single new position sees all
        if length > 1:
            self_mask = scores_mask((keys[None, :] <= queries[:, None])[None, None], bias)
        rotation = self._rotation(queries[None, :], start + length)
        x_BTD = self.input(x_BTD, queries.expand(x_BTD.shape[0], -1), start + length)
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x_BTD = layer(x_BTD, None, self_mask, cache.cross_mask, rotation, layer_cache)
        cache.length += length
        return self._finish(x_BTD)

    def _rotation(self, positions_BT: Tensor, length: int) -> Rotation | None:
        if self.config.positions != "rotary":
            return None
        return Rotation(positions_BT, length, self.stack.head_dim, self.config.rope_theta)

    def _finish(self, x_BTD: Tensor) -> Tensor:
        if self.final_norm is not None:
            x_BTD = F.dropout(self.final_norm(x_BTD), self.stack.dropout, self.training)
        if self.config.scale_logits:
            x_BTD = x_BTD * self.stack.d_model**-0.5
        hidden_BTD: Tensor = self.output_input(x_BTD)
        return hidden_BTD
