"""Output projection and cross-entropy in one, over chunks of rows: the whole matrix of logits never exists."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class TokenLoss(NamedTuple):
    """Sums over target tokens; divide by `n_tokens` over the whole global batch, once."""

    objective: Tensor
    """What is minimised: smoothed cross-entropy plus z-loss, in nats. Carries the gradient."""
    cross_entropy: Tensor
    """Negative log-likelihood of the targets in nats, without smoothing or z-loss. No gradient."""
    n_correct: Tensor
    """Targets that have the largest logit."""
    n_tokens: Tensor
    """Targets that count."""


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    ignore_id: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_rows: int = 1024,
) -> TokenLoss:
    """Loss of `softmax(hidden W^T)` against targets.

    With logits l, Z = sum exp(l) and uniform smoothing e over V classes:
    objective = (1 - e) (log Z - l_target) + e (log Z - mean l) + z_loss (log Z)^2.
    Label smoothing: Szegedy et al. 2016; z-loss: Mesh TensorFlow, as in T5 v1.1.

    Gradients of hidden and weight are computed with the loss, chunk by chunk, in one pass over the logits.
    """
    sums = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, targets_N, ignore_id, label_smoothing, z_loss, chunk_rows
    )
    return TokenLoss(*sums)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        ignore_id: int,
        label_smoothing: float,
        z_loss: float,
        chunk_rows: int,
    ) -> tuple[Tensor, ...]:
        needs_gradient = any(ctx.needs_input_grad)
        d_hidden_ND = torch.empty_like(hidden_ND) if needs_gradient else None
        d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_gradient else None
        sums = torch.zeros(3, dtype=torch.float32, device=hidden_ND.device)
        for start in range(0, hidden_ND.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            hidden, targets = hidden_ND[rows], targets_N[rows]
            chunk_sums, d_logits = _chunk(
                F.linear(hidden, weight_VD).float(),
                targets,
                targets != ignore_id,
                label_smoothing,
                z_loss,
                needs_gradient,
            )
            sums += chunk_sums
            if d_hidden_ND is not None and d_weight_VD is not None and d_logits is not None:
                d_logits = d_logits.to(weight_VD.dtype)
                torch.mm(d_logits, weight_VD, out=d_hidden_ND[rows])
                if d_weight_VD.dtype == d_logits.dtype:
                    d_weight_VD.addmm_(d_logits.t(), hidden)
                else:
                    d_weight_VD += d_logits.t() @ hidden
        n_tokens = (targets_N != ignore_id).sum()
        if needs_gradient:
            assert d_hidden_ND is not None and d_weight_VD is not None
            ctx.save_for_backward(d_hidden_ND, d_weight_VD.to(weight_VD.dtype))
        objective, cross_entropy, n_correct = (term.clone() for term in sums)
        ctx.mark_non_differentiable(cross_entropy, n_correct, n_tokens)
        return objective, cross_entropy, n_correct, n_tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_objective: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden_ND, d_weight_VD = ctx.saved_tensors
        return d_hidden_ND * d_objective, d_weight_VD * d_objective, None, None, None, None, None


def _chunk(
    logits: Tensor,
    targets: Tensor,
    counts: Tensor,
    label_smoothing: float,
    z_loss: float,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sums (objective, cross-entropy, correct) of some rows and d objective / d logits; overwrites the logits."""
    largest = logits.amax(dim=-1)
    gold = logits.gather(1, targets[:, None]).squeeze(1)
    mean = logits.mean(dim=-1) if label_smoothing else None
    # One exponential serves the normaliser and the gradient.
    exponentials = logits.sub_(largest[:, None]).exp_()
    total = exponentials.sum(dim=-1)
    log_z = largest + total.log()
    cross_entropy = log_z - gold
    objective = (1 - label_smoothing) * cross_entropy + z_loss * log_z.square()
    if mean is not None:
        objective = objective + label_smoothing * (log_z - mean)
    sums = torch.stack(
        [(term * counts).sum() for term in (objective, cross_entropy, gold == largest)]
    ).float()
    if not needs_gradient:
        return sums, None
    # d log Z / d logits is the softmax p, so that d objective = p (1 + 2 z log Z) - (1 - e) [target] - e / V.
    gradient = exponentials.mul_((counts * (1 + 2 * z_loss * log_z) / total)[:, None])
    if label_smoothing:
        gradient.sub_((counts * (label_smoothing / logits.shape[1]))[:, None])
    gradient.scatter_add_(1, targets[:, None], (counts * (label_smoothing - 1.0))[:, None])
    return sums, gradient
