"""Floating-point operations of an encoder-decoder, from its configuration and from what a batch really held.

A multiplication and the addition after it are two operations; matrix products are counted and nothing else, as in the
literature on MFU (Chowdhery et al. 2022, appendix B). Two figures matter. *Model FLOPs* are what the task needs:
real tokens, each sample's own attention pairs, causal pairs once. *Hardware FLOPs* are what the device executes:
padding, whole rows of scores under a mask, and everything that is computed twice.
"""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from dist_transformer.config import ModelConfig, RecomputeConfig, StackConfig

_GATED = ("reglu", "geglu", "geglu_tanh", "swiglu")


@dataclass(frozen=True)
class Work:
    """What a model is applied to, counted: positions, and pairs of a query and a key."""

    n_source: int = 0
    """Encoder positions; cross-attention's keys and values are made of each."""
    n_target: int = 0
    """Decoder positions."""
    source_pairs: int = 0
    """Pairs in the encoder's self-attention."""
    target_pairs: int = 0
    """Pairs in the decoder's self-attention."""
    cross_pairs: int = 0
    """Pairs of a target and a source position."""

    def __add__(self, other: Self) -> "Work":
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def as_tuple(self) -> tuple[int, ...]:
        """The counts in the order of the fields, to be summed over ranks."""
        return tuple(getattr(self, f.name) for f in fields(self))


def executed_work(n_rows: int, source_len: int, target_len: int) -> Work:
    """Rows as dense kernels compute them: every position, every pair, whatever the mask hides."""
    return Work(
        n_source=n_rows * source_len,
        n_target=n_rows * target_len,
        source_pairs=n_rows * source_len**2,
        target_pairs=n_rows * target_len**2,
        cross_pairs=n_rows * source_len * target_len,
    )


def useful_work(source_segments_BS: Tensor, target_segments_BT: Tensor) -> Work:
    """What packed rows hold: segment ids are 0 on padding and count each row's samples from 1."""
    n_segments = 1 + max(_largest(source_segments_BS), _largest(target_segments_BT))
    sources = _segment_lengths(source_segments_BS, n_segments)
    targets = _segment_lengths(target_segments_BT, n_segments)
    values = [
        sources.sum(),
        targets.sum(),
        (sources * sources).sum(),
        (targets * (targets + 1) // 2).sum(),
        (sources * targets).sum(),
    ]
    return Work(*(int(value) for value in torch.stack(values).tolist()))


@dataclass(frozen=True)
class Flops:
    """Operations of one forward pass, by where they are spent."""

    encoder: float
    """Projections and feed-forward of the encoder's layers."""
    decoder: float
    """Projections and feed-forward of the decoder's layers, cross-attention's keys and values included."""
    attention: float
    """Scores and weighted sums of all three attentions."""
    output: float
    """The projection to the vocabulary."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.encoder + self.decoder + self.attention + self.output


def forward_flops(model: ModelConfig, work: Work) -> Flops:
    """One forward pass.

    Raises:
        ValueError: if the configuration leaves `vocab_size` open.
    """
    if model.vocab_size is None:
        raise ValueError("model.vocab_size must be known before operations are counted")
    encoder, decoder = model.stack("encoder"), model.stack("decoder")
    return Flops(
        encoder=2.0 * encoder.n_layers * work.n_source * _encoder_weights(model, encoder),
        decoder=2.0
        * decoder.n_layers
        * (work.n_target * _decoder_weights(model, decoder) + work.n_source * _memory_weights(decoder)),
        attention=_attention(encoder, work.source_pairs)
        + _attention(decoder, work.target_pairs + work.cross_pairs),
        output=2.0 * work.n_target * decoder.d_model * model.vocab_size,
    )


def training_flops(model: ModelConfig, work: Work) -> float:
    """Forward and backward: each product of the forward pass has two in the backward (by input and by weight)."""
    return 3.0 * forward_flops(model, work).total


def hardware_flops(
    model: ModelConfig, work: Work, recompute: RecomputeConfig, fused_attention: bool = True
) -> float:
    """Forward, backward, and what the backward pass computes again.

    Args:
        work: what is executed, `executed_work` for dense kernels.
        recompute: layers that keep only their inputs run forward a second time; selective ones a part.
        fused_attention: the kernel forgets the scores and computes them again (flash and memory-efficient attention).
    """
    forward = forward_flops(model, work)
    encoder, decoder = model.stack("encoder"), model.stack("decoder")
    again = 0.5 * forward.attention if fused_attention else 0.0
    for policy, stack, weights, n_pairs, n_positions in (
        (recompute.encoder, encoder, forward.encoder, work.source_pairs, work.n_source),
        (recompute.decoder, decoder, forward.decoder, work.target_pairs + work.cross_pairs, work.n_target),
    ):
        attention, per_weight = _attention(stack, n_pairs), 2.0 * stack.n_layers * n_positions
        if policy == "selective":
            # Products with weights are kept, but for the cheap ones: attention's output projections.
            again += attention + per_weight * _output_weights(stack)
        elif policy != "none":
            share = 1.0
            if policy == "every_n":
                share = -(-stack.n_layers // recompute.every) / max(1, stack.n_layers)
            if model.norm_position == "pre" and not stack.dropout:
                # Nothing in the backward pass reads what a layer's last product gives: torch stops before it.
                weights -= per_weight * stack.d_model * stack.d_ff
            again += share * (weights + attention)
    return 3.0 * forward.total + again


def _encoder_weights(model: ModelConfig, stack: StackConfig) -> int:
    """Weights of one encoder layer's matrices."""
    return _self_attention_weights(stack) + _feed_forward_weights(model, stack)


def _decoder_weights(model: ModelConfig, stack: StackConfig) -> int:
    """Weights of one decoder layer's matrices that target positions meet: all but cross-attention's K and V."""
    cross = 2 * stack.d_model * stack.n_heads * stack.head_dim  # queries and output
    return _self_attention_weights(stack) + cross + _feed_forward_weights(model, stack)


def _memory_weights(stack: StackConfig) -> int:
    """Weights of one decoder layer's matrices that source positions meet: cross-attention's keys and values."""
    return 2 * stack.d_memory * stack.n_kv_heads * stack.head_dim


def _self_attention_weights(stack: StackConfig) -> int:
    return 2 * stack.d_model * (stack.n_heads + stack.n_kv_heads) * stack.head_dim


def _output_weights(stack: StackConfig) -> int:
    """Weights of one layer's output projections of attention; a decoder layer has two."""
    n_attentions = 1 if stack.side == "encoder" else 2
    return n_attentions * stack.d_model * stack.n_heads * stack.head_dim


def _feed_forward_weights(model: ModelConfig, stack: StackConfig) -> int:
    return (3 if model.ffn in _GATED else 2) * stack.d_model * stack.d_ff


def _attention(stack: StackConfig, n_pairs: int) -> float:
    """Scores and weighted sum: two products of head_dim for each pair, head and layer."""
    return 4.0 * stack.n_layers * n_pairs * stack.n_heads * stack.head_dim


def _largest(segments: Tensor) -> int:
    return int(segments.max()) if segments.numel() else 0


def _segment_lengths(segments_BT: Tensor, n_segments: int) -> Tensor:
    """[B, n_segments - 1] int64: positions of each row's samples, padding left out."""
    counts = torch.zeros(segments_BT.shape[0], n_segments, dtype=torch.int64, device=segments_BT.device)
    counts.scatter_add_(1, segments_BT.long(), torch.ones_like(segments_BT, dtype=torch.int64))
    return counts[:, 1:]
