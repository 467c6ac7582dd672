"""Beam search with a key-value cache, for a whole batch of sources at once.

Shape legend, over the model's: B sources that still run, N hypotheses of each (the beam), C candidates of
each to replace them, L tokens of an output, R rows of any kind, V vocabulary.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_transformer.data.token_ids import PAD_ID
from dist_transformer.generate.ensemble import Scorer
from dist_transformer.generate.rules import DEAD, Rules, without_eos, worth_dropping

Stop = Literal["estimate", "exact", "first"]
_CHUNK = 64


class Hypothesis(NamedTuple):
    """One output of a search, or one sample."""

    tokens: list[int]
    """Without EOS."""
    score: float
    """Log-probability in nats / length ** length_penalty; the length counts EOS where there is one."""


@torch.no_grad()  # not inference_mode: the model's cached position tables are used by training too
def beam_search(
    model: Scorer,
    source_BS: Tensor,
    *,
    beam_size: int,
    length_penalty: float,
    max_len: int | Sequence[int],
    n_vocab: int,
    n_best: int = 1,
    stop: Stop = "estimate",
    min_len: int = 0,
    forbidden: Sequence[int] = (),
    prefixes: Sequence[Sequence[int]] | None = None,
) -> list[list[Hypothesis]]:
    """The best outputs for each source; the same whatever the other sources of the batch and the padding are.

    Each step ranks all one-token extensions of a source's `beam_size` hypotheses by log-probability and looks
    at the best 2 x beam_size. Those among the first beam_size that end in EOS are finished; the first
    beam_size of the others run on, so that finishing never narrows the beam. At max_len tokens the first
    beam_size finish as they are, with or without EOS. The beam_size finished ones with the largest score are
    kept. This is the search of fairseq and of Hugging Face's `generate(num_beams=...)`, and gives the
    latter's tokens.

    A source stops when none of its running hypotheses can enter the result:
    - `estimate`: beam_size hypotheses have finished, and the best running one, scored as if it ended at its
      present length, does not beat the worst of them. Hugging Face's default (`early_stopping=False`). Exact
      for length_penalty <= 0; for larger ones it is a bet that no much longer output makes up for its tokens.
    - `exact`: n_best hypotheses have finished, and no running one can beat the worst of those n_best even if
      all its further tokens had probability 1 and it ended at the best possible length: max_len for
      length_penalty > 0, the next token otherwise. The result is that of searching on to max_len, and with
      length_penalty > 0 it often takes nearly as long. Hugging Face's `early_stopping="never"`.
    - `first`: beam_size hypotheses have finished (Hugging Face's `early_stopping=True`; fairseq's rule). The
      quickest, and the one that favours short outputs.

    With beam_size=1 this is greedy search. A forced prefix is part of the output: its tokens' log-probabilities
    count in the score, as in fairseq. Hugging Face leaves them out, which ranks alike for length_penalty=0.

    Args:
        model: in evaluation mode, or dropout stays on.
        source_BS: padded sources ended by EOS, on the model's device; no row is only padding.
        beam_size: hypotheses a source; beyond the possible continuations, the rest stays unused.
        length_penalty: 0 ranks by log-probability; 1 by its mean a token; larger ones prefer longer outputs.
        n_best: outputs wanted a source.
        max_len, n_vocab, min_len, forbidden, prefixes: see `Rules`.

    Returns:
        For each source its n_best hypotheses, best first (fewer where fewer exist, at least one).

    Raises:
        ValueError: n_best > beam_size, and as `Rules`.
    """
    if not 1 <= n_best <= beam_size:
        raise ValueError(f"n_best={n_best} must be between 1 and beam_size={beam_size}")
    rules = Rules(
        model,
        len(source_BS),
        n_vocab=n_vocab,
        max_len=max_len,
        min_len=min_len,
        forbidden=forbidden,
        prefixes=prefixes,
    )
    return _BeamSearch(model, source_BS, rules, beam_size, length_penalty, n_best, stop).run()


class _BeamSearch:
    """The state of one search. Sources that are done stay in the tensors until enough of them are to drop them."""

    def __init__(
        self,
        model: Scorer,
        source_BS: Tensor,
        rules: Rules,
        beam_size: int,
        length_penalty: float,
        n_best: int,
        stop: Stop,
    ) -> None:
        self.model, self.rules = model, rules
        self.beam_size, self.length_penalty = beam_size, length_penalty
        self.n_best, self.stop = n_best, stop
        n_sources, device = source_BS.shape[0], source_BS.device
        self.results: list[list[Hypothesis]] = [[] for _ in range(n_sources)]
        self.source_B = torch.arange(n_sources, device=device)
        self.running_B = torch.ones(n_sources, dtype=torch.bool, device=device)
        self.cache = model.start(source_BS)
        # One hypothesis a source, the empty one: the beam opens with the first step's candidates.
        self.log_p_BN = torch.zeros(n_sources, 1, device=device)
        self.tokens_BNL = torch.empty(n_sources, 1, 0, dtype=torch.int64, device=device)
        self.last_BN = torch.full((n_sources, 1), PAD_ID, device=device)
        self.finished_score_BN = torch.full((n_sources, beam_size), DEAD, device=device)
        self.finished_tokens_BNL = self.tokens_BNL.expand(-1, beam_size, -1)

    def run(self) -> list[list[Hypothesis]]:
        for length in range(1, self.rules.longest + 1):
            logits_RV = self.model.step(self.last_BN.view(-1, 1), self.cache)[:, -1]
            log_p_BC, parent_BC, token_BC = self._candidates(self.rules.log_p(logits_RV, length))
            ends_BC = self.rules.ends(token_BC, length)
            self._finish(log_p_BC, parent_BC, token_BC, ends_BC, length)
            self._advance(log_p_BC, parent_BC, token_BC, ends_BC)
            if not self._settle(self._is_done(length)):
                break
        return self.results

    def _candidates(self, log_p_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best C = 2N extensions of each source: log-probability, hypothesis, token, [B, C] each."""
        n_sources = self.log_p_BN.shape[0]
        n_candidates = 2 * self.beam_size
        # The best of all extensions are among the best of each hypothesis: what it has so far is added to few.
        best_RC, token_RC = _top_k(log_p_RV, min(n_candidates, log_p_RV.shape[1]))
        log_p_RC = best_RC + self.log_p_BN.view(-1, 1)
        log_p_BX, token_BX = log_p_RC.view(n_sources, -1), token_RC.view(n_sources, -1)
        log_p_BC, place_BC = log_p_BX.topk(min(n_candidates, log_p_BX.shape[1]))
        parent_BC, token_BC = place_BC // best_RC.shape[1], token_BX.gather(1, place_BC)
        missing = n_candidates - log_p_BC.shape[1]  # of a vocabulary smaller than the beam
        if missing:
            log_p_BC = F.pad(log_p_BC, (0, missing), value=DEAD)
            parent_BC, token_BC = F.pad(parent_BC, (0, missing)), F.pad(token_BC, (0, missing), value=PAD_ID)
        return log_p_BC, parent_BC, token_BC

    def _finish(
        self, log_p_BC: Tensor, parent_BC: Tensor, token_BC: Tensor, ends_BC: Tensor, length: int
    ) -> None:
        """Of what finished before and those of the first N candidates that end, keep the best N."""
        n = self.beam_size
        ends_BN = ends_BC[:, :n]
        if not ends_BN.any():
            return
        score_BN = (log_p_BC[:, :n] / length**self.length_penalty).masked_fill(~ends_BN, DEAD)
        tokens_BNL = _append(self.tokens_BNL, parent_BC[:, :n], token_BC[:, :n])
        before_BNL = F.pad(self.finished_tokens_BNL, (0, length - self.finished_tokens_BNL.shape[2]))
        self.finished_score_BN, best_BN = torch.cat([self.finished_score_BN, score_BN], dim=1).topk(n)
        self.finished_tokens_BNL = _pick(torch.cat([before_BNL, tokens_BNL], dim=1), best_BN)

    def _advance(self, log_p_BC: Tensor, parent_BC: Tensor, token_BC: Tensor, ends_BC: Tensor) -> None:
        """The first N candidates that do not end run on."""
        self.log_p_BN, chosen_BN = log_p_BC.masked_fill(ends_BC, DEAD).topk(self.beam_size)
        parent_BN, self.last_BN = parent_BC.gather(1, chosen_BN), token_BC.gather(1, chosen_BN)
        self.tokens_BNL = _append(self.tokens_BNL, parent_BN, self.last_BN)
        self.cache.branch(parent_BN)

    def _is_done(self, length: int) -> Tensor:
        """[B] whether nothing that runs can enter the result; `length` tokens have been chosen."""
        if self.stop == "first":
            is_full_B: Tensor = self.finished_score_BN[:, -1] > DEAD
            # Not `==`: a hypothesis of a diverged model has the score NaN, and must not run for ever.
            return is_full_B | ~(self.log_p_BN[:, 0] > DEAD)
        best_length: Tensor | int = length
        to_beat_B = self.finished_score_BN[:, -1]
        if self.stop == "exact":
            best_length = self.rules.limit_B if self.length_penalty > 0 else length + 1
            to_beat_B = self.finished_score_BN[:, self.n_best - 1]
        best_B = self.log_p_BN[:, 0] / best_length**self.length_penalty
        is_done_B: Tensor = ~(best_B > to_beat_B)
        return is_done_B

    def _settle(self, done_B: Tensor) -> bool:
        """Store the results of sources that are done; returns whether any run on."""
        done_B = done_B & self.running_B
        if not done_B.any():
            return True
        done = self.source_B[done_B].tolist()
        scores, outputs = self.finished_score_BN[done_B].tolist(), self.finished_tokens_BNL[done_B].tolist()
        for source, scores_N, outputs_N in zip(done, scores, outputs, strict=True):
            finished = zip(outputs_N, scores_N, strict=True)
            found = [Hypothesis(without_eos(tokens), score) for tokens, score in finished if score > DEAD]
            self.results[source] = found[: self.n_best] or [Hypothesis([], DEAD)]
        self.running_B = self.running_B & ~done_B
        n_running = int(self.running_B.sum())
        if n_running and worth_dropping(self.running_B, n_running):
            self._keep(self.running_B.nonzero().squeeze(1))
        return n_running > 0

    def _keep(self, sources: Tensor) -> None:
        for name in (
            "source_B",
            "running_B",
            "log_p_BN",
            "last_BN",
            "tokens_BNL",
            "finished_score_BN",
            "finished_tokens_BNL",
        ):
            setattr(self, name, getattr(self, name)[sources])
        self.rules.keep(sources)
        self.cache.keep(sources)


def _pick(x_BNL: Tensor, index_BN: Tensor) -> Tensor:
    """[B, M, L] and [B, N] indices below M to [B, N, L]."""
    return x_BNL.gather(1, index_BN[:, :, None].expand(-1, -1, x_BNL.shape[2]))


def _append(x_BNL: Tensor, parent_BN: Tensor, token_BN: Tensor) -> Tensor:
    """The outputs that these parents and their next tokens make."""
    return torch.cat([_pick(x_BNL, parent_BN), token_BN[:, :, None]], dim=2)


def _top_k(x_RV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`x_RV.topk(k)`, several times as fast on a CPU for a large V and a small k.

    The k largest values lie in the k chunks with the largest maxima: maxima are cheap, sorting is not.
    """
    n_rows, n_columns = x_RV.shape
    if n_columns < 2 * k * _CHUNK:
        return x_RV.topk(k)
    if n_columns % _CHUNK:
        x_RV = F.pad(x_RV, (0, -n_columns % _CHUNK), value=DEAD)
    chunks_RXC = x_RV.view(n_rows, -1, _CHUNK)
    chunk_Rk = chunks_RXC.amax(dim=-1).topk(k).indices
    first_R1 = torch.arange(n_rows, device=x_RV.device)[:, None] * chunks_RXC.shape[1]
    inside_RX = chunks_RXC.flatten(0, 1).index_select(0, (first_R1 + chunk_Rk).flatten()).view(n_rows, -1)
    value_Rk, place_Rk = inside_RX.topk(k)
    return value_Rk, chunk_Rk.gather(1, place_Rk // _CHUNK) * _CHUNK + place_Rk % _CHUNK
