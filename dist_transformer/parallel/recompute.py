"""Activation checkpointing (Chen et al. 2016): keep less in the forward pass, compute it again in the backward."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dist_transformer.config import RecomputeConfig
from dist_transformer.model import EncoderDecoder
from dist_transformer.model.layers import AddNorm


def apply_recompute(model: EncoderDecoder, config: RecomputeConfig) -> None:
    """Set each stack's policy on its layers, in place; parameter names stay as they are."""
    for layers, policy in ((model.encoder.layers, config.encoder), (model.decoder.layers, config.decoder)):
        for index, layer in enumerate(layers):
            if policy == "full" or (policy == "every_n" and index % config.every == 0):
                _recompute(layer)
            elif policy == "selective":
                keep = _Keep(layer)
                _recompute(layer, context_fn=functools.partial(create_selective_checkpoint_contexts, keep))


def _recompute(layer: nn.Module, **options: Any) -> None:
    """Recompute a layer, except in evaluation."""
    plain: Callable[..., Any] = layer.forward

    def forward(*args: Any) -> Any:
        if not layer.training:
            return plain(*args)
        # Random numbers of dropout are drawn again from the saved state: the same values.
        return checkpoint(plain, *args, use_reentrant=False, preserve_rng_state=True, **options)

    layer.forward = forward


class _Keep:
    """What selective recomputation keeps of a layer: products with weights, which are most of its arithmetic.

    Scores, softmax, norms, activations and dropout are computed again (Korthikanti et al. 2022, section 5), and of the
    products those that cost least for what they hold: attention's output projection (a twelfth of a layer's
    arithmetic with d_ff = 4 d_model), and a last product that nothing in the layer's backward pass reads.
    """

    _PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)

    def __init__(self, layer: nn.Module) -> None:
        self.on = True
        left_out = {"o_proj"}
        last = layer.feed_forward_residual
        assert isinstance(last, AddNorm)
        if last.pre and not last.dropout:
            left_out.add("down")
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                # Under ZeRO 3, DeepSpeed's function would add the bias into the product that is kept.
                module.forward = functools.partial(_product_then_bias, module)  # type: ignore[method-assign]
            if name.rpartition(".")[2] in left_out:
                module.forward = functools.partial(self._leave_out, module.forward)

    def __call__(self, context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if self.on and operation in self._PRODUCTS:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    def _leave_out(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        self.on = False
        try:
            return forward(x)
        finally:
            self.on = True


def _product_then_bias(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, linear.weight) + linear.bias
