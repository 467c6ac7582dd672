"""Dropout of what tensor-parallel ranks share out: other masks on each, while what they all hold gets the same."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dist_transformer.parallel.regions import TensorParallel

_ODD = 0x9E3779B97F4A7C15
"""2^64 / golden ratio: multiples of it lie far apart."""


@contextmanager
def own_draws(tp: TensorParallel) -> Iterator[None]:
    """Random numbers inside are this rank's own, if outside all ranks of the group draw the same.

    One number is drawn from the common generator and seeds this rank's: there is no state but the generator's, so
    that what recomputation or a checkpoint restores brings back the same masks.
    """
    common = int(torch.randint(2**62, ()))
    seed = (common + (tp.rank + 1) * _ODD) % 2**63
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def draw_apart(module: nn.Module, tp: TensorParallel) -> None:
    """Let a module's forward pass draw this rank's own random numbers.

    With sequence parallelism no rank holds what another one does, and the generators themselves differ.
    """
    if tp.sequence:
        return
    plain: Callable[..., Any] = module.forward

    def forward(*args: Any) -> Any:
        if not module.training:
            return plain(*args)
        with own_draws(tp):
            return plain(*args)

    module.forward = forward


def first_seed(seed: int, dp_rank: int, tp: TensorParallel) -> int:
    """What a rank's generator starts from: its own where it sees other rows or positions than another rank."""
    rank = dp_rank * tp.size + tp.rank if tp.sequence else dp_rank
    return (seed * 1_000_003 + rank) % 2**63
