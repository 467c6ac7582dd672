"""Output projection and cross-entropy in one, over chunks of rows: the whole matrix of logits never exists."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_transformer.parallel.regions import TensorParallel


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
    is_correct: Tensor
    """[N] bool: which of them those are that `n_correct` counts."""


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    ignore_id: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_rows: int = 1024,
    tp: TensorParallel | None = None,
) -> TokenLoss:
    """Loss of `softmax(hidden W^T)` against targets.

    With logits l, Z = sum exp(l) and uniform smoothing e over V classes:
    objective = (1 - e) (log Z - l_target) + e (log Z - mean l) + z_loss (log Z)^2.
    Label smoothing: Szegedy et al. 2016; z-loss: Mesh TensorFlow, as in T5 v1.1.

    Gradients of hidden and weight are computed with the loss, chunk by chunk, in one pass over the logits.

    Args:
        tp: ranks of which each has an equal part of the vocabulary, in order: `weight_VD` is this rank's part
            [V/tp, D]. Every rank gets the whole loss, and its part of the sum that is the gradient of `hidden_ND`:
            `parallel.regions.enter` adds them. One small exchange a chunk.
    """
    if not torch.is_grad_enabled():
        # Inside `forward` a weight asks for its gradient even where nobody will take it.
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    options = _Options(ignore_id, label_smoothing, z_loss, chunk_rows, tp)
    sums = _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, options)  # type: ignore[no-untyped-call]
    return TokenLoss(*sums)


@dataclass(frozen=True)
class _Options:
    ignore_id: int
    label_smoothing: float
    z_loss: float
    chunk_rows: int
    tp: TensorParallel | None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, options: _Options
    ) -> tuple[Tensor, ...]:
        needs_gradient = any(ctx.needs_input_grad)
        d_hidden_ND = torch.empty_like(hidden_ND) if needs_gradient else None
        d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_gradient else None
        sums = torch.zeros(3, dtype=torch.float32, device=hidden_ND.device)
        is_correct_N = torch.empty(targets_N.shape, dtype=torch.bool, device=hidden_ND.device)
        for start in range(0, hidden_ND.shape[0], options.chunk_rows):
            rows = slice(start, start + options.chunk_rows)
            hidden = hidden_ND[rows]
            chunk_sums, is_correct_N[rows], d_logits = _chunk(
                F.linear(hidden, weight_VD).float(), targets_N[rows], options, needs_gradient
            )
            sums += chunk_sums
            if d_hidden_ND is not None and d_weight_VD is not None and d_logits is not None:
                d_logits = d_logits.to(weight_VD.dtype)
                torch.mm(d_logits, weight_VD, out=d_hidden_ND[rows])
                if d_weight_VD.dtype == d_logits.dtype:
                    d_weight_VD.addmm_(d_logits.t(), hidden)
                else:
                    d_weight_VD += d_logits.t() @ hidden
        n_tokens = (targets_N != options.ignore_id).sum()
        if needs_gradient:
            assert d_hidden_ND is not None and d_weight_VD is not None
            ctx.save_for_backward(d_hidden_ND, d_weight_VD.to(weight_VD.dtype))
        objective, cross_entropy, n_correct = (term.clone() for term in sums)
        ctx.mark_non_differentiable(cross_entropy, n_correct, n_tokens, is_correct_N)
        return objective, cross_entropy, n_correct, n_tokens, is_correct_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_objective: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden_ND, d_weight_VD = ctx.saved_tensors
        return d_hidden_ND * d_objective, d_weight_VD * d_objective, None, None


def _chunk(
    logits: Tensor, targets: Tensor, options: _Options, needs_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums (objective, cross-entropy, correct) of some rows, which are correct, and d objective / d logits;
    overwrites the logits.

    Args:
        logits: [N, V/tp] float32: those of this rank's part of the vocabulary.
    """
    smoothing, z_loss, tp = options.label_smoothing, options.z_loss, options.tp
    n_own, counts = logits.shape[1], targets != options.ignore_id
    own = targets - (0 if tp is None else tp.rank * n_own)
    is_own = (own >= 0) & (own < n_own)
    own = torch.where(is_own, own, 0)[:, None]
    own_largest = logits.amax(dim=-1)
    own_gold = logits.gather(1, own).squeeze(1) * is_own
    own_sum = logits.sum(dim=-1) if smoothing else torch.zeros_like(own_largest)
    # One exponential serves the normaliser and the gradient.
    exponentials = logits.sub_(own_largest[:, None]).exp_()
    largest, total, gold, sum_ = _over_vocabulary(
        own_largest, exponentials.sum(dim=-1), own_gold, own_sum, tp
    )
    n_vocabulary = n_own * (1 if tp is None else tp.size)
    log_z = largest + total.log()
    cross_entropy = log_z - gold
    objective = (1 - smoothing) * cross_entropy + z_loss * log_z.square()
    if smoothing:
        objective = objective + smoothing * (log_z - sum_ / n_vocabulary)
    is_correct = (gold == largest) & counts
    sums = torch.stack([(term * counts).sum() for term in (objective, cross_entropy, is_correct)]).float()
    if not needs_gradient:
        return sums, is_correct, None
    # d log Z / d logits is the softmax p, so that d objective = p (1 + 2 z log Z) - (1 - e) [target] - e / V.
    softmax_scale = (own_largest - largest).exp() / total
    gradient = exponentials.mul_((counts * (1 + 2 * z_loss * log_z) * softmax_scale)[:, None])
    if smoothing:
        gradient.sub_((counts * (smoothing / n_vocabulary))[:, None])
    gradient.scatter_add_(1, own, (counts * is_own * (smoothing - 1.0))[:, None])
    return sums, is_correct, gradient


def _over_vocabulary(
    largest: Tensor, total: Tensor, gold: Tensor, sum_: Tensor, tp: TensorParallel | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each row's largest logit, sum of exp(logit - largest), target's logit and sum of logits, of all ranks' parts."""
    if tp is None or tp.size == 1:
        return largest, total, gold, sum_
    mine = torch.stack([largest, total, gold, sum_])
    parts = mine.new_empty(tp.size * mine.shape[0], mine.shape[1])
    dist.all_gather_into_tensor(parts, mine, group=tp.group)
    largests, totals, golds, sums = parts.view(tp.size, *mine.shape).unbind(dim=1)
    largest = largests.amax(dim=0)
    return largest, (totals * (largests - largest).exp()).sum(dim=0), golds.sum(dim=0), sums.sum(dim=0)
