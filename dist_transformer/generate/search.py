"""Greedy and beam search with a key-value cache, for a whole batch of sources at once.

Shape legend, over the model's: B sources that still run, N hypotheses of each (the beam), C candidates of
each to replace them, L tokens of an output, R rows of any kind, V vocabulary.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_transformer.data.batch import EOS_ID, PAD_ID
from dist_transformer.model import EncoderDecoder

_DEAD = float("-inf")
_CHUNK = 64


class Hypothesis(NamedTuple):
    """One output of the search."""

    tokens: list[int]
    """Without EOS."""
    score: float
    """Log-probability in nats / length ** length_penalty; the length counts EOS where there is one."""


@torch.no_grad()  # not inference_mode: the model's cached position tables are used by training too
def beam_search(
    model: EncoderDecoder,
    source_BS: Tensor,
    *,
    beam_size: int,
    length_penalty: float,
    max_len: int,
    n_vocab: int,
    n_best: int = 1,
    stop: Literal["estimate", "exact"] = "estimate",
    forbidden: Sequence[int] = (),
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
      length_penalty > 0 it often takes nearly as long.

    With beam_size=1 this is greedy search.

    Args:
        model: in evaluation mode, or dropout stays on.
        source_BS: padded sources ended by EOS, on the model's device; no row is only padding.
        beam_size: hypotheses a source; beyond the possible continuations, the rest stays unused.
        length_penalty: 0 ranks by log-probability; 1 by its mean a token; larger ones prefer longer outputs.
        max_len: most tokens of an output, EOS counted.
        n_vocab: ids from here on are the embedding's padding and are never emitted. They count in the
            softmax, as they do in the loss, so that scores are the model's own log-probabilities.
        n_best: outputs wanted a source.
        forbidden: further ids that are never emitted. `PAD_ID` never is, as it is no token of any target.
            `UNK_ID` may be: where a tokenizer has it, it is a prediction like others; name it to rule it out.

    Returns:
        For each source its n_best hypotheses, best first (fewer where fewer exist, at least one).

    Raises:
        ValueError: n_best > beam_size, or n_vocab beyond the model's.
    """
    if not 1 <= n_best <= beam_size:
        raise ValueError(f"n_best={n_best} must be between 1 and beam_size={beam_size}")
    if n_vocab > model.vocab_size:
        raise ValueError(f"n_vocab={n_vocab} is larger than the model's vocab_size={model.vocab_size}")
    vocabulary = _Vocabulary(n_vocab, torch.tensor([PAD_ID, *forbidden], device=source_BS.device))
    if beam_size == 1:
        return _greedy(model, source_BS, vocabulary, length_penalty, max_len)
    search = _BeamSearch(model, source_BS, vocabulary, beam_size, length_penalty, max_len, n_best, stop)
    return search.run()


class _Vocabulary(NamedTuple):
    """Which ids may be emitted."""

    n_vocab: int
    forbidden: Tensor

    def log_p(self, logits_RV: Tensor) -> Tensor:
        """The model's log-probabilities [R, V] in float32, -inf for what may not be emitted."""
        log_p_RV = logits_RV.log_softmax(dim=-1, dtype=torch.float32)
        log_p_RV[:, self.n_vocab :] = _DEAD
        log_p_RV[:, self.forbidden] = _DEAD
        return log_p_RV


def _greedy(
    model: EncoderDecoder, source_BS: Tensor, vocabulary: _Vocabulary, length_penalty: float, max_len: int
) -> list[list[Hypothesis]]:
    """The likeliest token at each step, until EOS."""
    n_sources, device = source_BS.shape[0], source_BS.device
    results: list[list[Hypothesis]] = [[] for _ in range(n_sources)]
    source_B = torch.arange(n_sources, device=device)
    tokens_BL = torch.full((n_sources, max_len), PAD_ID, device=device)
    log_p_B = torch.zeros(n_sources, device=device)
    last_B1 = torch.full((n_sources, 1), PAD_ID, device=device)
    cache = model.start(source_BS, max_len)
    for length in range(1, max_len + 1):
        best_B, token_B = vocabulary.log_p(model.step(last_B1, cache)[:, -1]).max(dim=-1)
        log_p_B = log_p_B + best_B
        tokens_BL[:, length - 1] = token_B
        last_B1 = token_B[:, None]
        ends_B = (token_B == EOS_ID) | (length == max_len)
        if not ends_B.any():
            continue
        scores = (log_p_B[ends_B] / length**length_penalty).tolist()
        outputs = tokens_BL[ends_B, :length].tolist()
        for source, tokens, score in zip(source_B[ends_B].tolist(), outputs, scores, strict=True):
            results[source] = [Hypothesis(_without_eos(tokens), score)]
        keep = (~ends_B).nonzero().squeeze(1)
        if not len(keep):
            break
        source_B, tokens_BL, log_p_B, last_B1 = (x[keep] for x in (source_B, tokens_BL, log_p_B, last_B1))
        cache.select(keep, keep)
    return results


class _BeamSearch:
    """The state of one search. All tensors hold only the sources that still run."""

    def __init__(
        self,
        model: EncoderDecoder,
        source_BS: Tensor,
        vocabulary: _Vocabulary,
        beam_size: int,
        length_penalty: float,
        max_len: int,
        n_best: int,
        stop: Literal["estimate", "exact"],
    ) -> None:
        self.model, self.vocabulary = model, vocabulary
        self.beam_size, self.length_penalty, self.max_len = beam_size, length_penalty, max_len
        self.n_best, self.stop = n_best, stop
        n_sources, device = source_BS.shape[0], source_BS.device
        self.results: list[list[Hypothesis]] = [[] for _ in range(n_sources)]
        self.source_B = torch.arange(n_sources, device=device)
        self.cache = model.start(source_BS, max_len)
        # One hypothesis a source, the empty one: the beam opens with the first step's candidates.
        self.log_p_BN = torch.zeros(n_sources, 1, device=device)
        self.tokens_BNL = torch.full((n_sources, 1, max_len), PAD_ID, device=device)
        self.last_BN = torch.full((n_sources, 1), PAD_ID, device=device)
        self.finished_score_BN = torch.full((n_sources, beam_size), _DEAD, device=device)
        self.finished_tokens_BNL = torch.full((n_sources, beam_size, max_len), PAD_ID, device=device)

    def run(self) -> list[list[Hypothesis]]:
        for length in range(1, self.max_len + 1):
            logits_RV = self.model.step(self.last_BN.view(-1, 1), self.cache)[:, -1]
            log_p_BC, parent_BC, token_BC = self._candidates(logits_RV)
            ends_BC = (token_BC == EOS_ID) | (length == self.max_len)
            self._finish(log_p_BC, parent_BC, token_BC, ends_BC, length)
            parent_BN = self._advance(log_p_BC, parent_BC, token_BC, ends_BC, length)
            rows = self._drop_done(parent_BN, self._is_done(length), length)
            if rows is None:
                break
            if length == 1:
                self.cache.repeat(self.beam_size)
            self.cache.select(*rows)
        return self.results

    def _candidates(self, logits_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best C = 2N extensions of each source: log-probability, hypothesis, token, [B, C] each."""
        n_sources = self.log_p_BN.shape[0]
        n_candidates = 2 * self.beam_size
        # The best of all extensions are among the best of each hypothesis: what it has so far is added to few.
        best_RC, token_RC = _top_k(self.vocabulary.log_p(logits_RV), min(n_candidates, logits_RV.shape[1]))
        log_p_RC = best_RC + self.log_p_BN.view(-1, 1)
        log_p_BX, token_BX = log_p_RC.view(n_sources, -1), token_RC.view(n_sources, -1)
        log_p_BC, place_BC = log_p_BX.topk(min(n_candidates, log_p_BX.shape[1]))
        parent_BC, token_BC = place_BC // best_RC.shape[1], token_BX.gather(1, place_BC)
        missing = n_candidates - log_p_BC.shape[1]  # of a vocabulary smaller than the beam
        if missing:
            log_p_BC = F.pad(log_p_BC, (0, missing), value=_DEAD)
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
        score_BN = (log_p_BC[:, :n] / length**self.length_penalty).masked_fill(~ends_BN, _DEAD)
        tokens_BNL = _pick(self.tokens_BNL, parent_BC[:, :n])
        tokens_BNL[:, :, length - 1] = token_BC[:, :n]
        scores = torch.cat([self.finished_score_BN, score_BN], dim=1)
        self.finished_score_BN, best_BN = scores.topk(n)
        self.finished_tokens_BNL = _pick(torch.cat([self.finished_tokens_BNL, tokens_BNL], dim=1), best_BN)

    def _advance(
        self, log_p_BC: Tensor, parent_BC: Tensor, token_BC: Tensor, ends_BC: Tensor, length: int
    ) -> Tensor:
        """The first N candidates that do not end run on; returns the hypotheses that they extend, [B, N]."""
        self.log_p_BN, chosen_BN = log_p_BC.masked_fill(ends_BC, _DEAD).topk(self.beam_size)
        parent_BN, self.last_BN = parent_BC.gather(1, chosen_BN), token_BC.gather(1, chosen_BN)
        self.tokens_BNL = _pick(self.tokens_BNL, parent_BN)
        self.tokens_BNL[:, :, length - 1] = self.last_BN
        return parent_BN

    def _is_done(self, length: int) -> Tensor:
        """[B] whether nothing that runs can enter the result; `length` tokens have been chosen."""
        if self.stop == "exact":
            best_length = self.max_len if self.length_penalty > 0 else length + 1
            to_beat = self.finished_score_BN[:, self.n_best - 1]
        else:
            best_length = length
            to_beat = self.finished_score_BN[:, -1]
        # Not `<=`: a hypothesis of a diverged model has the score NaN, and must not run for ever.
        best_B = self.log_p_BN[:, 0] / best_length**self.length_penalty
        is_done_B: Tensor = ~(best_B > to_beat)
        return is_done_B

    def _drop_done(
        self, parent_BN: Tensor, done_B: Tensor, length: int
    ) -> tuple[Tensor, Tensor | None] | None:
        """Store the results of sources that are done; returns the cache's rows and sources to go on with."""
        n_sources, device = len(done_B), done_B.device
        first_row_B1 = torch.arange(n_sources, device=device)[:, None] * self.beam_size
        rows_BN = first_row_B1 + (parent_BN if length > 1 else torch.zeros_like(parent_BN))
        if not done_B.any():
            return rows_BN.flatten(), None
        done = self.source_B[done_B].tolist()
        scores, outputs = self.finished_score_BN[done_B].tolist(), self.finished_tokens_BNL[done_B].tolist()
        for source, scores_N, outputs_N in zip(done, scores, outputs, strict=True):
            finished = zip(outputs_N, scores_N, strict=True)
            found = [Hypothesis(_without_eos(tokens), score) for tokens, score in finished if score > _DEAD]
            self.results[source] = found[: self.n_best] or [Hypothesis([], _DEAD)]
        keep = (~done_B).nonzero().squeeze(1)
        if not len(keep):
            return None
        self.source_B, self.log_p_BN, self.last_BN, self.tokens_BNL = (
            x[keep] for x in (self.source_B, self.log_p_BN, self.last_BN, self.tokens_BNL)
        )
        self.finished_score_BN = self.finished_score_BN[keep]
        self.finished_tokens_BNL = self.finished_tokens_BNL[keep]
        return rows_BN[keep].flatten(), keep


def _without_eos(tokens: list[int]) -> list[int]:
    """Tokens up to EOS, or to the padding behind an output that was cut at max_len."""
    for end, token in enumerate(tokens):
        if token in (EOS_ID, PAD_ID):
            return tokens[:end]
    return tokens


def _pick(x_BNL: Tensor, index_BN: Tensor) -> Tensor:
    """[B, M, L] and [B, N] indices below M to [B, N, L]."""
    return x_BNL.gather(1, index_BN[:, :, None].expand(-1, -1, x_BNL.shape[2]))


def _top_k(x_RV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`x_RV.topk(k)`, several times as fast on a CPU for a large V and a small k.

    The k largest values lie in the k chunks with the largest maxima: maxima are cheap, sorting is not.
    """
    n_rows, n_columns = x_RV.shape
    if n_columns < 2 * k * _CHUNK:
        return x_RV.topk(k)
    if n_columns % _CHUNK:
        x_RV = F.pad(x_RV, (0, -n_columns % _CHUNK), value=_DEAD)
    chunks_RXC = x_RV.view(n_rows, -1, _CHUNK)
    chunk_Rk = chunks_RXC.amax(dim=-1).topk(k).indices
    inside_RX = chunks_RXC.gather(1, chunk_Rk[:, :, None].expand(-1, -1, _CHUNK)).flatten(1)
    value_Rk, place_Rk = inside_RX.topk(k)
    return value_Rk, chunk_Rk.gather(1, place_Rk // _CHUNK) * _CHUNK + place_Rk % _CHUNK
