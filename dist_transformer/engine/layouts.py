"""Where parameters lie in an optimizer's tensors: what `RMSScaledAdamW` must know to scale each by itself."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_transformer.engine.optim import Layout, RMSScaledAdamW, Segment
from dist_transformer.engine.runs import Run, is_sharded, part_shape, runs
from dist_transformer.parallel.mesh import Mesh
from dist_transformer.parallel.partition import partition_of


def set_layouts(optimizer: Any, inner: RMSScaledAdamW, mesh: Mesh) -> None:
    """Tell the inner optimizer which elements of its tensors belong to which parameter, and who else has some of it.

    Args:
        optimizer: DeepSpeed's wrapper, of any stage or of mixed precision, or the inner optimizer itself.
    """
    over_dp = mesh.dp_size > 1 and is_sharded(optimizer)
    if mesh.tp_size == 1 and not is_sharded(optimizer):
        return  # each tensor is a parameter
    by_owner: dict[int, list[Run]] = {}
    for run in runs(optimizer, mesh.dp_rank):
        by_owner.setdefault(id(run.owner), []).append(run)
    inner.layouts = {owner: _layout(found, mesh, over_dp) for owner, found in by_owner.items()}


def _layout(found: list[Run], mesh: Mesh, over_dp: bool) -> Layout:
    """The layout of a tensor, with whole parameters' sizes and sums over all ranks that share them."""
    partitions = [partition_of(run.parameter) for run in found]
    n_parts = [1 if partition is None else partition.n_parts for partition in partitions]
    is_part = torch.tensor([n > 1 for n in n_parts])

    def all_reduce(values: Tensor) -> None:
        # Optimizer states may live in CPU memory, where NCCL cannot reach.
        on_device = values.to(mesh.device)
        if over_dp:
            dist.all_reduce(on_device, group=mesh.dp_group)
        if is_part.any():
            mine = is_part.to(mesh.device)
            parts = on_device * mine
            dist.all_reduce(parts, group=mesh.tp_group)
            on_device = torch.where(mine, parts, on_device)
        values.copy_(on_device)

    segments = [
        Segment(run.offset, run.length, index, part_shape(run.parameter).numel() * n_parts[index])
        for index, run in enumerate(found)
        if run.length
    ]
    return Layout(segments, len(found), all_reduce)
