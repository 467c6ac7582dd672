"""Output projection and cross-entropy in one, over chunks of rows: the whole matrix of logits never exists."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_transformer.parallel.regions import TensorParallel

_LEAST_SCALE = 1e-30
"""Least factor of a row's gradient; its reciprocal is a float32 and a bfloat16 too."""
_CHUNK_ROWS, _CHUNK_ROWS_ON_CPU = 1280, 384
"""Of small models' logits, many CPUs' caches keep so many rows until their gradients' products have read them."""
_CACHED = 2**18
"""Logits that a core keeps at hand: a float32 MiB."""


class TokenLoss(NamedTuple):
    """Sums over target tokens; divide by `n_tokens` over the whole global batch, once."""

    objective: Tensor
    """What is minimised: smoothed cross-entropy, z-loss and divergence of twins, in nats. Carries the gradient."""
    cross_entropy: Tensor
    """Negative log-likelihood of the targets in nats, without what the objective adds. No gradient."""
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
    r_drop: float = 0.0,
    chunk_rows: int | None = None,
    tp: TensorParallel | None = None,
) -> TokenLoss:
    """Loss of `softmax(hidden W^T)` against targets.

    With logits l, Z = sum exp(l) and uniform smoothing e over V classes:
    objective = (1 - e) (log Z - l_target) + e (log Z - mean l) + z_loss (log Z)^2.
    Label smoothing: Szegedy et al. 2016; z-loss: Mesh TensorFlow, as in T5 v1.1.

    With `r_drop` = a, the second half of the rows are the first half's twins: the same tokens, another dropout. Each
    pair counts as one token, with the mean of both objectives and a / 4 (KL(p | q) + KL(q | p)) for their softmaxes p
    and q: half of equation 3 of Liang et al. 2021 (R-Drop), which adds two objectives instead of taking the mean.

    Gradients of hidden and weight are computed with the loss, chunk by chunk, in one pass over the logits.

    Args:
        chunk_rows: at most so many rows' logits exist at a time; None: as many as pay on the device.
        tp: ranks of which each has an equal part of the vocabulary, in order: `weight_VD` is this rank's part
            [V/tp, D]. Every rank gets the whole loss, and its part of the sum that is the gradient of `hidden_ND`:
            `parallel.regions.enter` adds them. One small exchange a chunk; with `r_drop` another.

    Raises:
        ValueError: if `r_drop` is given an odd number of rows.
    """
    if r_drop and hidden_ND.shape[0] % 2:
        raise ValueError(f"{hidden_ND.shape[0]} rows cannot be pairs of twins")
    if not torch.is_grad_enabled():
        # Inside `forward` a weight asks for its gradient even where nobody will take it.
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    if chunk_rows is None:
        chunk_rows = _CHUNK_ROWS_ON_CPU if hidden_ND.device.type == "cpu" else _CHUNK_ROWS
    options = _Options(ignore_id, label_smoothing, z_loss, r_drop, chunk_rows, tp)
    sums = _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, options)  # type: ignore[no-untyped-call]
    loss = TokenLoss(*sums)
    if not r_drop:
        return loss
    objective, cross_entropy, n_correct, n_tokens, is_correct = loss
    return TokenLoss(objective / 2, cross_entropy / 2, n_correct / 2, n_tokens // 2, is_correct)


@dataclass(frozen=True)
class _Options:
    ignore_id: int
    label_smoothing: float
    z_loss: float
    r_drop: float
    chunk_rows: int
    tp: TensorParallel | None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, options: _Options
    ) -> tuple[Tensor, ...]:
        needs_gradient = any(ctx.needs_input_grad)
        wide = torch.promote_types(weight_VD.dtype, torch.float32)  # of logits, sums and their gradients
        n_twins = 2 if options.r_drop else 1
        hidden_2ND = hidden_ND.reshape(n_twins, -1, hidden_ND.shape[-1])
        d_hidden_2ND = torch.empty_like(hidden_2ND) if needs_gradient else None
        d_weight_VD: Tensor | None = None
        weight_sum_D = weight_VD.sum(dim=0, dtype=wide) if options.label_smoothing else None
        sums = torch.zeros(3, dtype=wide, device=hidden_ND.device)
        targets_2N = targets_N.reshape(n_twins, -1)
        is_correct_2N = torch.empty(targets_2N.shape, dtype=torch.bool, device=hidden_ND.device)
        for rows in _even_slices(targets_2N.shape[1], max(1, options.chunk_rows // n_twins)):
            # Views, but for twins: their rows stand apart.
            hidden = hidden_2ND[:, rows].flatten(0, 1)
            chunk = _chunk(
                F.linear(hidden, weight_VD),
                targets_2N[:, rows].flatten(),
                None if weight_sum_D is None else hidden.to(wide) @ weight_sum_D,
                options,
            )
            sums += chunk.sums
            is_correct_2N[:, rows] = chunk.is_correct.view(n_twins, -1)
            if d_hidden_2ND is not None:
                d_hidden = d_hidden_2ND[:, rows].flatten(0, 1)
                d_weight_VD = _add_gradients(chunk, hidden, weight_VD, d_hidden, d_weight_VD)
                if n_twins > 1:
                    d_hidden_2ND[:, rows] = d_hidden.view(n_twins, -1, d_hidden.shape[1])
        n_tokens = (targets_N != options.ignore_id).sum()
        is_correct_N = is_correct_2N.flatten()
        if d_hidden_2ND is not None:
            d_hidden_ND = d_hidden_2ND.flatten(0, 1)
            if d_weight_VD is None:  # no rows at all
                d_weight_VD = torch.zeros_like(weight_VD, dtype=wide)
            if weight_sum_D is not None:
                _add_smoothing(targets_N, hidden_ND, weight_sum_D, d_hidden_ND, d_weight_VD, options)
            ctx.save_for_backward(d_hidden_ND, d_weight_VD.to(weight_VD.dtype))
        objective, cross_entropy, n_correct = (term.clone() for term in sums)
        ctx.mark_non_differentiable(cross_entropy, n_correct, n_tokens, is_correct_N)
        return objective, cross_entropy, n_correct, n_tokens, is_correct_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_objective: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden_ND, d_weight_VD = ctx.saved_tensors
        # In place: no second tensor of the weight's size. Autograd refuses a second backward pass of the same loss.
        return d_hidden_ND.mul_(d_objective), d_weight_VD.mul_(d_objective), None, None


class _Chunk(NamedTuple):
    """What some rows give. The gradient of their logits is `row_scale` times `gradient`, by rows, without smoothing's
    constant part: a pass over all logits for each factor would cost more than one over the hidden states.
    """

    sums: Tensor
    """Objective, cross-entropy, correct targets."""
    is_correct: Tensor
    gradient: Tensor
    row_scale: Tensor


def _chunk(logits: Tensor, targets: Tensor, sum_: Tensor | None, options: _Options) -> _Chunk:
    """Loss and gradient of some rows; overwrites the logits.

    Args:
        logits: [N, V/tp]: those of this rank's part of the vocabulary.
        sum_: [N]: their sum, if labels are smoothed.
    """
    smoothing, z_loss, tp = options.label_smoothing, options.z_loss, options.tp
    n_own, counts = logits.shape[1], targets != options.ignore_id
    own = targets - (0 if tp is None else tp.rank * n_own)
    is_own = (own >= 0) & (own < n_own)
    own = torch.where(is_own, own, 0)[:, None]
    raw_logits = logits.clone() if options.r_drop else None
    own_largest, own_total, gold_logit, gold_share = _softmax(logits, own)
    own_gold = gold_logit * is_own
    largest, total, gold, sum_ = _over_vocabulary(
        own_largest, own_total, own_gold, torch.zeros_like(own_gold) if sum_ is None else sum_, tp
    )
    log_z = largest + total.log()
    cross_entropy = log_z - gold
    objective = (1 - smoothing) * cross_entropy + z_loss * log_z.square()
    if smoothing:
        objective = objective + smoothing * (log_z - sum_ / (n_own * (1 if tp is None else tp.size)))
    # d log Z / d logits is the softmax p, so that d objective = p (1 + 2 z log Z) - (1 - e) [target] - e / V.
    own_share = (own_largest - largest).exp() * own_total / total
    factor = 1 + 2 * z_loss * log_z
    row_scale = factor * own_share
    if raw_logits is not None:
        divergence, gold_share = _add_divergence(logits, raw_logits, own, own_share, factor, log_z, options)
        objective, row_scale = objective + divergence, torch.ones_like(row_scale)
    is_correct = (gold == largest) & counts
    sums = torch.stack([(term * counts).sum() for term in (objective, cross_entropy, is_correct)])
    # A rank may have nothing but the target: that part must not go.
    row_scale = torch.where(row_scale.abs() < _LEAST_SCALE, _LEAST_SCALE, row_scale)
    gold_gradient = gold_share + torch.where(is_own, (smoothing - 1.0) / row_scale, 0.0)
    logits[torch.arange(len(logits), device=logits.device), own[:, 0]] = gold_gradient.to(logits.dtype)
    return _Chunk(sums, is_correct, logits, row_scale * counts)


def _softmax(logits: Tensor, gold: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turns logits [N, V] into their softmax, in place.

    On a CPU in blocks of rows that stay in its cache: each pass over all logits would read them from memory.

    Args:
        gold: [N, 1] a column of each row.

    Returns:
        Each row's largest logit, sum of exp(logit - largest), and logit and probability in the column `gold`: [N]
        each, float32 or wider.
    """
    n_rows, n_columns = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    largest, total, gold_logit, gold_share = logits.new_empty(4, n_rows, dtype=wide)
    block_rows = n_rows
    if logits.device.type == "cpu":
        block_rows = max(1, _CACHED // n_columns) * torch.get_num_threads()
    for rows in _even_slices(n_rows, block_rows):
        block = logits[rows].to(wide)
        largest[rows] = block.amax(dim=-1)
        gold_logit[rows] = block.gather(1, gold[rows]).squeeze(1)
        torch.softmax(block, dim=-1, out=block)
        # The largest probability is 1 / sum exp(logit - largest).
        total[rows] = block.amax(dim=-1).reciprocal_()
        gold_share[rows] = block.gather(1, gold[rows]).squeeze(1)
        if logits.dtype != wide:
            logits[rows] = block
    return largest, total, gold_logit, gold_share


def _add_divergence(
    softmax: Tensor,
    logits: Tensor,
    gold: Tensor,
    share: Tensor,
    factor: Tensor,
    log_z: Tensor,
    options: _Options,
) -> tuple[Tensor, Tensor]:
    """Turns the softmax of twins [2N, V], in place, into `factor` times it plus the gradient of their divergence.

    For softmaxes p and q, d KL(p | q) / d logits of p = p (log(p / q) - KL(p | q)), and d KL(q | p) = p - q.

    Args:
        gold: [2N, 1] a column of each row.
        share: [2N] what each row's part of the vocabulary has of its whole softmax.
        factor: [2N] of the whole softmax.
        log_z: [2N] of the whole vocabulary.

    Returns:
        [2N] each row's half of its pair's divergence, and what the result has in the column `gold`: float32 or wider.
    """
    n_pairs, wide, half, tp = len(logits) // 2, log_z.dtype, options.r_drop / 2, options.tp
    block_pairs = n_pairs
    if logits.device.type == "cpu":
        block_pairs = max(1, _CACHED // 2 // logits.shape[1]) * torch.get_num_threads()
    blocks = [
        (rows, slice(rows.start + n_pairs, rows.stop + n_pairs))
        for rows in _even_slices(n_pairs, block_pairs)
    ]

    def read(one: slice, other: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Both softmaxes, and the difference of the logits."""
        p, q = softmax[one].to(wide), softmax[other].to(wide)
        if tp is not None and tp.size > 1:
            p, q = p * share[one, None], q * share[other, None]
        return p, q, logits[one].to(wide) - logits[other]

    # log(p / q) is the difference of the logits less that of log Z: a constant of the row, kept out of the passes.
    constant_N = log_z[:n_pairs] - log_z[n_pairs:]
    mean_2N = log_z.new_empty(2, n_pairs)
    """The logits' mean difference under p, and under q."""
    if tp is not None and tp.size > 1:
        for one, other in blocks:
            mean_2N[:, one] = _means(*read(one, other))
        mean_2N = tp.all_reduce(mean_2N)
    at_gold_2N = torch.empty_like(log_z)
    for one, other in blocks:
        p, q, difference = read(one, other)
        if tp is None or tp.size == 1:
            mean_2N[:, one] = _means(p, q, difference)
        gradients = []  # Neither may be in place before the other is there: in one precision, p and q are views.
        for twin, own, others, sign, mean in (
            (one, p, q, 1.0, mean_2N[0, one]),
            (other, q, p, -1.0, mean_2N[1, one]),
        ):
            # KL of this twin = sign (mean - constant), so that of log(p / q) - KL the constant goes.
            scale = factor[twin] + half * (1 - sign * mean)
            gradient = torch.add(scale[:, None], difference, alpha=sign * half)
            gradients.append(gradient.mul_(own).sub_(others, alpha=half))
        for twin, gradient in zip((one, other), gradients, strict=True):
            at_gold_2N[twin] = gradient.gather(1, gold[twin]).squeeze(1)
            softmax[twin] = gradient
    kl_2N = torch.stack([mean_2N[0] - constant_N, constant_N - mean_2N[1]])
    return (half / 2 * kl_2N.sum(dim=0)).repeat(2), at_gold_2N


def _means(p: Tensor, q: Tensor, x: Tensor) -> Tensor:
    """[2, N] the rows' sums of p x and q x."""
    return torch.stack([torch.linalg.vecdot(p, x), torch.linalg.vecdot(q, x)])


def _add_gradients(
    chunk: _Chunk, hidden: Tensor, weight_VD: Tensor, d_hidden: Tensor, d_weight_VD: Tensor | None
) -> Tensor:
    """Put some rows' gradient of the hidden states in place; returns the weight's with theirs, float32 or wider.

    Args:
        d_weight_VD: of the rows before, which may be overwritten; None for the first.
    """
    d_logits, scale_N1 = chunk.gradient, chunk.row_scale[:, None]
    torch.mm(d_logits, weight_VD, out=d_hidden)
    d_hidden *= scale_N1
    scaled = (hidden * scale_N1).to(hidden.dtype)
    if d_weight_VD is None:
        return (d_logits.t() @ scaled).to(scale_N1.dtype)
    if d_weight_VD.dtype == d_logits.dtype:
        return d_weight_VD.addmm_(d_logits.t(), scaled)
    return d_weight_VD.add_(d_logits.t() @ scaled)


def _even_slices(n: int, at_most: int) -> Iterator[slice]:
    """As few parts of n rows as may be, equal but for a row: a short last one costs much for what it does."""
    n_parts = -(-n // at_most)
    bounds = [n * part // n_parts for part in range(n_parts + 1)] if n_parts else []
    return (slice(*pair) for pair in pairwise(bounds))


def _add_smoothing(
    targets_N: Tensor,
    hidden_ND: Tensor,
    weight_sum_D: Tensor,
    d_hidden_ND: Tensor,
    d_weight_VD: Tensor,
    options: _Options,
) -> None:
    """Add what the smoothed labels' constant e / V takes from the gradient of every logit: products with vectors."""
    n_vocabulary = d_weight_VD.shape[0] * (1 if options.tp is None else options.tp.size)
    counts_N = (targets_N != options.ignore_id).to(d_weight_VD.dtype)
    each_N = counts_N * (options.label_smoothing / n_vocabulary)
    d_hidden_ND -= each_N[:, None] * weight_sum_D
    d_weight_VD -= each_N @ hidden_ND.to(d_weight_VD.dtype)


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
