"""Where activations enter and leave the part of a layer that tensor-parallel ranks share, with their gradients.

Outside, with sequence parallelism (Korthikanti et al. 2022), each rank holds an equal part of every row's positions:
entering gathers them, leaving adds the ranks' sums and keeps this rank's part. Without it (Shoeybi et al. 2019) every
rank holds all positions: entering is free, leaving adds. The backward pass of each is the other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_transformer.parallel.mesh import Mesh


@dataclass(frozen=True)
class TensorParallel:
    """The ranks that share each layer, as one of them sees it."""

    group: dist.ProcessGroup
    rank: int
    size: int
    sequence: bool
    """Outside the shared parts each rank holds its part of the positions (sequence parallelism)."""

    @classmethod
    def of(cls, mesh: Mesh, sequence_parallel: bool) -> "TensorParallel":
        """This rank's tensor-parallel group of a mesh."""
        return cls(mesh.tp_group, mesh.tp_rank, mesh.tp_size, sequence_parallel and mesh.tp_size > 1)

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over the group, in a tensor of its own."""
        return start_sum(values.clone(), self)()


Pending = Callable[[], Tensor]
"""Waits for a communication that has been started, and gives its result."""


def start_gather(x_BtD: Tensor, tp: TensorParallel) -> Pending:
    """Start to gather positions [B, T/tp, D] to [B, T, D]."""
    n_rows, length, width = x_BtD.shape
    gathered = x_BtD.new_empty(tp.size * n_rows, length, width)
    work = dist.all_gather_into_tensor(gathered, x_BtD.contiguous(), group=tp.group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        parts = gathered.view(tp.size, n_rows, length, width)
        return parts.transpose(0, 1).reshape(n_rows, tp.size * length, width)

    return finish


def start_scatter(x_BTD: Tensor, tp: TensorParallel) -> Pending:
    """Start to add [B, T, D] over ranks; each gets its part of the positions [B, T/tp, D]."""
    n_rows, length, width = x_BTD.shape
    parts = x_BTD.view(n_rows, tp.size, length // tp.size, width).transpose(0, 1).flatten(0, 1)
    own = x_BTD.new_empty(n_rows, length // tp.size, width)
    work = dist.reduce_scatter_tensor(own, parts, group=tp.group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return own

    return finish


def start_sum(x: Tensor, tp: TensorParallel) -> Pending:
    """Start to add over ranks, in place."""
    work = dist.all_reduce(x, group=tp.group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return x

    return finish


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return start_gather(x, tp)() if tp.sequence else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor, None]:
        d_x = d_x.contiguous()
        return (start_scatter(d_x, ctx.tp) if ctx.tp.sequence else start_sum(d_x.clone(), ctx.tp))(), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        x = x.contiguous()
        # Out of place: what recomputation keeps of this rank's product must stay as it was.
        return (start_scatter(x, tp) if tp.sequence else start_sum(x.clone(), tp))()

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor, None]:
        return start_gather(d_x, ctx.tp)() if ctx.tp.sequence else d_x, None


def enter(x: Tensor, tp: TensorParallel) -> Tensor:
    """What a shared part reads: [B, T, D], of each rank's [B, T/tp, D] with sequence parallelism."""
    entered: Tensor = _Enter.apply(x, tp)  # type: ignore[no-untyped-call]
    return entered


def leave(x_BTD: Tensor, tp: TensorParallel) -> Tensor:
    """The sum over ranks of [B, T, D], of which each rank keeps [B, T/tp, D] with sequence parallelism."""
    left: Tensor = _Leave.apply(x_BTD, tp)  # type: ignore[no-untyped-call]
    return left


def own_positions(x_BT: Tensor, tp: TensorParallel) -> Tensor:
    """What this rank holds of [B, T, ...] outside the shared parts."""
    return x_BT.chunk(tp.size, dim=1)[tp.rank] if tp.sequence else x_BT


class Enter(nn.Module):
    """`enter` as a module."""

    def __init__(self, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp

    def forward(self, x: Tensor) -> Tensor:
        """[B, T/tp, D] to [B, T, D]."""
        return enter(x, self.tp)
