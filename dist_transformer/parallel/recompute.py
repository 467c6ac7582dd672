"""Activation checkpointing (Chen et al. 2016): keep less in the forward pass, compute it again in the backward."""

import functools
from typing import Literal

from torch import nn
from torch.utils.checkpoint import checkpoint

from dist_transformer.config import RecomputeConfig
from dist_transformer.model import EncoderDecoder

Policy = Literal["none", "full"]


def apply_recompute(model: EncoderDecoder, config: RecomputeConfig) -> None:
    """Set each stack's policy on its layers, in place; parameter names stay as they are."""
    for layers, policy in ((model.encoder.layers, config.encoder), (model.decoder.layers, config.decoder)):
        for layer in layers:
            _wrap(layer, policy)


def _wrap(layer: nn.Module, policy: Policy) -> None:
    if policy == "full":
        # Random numbers of dropout are drawn again from the saved state: the same values.
        forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=True)
        layer.forward = _only_in_training(layer, forward)  # type: ignore[assignment]


def _only_in_training(layer: nn.Module, recomputed: functools.partial[object]) -> object:
    plain = layer.forward

    def forward(*args: object) -> object:
        return recomputed(*args) if layer.training else plain(*args)

    return forward
