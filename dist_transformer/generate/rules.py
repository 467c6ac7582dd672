"""What may be said next: the vocabulary, forced prefixes, length limits. One for beam search and sampling.

Shape legend, over the model's: B sources that still run, N hypotheses of each, R = B x N rows, C candidates
of a source.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_transformer.data.token_ids import EOS_ID, PAD_ID
from dist_transformer.generate.ensemble import Scorer

DEAD = float("-inf")
_FREE = -1


class Rules:
    """Which tokens may stand at which place of each source's output.

    Args:
        model: whose scores are ruled.
        n_vocab: ids from here on are the embedding's padding and are never emitted. They count in the softmax, as
            they do in the loss, so that scores are the model's own log-probabilities.
        max_len: most tokens of an output, EOS counted: one number, or one for each source.
        min_len: fewest tokens of an output, EOS not counted; where it exceeds the source's `max_len`, that holds.
        forbidden: further ids that are never emitted. `PAD_ID` never is, as it is no token of any target. `UNK_ID`
            may be: where a tokenizer has it, it is a prediction like others; name it to rule it out.
        prefixes: the tokens that each source's output begins with, without EOS. They count in score and length.

    Raises:
        ValueError: n_vocab beyond the model's; a prefix that leaves no room for a further token.
    """

    def __init__(
        self,
        model: Scorer,
        n_sources: int,
        *,
        n_vocab: int,
        max_len: int | Sequence[int],
        min_len: int = 0,
        forbidden: Sequence[int] = (),
        prefixes: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if n_vocab > model.vocab_size:
            raise ValueError(f"n_vocab={n_vocab} is larger than the model's vocab_size={model.vocab_size}")
        device = model.device
        limits = [max_len] * n_sources if isinstance(max_len, int) else list(max_len)
        self.n_vocab, self.min_len = n_vocab, min_len
        self._forbidden = torch.tensor([PAD_ID, *forbidden], device=device)
        self.limit_B = torch.tensor(limits, device=device)
        self.longest = max(limits)
        """Of all sources' limits."""
        self.n_forced = max(map(len, prefixes or [[]]))
        self._prefix_BL: Tensor | None = None
        if prefixes is not None and self.n_forced:
            for prefix, limit in zip(prefixes, limits, strict=True):
                if len(prefix) >= limit:
                    raise ValueError(f"a prefix of {len(prefix)} tokens leaves no room below max_len={limit}")
            rows = [[*prefix, *[_FREE] * (self.n_forced - len(prefix))] for prefix in prefixes]
            self._prefix_BL = torch.tensor(rows, device=device)

    def log_p(self, logits_RV: Tensor, length: int) -> Tensor:
        """The model's log-probabilities [R, V] of the token `length` (from 1) in float32, -inf for what may not be."""
        log_p_RV = logits_RV.log_softmax(dim=-1, dtype=torch.float32)
        forced = None
        if self._prefix_BL is not None and length <= self.n_forced:
            n_each = len(log_p_RV) // len(self._prefix_BL)
            token_R = self._prefix_BL[:, length - 1].repeat_interleave(n_each)
            rows = (token_R != _FREE).nonzero().squeeze(1)
            forced = rows, token_R[rows], log_p_RV[rows, token_R[rows]]
        log_p_RV[:, self.n_vocab :] = DEAD
        log_p_RV[:, self._forbidden] = DEAD
        if length <= self.min_len:
            log_p_RV[:, EOS_ID] = DEAD
        if forced is not None:
            rows, token, value = forced
            log_p_RV[rows] = DEAD
            log_p_RV[rows, token] = value
        return log_p_RV

    def ends(self, token_BC: Tensor, length: int) -> Tensor:
        """[B, C] whether an output whose token `length` this is ends with it."""
        return (token_BC == EOS_ID) | (self.limit_B == length)[:, None]

    def keep(self, sources: Tensor) -> None:
        """Go on with these sources only."""
        self.limit_B = self.limit_B[sources]
        if self._prefix_BL is not None:
            self._prefix_BL = self._prefix_BL[sources]


def worth_dropping(running_B: Tensor, n_running: int) -> bool:
    """Whether enough sources are done for their rows' work to exceed that of moving the others together."""
    return n_running <= 0.9 * len(running_B)


def without_eos(tokens: list[int]) -> list[int]:
    """Tokens up to EOS, or to the padding behind an output that was cut at its limit."""
    for end, token in enumerate(tokens):
        if token in (EOS_ID, PAD_ID):
            return tokens[:end]
    return tokens
