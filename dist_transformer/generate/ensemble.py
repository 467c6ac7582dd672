"""What a search asks of a model, and several models that answer as one."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dist_transformer.model import EncoderDecoder
from dist_transformer.model.cache import KeyValueCache


class Scorer(Protocol):
    """What tells how likely each next token is: an `EncoderDecoder`, or an `Ensemble`."""

    vocab_size: int
    training: bool

    @property
    def max_positions(self) -> int | None:
        """The longest source or target that it takes; None: any."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def start(self, tokens_BS: Tensor) -> Any:
        """Sources [B, S], padded and ended by EOS, to a cache with the methods `branch` and `keep`."""

    def step(self, tokens_RT: Tensor, cache: Any) -> Tensor:
        """The next T tokens of every hypothesis to the scores [R, T, V] of what follows each."""

    def train(self, mode: bool = True) -> Any:
        """With dropout, or without."""

    def eval(self) -> Any:
        """Without dropout."""


class Ensemble(nn.Module):
    """Models of one vocabulary that decode together: a token's probability is the mean of theirs.

    Args:
        models: of any shapes, on one device; ids beyond the smallest vocabulary are padding of the others.
    """

    def __init__(self, models: Sequence[EncoderDecoder]) -> None:
        super().__init__()
        self.models, self.vocab_size = nn.ModuleList(models), min(model.vocab_size for model in models)
        # A new module is in training mode; a search restores the mode that it finds, in all of its parts.
        self.training = any(model.training for model in models)

    @property
    def max_positions(self) -> int | None:
        """The longest source or target that every model takes; None: any."""
        limits = [limit for model in self._each if (limit := model.max_positions) is not None]
        return min(limits, default=None)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._each[0].device

    @property
    def _each(self) -> list[EncoderDecoder]:
        return list(self.models)  # type: ignore[arg-type]

    def start(self, tokens_BS: Tensor) -> "Caches":
        """As `EncoderDecoder.start`."""
        return Caches([model.start(tokens_BS) for model in self._each])

    def step(self, tokens_RT: Tensor, cache: "Caches") -> Tensor:
        """As `EncoderDecoder.step`; the scores [R, T, V] are log-probabilities, float32."""
        each = [
            model.step(tokens_RT, own).log_softmax(dim=-1, dtype=torch.float32)[..., : self.vocab_size]
            for model, own in zip(self._each, cache.each, strict=True)
        ]
        return torch.stack(each).logsumexp(dim=0) - math.log(len(each))


class Caches:
    """Every model's cache: what happens to one happens to all."""

    def __init__(self, each: Sequence[KeyValueCache]) -> None:
        self.each = each

    def branch(self, parents_BN: Tensor) -> None:
        """The hypotheses that go on: for each the one that it extends."""
        for cache in self.each:
            cache.branch(parents_BN)

    def keep(self, sources: Tensor) -> None:
        """Go on with these sources only, in this order."""
        for cache in self.each:
            cache.keep(sources)
