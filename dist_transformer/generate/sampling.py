"""Outputs drawn at random: temperature, top-k (Fan et al. 2018) and top-p (Holtzman et al. 2020).

Shape legend, over the model's: B sources that still run, N samples of each, R = B x N rows, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dist_transformer.data.hashing import UInt64, hash_array, hash_key
from dist_transformer.data.token_ids import PAD_ID
from dist_transformer.generate.ensemble import Scorer
from dist_transformer.generate.rules import DEAD, Rules, without_eos, worth_dropping
from dist_transformer.generate.search import Hypothesis


class Distribution(NamedTuple):
    """What is drawn from, given the model's log-probabilities."""

    temperature: float = 1.0
    """Log-probabilities are divided by it."""
    top_k: int = 0
    """So many of the likeliest tokens are left; 0: all. Where several are equally likely as the k-th, all of them."""
    top_p: float = 1.0
    """Of those, the fewest likeliest whose probabilities sum to at least this are left."""

    def cumulative(self, log_p_RV: Tensor) -> Tensor:
        """The cumulative distribution over ids [R, V] in float64, not normalised."""
        scores_RV = log_p_RV / self.temperature
        if 0 < self.top_k < scores_RV.shape[1]:
            least_R1 = scores_RV.topk(self.top_k).values[:, -1:]
            scores_RV = scores_RV.masked_fill(scores_RV < least_R1, DEAD)
        p_RV = scores_RV.softmax(dim=-1)
        if self.top_p < 1:
            sorted_RV = p_RV.sort(dim=-1, descending=True).values
            n_before_R1 = (sorted_RV.cumsum(dim=-1) < self.top_p).sum(dim=-1, keepdim=True)
            least_R1 = sorted_RV.gather(1, n_before_R1.clamp(max=p_RV.shape[1] - 1))
            p_RV = p_RV.masked_fill(p_RV < least_R1, 0.0)
        return p_RV.double().cumsum(dim=-1)


@torch.no_grad()
def sample(
    model: Scorer,
    source_BS: Tensor,
    rules: Rules,
    distribution: Distribution,
    *,
    n_samples: int,
    seed: int,
    lines: Sequence[int],
    length_penalty: float,
) -> list[list[Hypothesis]]:
    """Draw outputs token by token.

    The token at a place is where a uniform number, a hash of (seed, line, sample, place), falls in the cumulative
    distribution over ids: no generator has a state, so that an output depends neither on the batch, nor on the
    number of processes, nor on how many samples are drawn beside it.

    Args:
        model: in evaluation mode, or dropout stays on.
        source_BS: padded sources ended by EOS, on the model's device; no row is only padding.
        lines: the number that stands for each source in the hash.
        length_penalty: of the score. The score is that of the model, whatever the distribution.

    Returns:
        For each source its samples, in the order in which they are numbered.
    """
    n_sources, device = source_BS.shape[0], source_BS.device
    numbers = np.asarray(lines, np.int64)
    key_BN = np.stack([hash_array(hash_key(seed, i), numbers) for i in range(n_samples)], axis=1)
    results: list[list[Hypothesis]] = [[] for _ in range(n_sources)]
    source_B = torch.arange(n_sources, device=device)
    running_B = torch.ones(n_sources, dtype=torch.bool, device=device)
    open_BN = torch.ones(n_sources, n_samples, dtype=torch.bool, device=device)
    log_p_BN = torch.zeros(n_sources, n_samples, device=device)
    length_BN = torch.zeros(n_sources, n_samples, dtype=torch.int64, device=device)
    tokens_BNL = torch.full((n_sources, n_samples, 1), PAD_ID, device=device)  # the first is only fed
    cache = model.start(source_BS)
    cache.branch(torch.zeros(n_sources, n_samples, dtype=torch.int64, device=device))
    for length in range(1, rules.longest + 1):
        log_p_RV = rules.log_p(model.step(tokens_BNL[:, :, -1].reshape(-1, 1), cache)[:, -1], length)
        token_R1 = _draw(distribution.cumulative(log_p_RV), key_BN.reshape(-1), length)
        added_BN = log_p_RV.gather(1, token_R1).view_as(log_p_BN)
        token_BN = torch.where(open_BN, token_R1.view_as(log_p_BN), PAD_ID)
        log_p_BN = torch.where(open_BN, log_p_BN + added_BN, log_p_BN)
        length_BN = torch.where(open_BN, length, length_BN)
        tokens_BNL = torch.cat([tokens_BNL, token_BN[:, :, None]], dim=2)
        open_BN = open_BN & ~rules.ends(token_BN, length)
        done_B = running_B & ~open_BN.any(dim=1)
        if not done_B.any():
            continue
        scores = (log_p_BN[done_B] / length_BN[done_B] ** length_penalty).tolist()
        outputs = tokens_BNL[done_B, :, 1:].tolist()
        for source, tokens_N, scores_N in zip(source_B[done_B].tolist(), outputs, scores, strict=True):
            drawn = zip(tokens_N, scores_N, strict=True)
            results[source] = [Hypothesis(without_eos(tokens), score) for tokens, score in drawn]
        running_B = running_B & ~done_B
        n_running = int(running_B.sum())
        if not n_running:
            break
        if worth_dropping(running_B, n_running):
            keep = running_B.nonzero().squeeze(1)
            key_BN = key_BN[keep.cpu().numpy()]
            source_B, running_B, open_BN = source_B[keep], running_B[keep], open_BN[keep]
            log_p_BN, length_BN, tokens_BNL = log_p_BN[keep], length_BN[keep], tokens_BNL[keep]
            rules.keep(keep)
            cache.keep(keep)
    return results


def _draw(cumulative_RV: Tensor, key_R: UInt64, length: int) -> Tensor:
    """One id for each row, [R, 1]."""
    # 32 bits: below 1 by more than the rounding of the product, which therefore stays below the sum.
    uniform_R = (hash_array(key_R, length) >> np.uint64(32)).astype(np.float64) * 2.0**-32
    total_R1 = cumulative_RV[:, -1:]
    point_R1 = torch.from_numpy(uniform_R).to(total_R1.device)[:, None] * total_R1
    # To the right: an id of probability 0 begins and ends at one point, and is never met.
    token_R1 = torch.searchsorted(cumulative_RV, point_R1, right=True)
    return token_R1.clamp_(max=cumulative_RV.shape[1] - 1)  # only NaN, of a diverged model, is beyond
