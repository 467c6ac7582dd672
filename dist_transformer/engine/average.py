"""An exponential moving average of the weights, kept where and as the master weights are."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dist_transformer.engine.masters import live_pieces

if TYPE_CHECKING:
    from dist_transformer.engine.engine import Engine

# Elements that are exchanged at a time: what memory is bounded by.
_CHUNK = 2**24


class MovingAverage:
    """`ema = decay x ema + (1 - decay) x weights` after every update (Polyak and Juditsky 1992, with a horizon).

    A tensor for each of the optimizer's tensors, in float32 and on its device: 4 bytes for each element of which this
    rank has the master weight. It begins with the weights that there are.
    """

    def __init__(self, engine: "Engine", decay: float) -> None:
        owners = {id(live.owner): live.owner for live in live_pieces(engine)}
        self._owners = [owner.detach() for owner in owners.values()]
        self._values = [owner.clone(memory_format=torch.contiguous_format) for owner in self._owners]
        self._by_owner = dict(zip(owners, self._values, strict=True))
        self._update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    @property
    def values(self) -> list[Tensor]:
        """All that is kept on this rank."""
        return self._values

    def of(self, owner: Tensor) -> Tensor:
        """The average of a tensor of the optimizer's."""
        return self._by_owner[id(owner)]

    @torch.no_grad()
    def update(self) -> None:
        """After an update that was applied: one that was skipped moves nothing."""
        if self._values:
            self._update(self._values, self._owners, 0)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin with the weights that there are now."""
        for value, owner in zip(self._values, self._owners, strict=True):
            value.copy_(owner)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the master weights; a second time makes it undone, bit for bit."""
        for value, owner in zip(self._values, self._owners, strict=True):
            mine, other = value.view(-1), owner.view(-1)
            for start in range(0, mine.numel(), _CHUNK):
                chunk = slice(start, start + _CHUNK)
                kept = mine[chunk].clone()
                mine[chunk] = other[chunk]
                other[chunk] = kept
