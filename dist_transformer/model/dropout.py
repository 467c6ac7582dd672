"""Dropout (Srivastava et al. 2014), with its random numbers drawn fast on CPUs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_STEPS = 2**16
"""A probability is a multiple of one part in so many."""


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Each element with the given probability 0, else divided by 1 - probability, in training; else `x`.

    On a CPU torch draws a float for each element, which took 4 to 12 % of a small model's step. Here one draw of 64
    bits serves four elements, at a third of the time, and two bytes an element are kept for the backward pass.
    The probability is rounded to 2^-16, and the scale is that of the rounded one: the expected value is exact.
    """
    if not training or probability == 0.0:
        return x
    if not _draws_here(x, probability):
        return F.dropout(x, probability)
    dropped: Tensor = _AddDropped.apply(None, x, round(probability * _STEPS))  # type: ignore[no-untyped-call]
    return dropped


def add_dropped(residual: Tensor, x: Tensor, probability: float, training: bool) -> Tensor:
    """residual + dropout(x): on a CPU in one pass."""
    if not training or probability == 0.0:
        return residual + x
    if not _draws_here(x, probability) or residual.dtype != x.dtype:
        return residual + dropout(x, probability, training)
    total: Tensor = _AddDropped.apply(residual, x, round(probability * _STEPS))  # type: ignore[no-untyped-call]
    return total


def _draws_here(x: Tensor, probability: float) -> bool:
    return x.device.type == "cpu" and 0 < round(probability * _STEPS) < _STEPS


class _AddDropped(torch.autograd.Function):
    """residual + x times 0 or the scale; without a residual, 0 + that."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor | None, x: Tensor, n_dropped: int) -> Tensor:
        # All of 2^64; without bounds torch would leave the sign bit 0.
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        uniform = draws.view(torch.int16)[: x.numel()].view(x.shape)
        is_kept = _is_kept(uniform, n_dropped, x.dtype)
        # Two bytes an element either way.
        ctx.save_for_backward(is_kept if is_kept.element_size() == uniform.element_size() else uniform)
        ctx.n_dropped, ctx.has_residual = n_dropped, residual is not None
        return _masked(x.new_zeros(()) if residual is None else residual, x, is_kept, n_dropped)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (kept,) = ctx.saved_tensors
        is_kept = kept if kept.dtype == d_y.dtype else _is_kept(kept, ctx.n_dropped, d_y.dtype)
        return (
            d_y if ctx.has_residual else None,
            _masked(d_y.new_zeros(()), d_y, is_kept, ctx.n_dropped),
            None,
        )


def _is_kept(uniform: Tensor, n_dropped: int, dtype: torch.dtype) -> Tensor:
    """0 or 1. Compared as floats, for which torch's comparisons are vectorised."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return uniform.to(wide).ge_(n_dropped - _STEPS // 2).to(dtype)


def _masked(residual: Tensor, x: Tensor, is_kept: Tensor, n_dropped: int) -> Tensor:
    return torch.addcmul(residual, x, is_kept, value=_STEPS / (_STEPS - n_dropped))
