"""Where parameters lie in an optimizer's tensors: what `RMSScaledAdamW` must know to scale each by itself."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_transformer.engine.optim import Layout, RMSScaledAdamW, Segment
from dist_transformer.parallel.mesh import Mesh
from dist_transformer.parallel.partition import partition_of


def set_layouts(optimizer: Any, inner: RMSScaledAdamW, mesh: Mesh) -> None:
    """Tell the inner optimizer which elements of its tensors belong to which parameter, and who else has some of it.

    Args:
        optimizer: DeepSpeed's wrapper, of any stage or of mixed precision, or the inner optimizer itself.
    """
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        groups = zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
        found = [(flat, _stage3_segments(params, mesh.dp_rank), params) for params, flat in groups]
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        groups = zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True)
        found = [(flat, _mapped_segments(params), params) for params, flat in groups]
    elif hasattr(optimizer, "fp32_groups_flat_partition"):
        groups = zip(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, strict=True)
        found = [(flat, _mapped_segments(params), params) for params, flat in groups]
    elif mesh.tp_size == 1:
        return  # each tensor is a parameter
    else:
        found = [
            (master, [Segment(0, parameter.numel(), 0, parameter.numel())], [parameter])
            for parameter, master in _masters(optimizer)
        ]
    is_sharded_by_zero = mesh.dp_size > 1 and not hasattr(optimizer, "fp32_groups") and optimizer is not inner
    inner.layouts = {
        id(flat): _layout(segments, params, mesh, is_sharded_by_zero) for flat, segments, params in found
    }


def _masters(optimizer: Any) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    """Stage 0: each parameter and what the optimizer updates, its float32 copy or itself."""
    if hasattr(optimizer, "fp32_groups"):
        for params, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            yield from zip(params, masters, strict=True)
    elif isinstance(optimizer, RMSScaledAdamW):
        for group in optimizer.param_groups:
            yield from ((parameter, parameter) for parameter in group["params"])
    else:
        raise TypeError(
            f"{type(optimizer).__name__}: where parameters lie in this DeepSpeed optimizer is not known"
        )


def _layout(
    segments: list[Segment], parameters: Sequence[torch.nn.Parameter], mesh: Mesh, over_dp: bool
) -> Layout:
    """The layout of a flat tensor, with whole parameters' sizes and sums over all ranks that share them."""
    n_parts = [
        1 if (partition := partition_of(parameter)) is None else partition.n_parts for parameter in parameters
    ]
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

    whole = [replace(segment, numel=segment.numel * n_parts[segment.index]) for segment in segments]
    return Layout(whole, len(parameters), all_reduce)


def _mapped_segments(parameters: Sequence[torch.nn.Parameter]) -> list[Segment]:
    """Stages 1 and 2: a rank's partition holds a run of parameters, the first and last perhaps cut."""
    segments = []
    for index, parameter in enumerate(parameters):
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            address = mapping.get_hp_fragment_address()
            segments.append(Segment(address.start, address.numel, index, parameter.numel()))
    return segments


def _stage3_segments(parameters: Sequence[torch.nn.Parameter], dp_rank: int) -> list[Segment]:
    """Stage 3: every rank holds an equal part of every parameter, the last one padded at its end."""
    segments, start = [], 0
    for index, parameter in enumerate(parameters):
        length: int = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        numel: int = parameter.ds_numel  # type: ignore[attr-defined]
        real = max(0, min(length, numel - dp_rank * length))
        segments.append(Segment(start, real, index, numel))
        start += length
    return segments
