"""The few collectives the loop itself needs; DeepSpeed does those of gradients and parameters."""

from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dist_transformer.errors import UserError
from dist_transformer.parallel.mesh import Mesh

T = TypeVar("T")


def sum_over_data_parallel(values: Tensor, mesh: Mesh) -> Tensor:
    """Add a tensor over data-parallel ranks, in place; every rank gets the sum."""
    if mesh.dp_size > 1:
        dist.all_reduce(values, group=mesh.dp_group)
    return values


def sum_over_ranks(values: Tensor, mesh: Mesh) -> Tensor:
    """Add a tensor over all ranks, in place; every rank gets the sum."""
    if mesh.world_size > 1:
        dist.all_reduce(values)
    return values


def gather_objects(value: T, mesh: Mesh) -> list[T]:
    """Every rank's value, on every rank, in rank order."""
    if mesh.world_size == 1:
        return [value]
    gathered: list[T | None] = [None] * mesh.world_size
    dist.all_gather_object(gathered, value)
    return cast("list[T]", gathered)


def barrier(mesh: Mesh) -> None:
    """Wait until every rank is here."""
    if mesh.world_size > 1:
        sum_ = torch.zeros(1, device=mesh.device)
        dist.all_reduce(sum_)
        if mesh.device.type == "cuda":
            torch.cuda.synchronize(mesh.device)


def raise_together(error: UserError | None, mesh: Mesh) -> None:
    """End every rank if one of them failed: without this, the others would wait for it until a timeout.

    Raises:
        UserError: this rank's own error, or the first failing rank's; its attribute `on_every_rank` is True,
            so that one rank alone need print it.
    """
    for failed in gather_objects(error, mesh):
        if failed is not None:
            first = error if error is not None else failed
            first.on_every_rank = True
            raise first
