"""Activation checkpointing (Chen et al. 2016): keep less in the forward pass, compute it again in the backward."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dist_transformer.config import RecomputeConfig
from dist_transformer.model import EncoderDecoder

_KEPT = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
"""What selective recomputation keeps: products with weights, most of a layer's arithmetic. Scores, softmax, norms,
activations and dropout are computed again (Korthikanti et al. 2022, section 5)."""


def apply_recompute(model: EncoderDecoder, config: RecomputeConfig) -> None:
    """Set each stack's policy on its layers, in place; parameter names stay as they are."""
    for layers, policy in ((model.encoder.layers, config.encoder), (model.decoder.layers, config.decoder)):
        for index, layer in enumerate(layers):
            if policy == "full" or (policy == "every_n" and index % config.every == 0):
                _recompute(layer)
            elif policy == "selective":
                _separate_biases(layer)
                _recompute(
                    layer, context_fn=functools.partial(create_selective_checkpoint_contexts, list(_KEPT))
                )


def _recompute(layer: nn.Module, **options: Any) -> None:
    """Recompute a layer, except in evaluation."""
    plain: Callable[..., Any] = layer.forward

    def forward(*args: Any) -> Any:
        if not layer.training:
            return plain(*args)
        # Random numbers of dropout are drawn again from the saved state: the same values.
        return checkpoint(plain, *args, use_reentrant=False, preserve_rng_state=True, **options)

    layer.forward = forward


def _separate_biases(layer: nn.Module) -> None:
    """Let linear maps add their bias out of place: under ZeRO 3, DeepSpeed's add it into the product that is kept."""
    for module in layer.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.forward = functools.partial(_product_then_bias, module)  # type: ignore[method-assign]


def _product_then_bias(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, linear.weight) + linear.bias
