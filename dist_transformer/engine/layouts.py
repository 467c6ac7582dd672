"""Where parameters lie in ZeRO's flat tensors: what `RMSScaledAdamW` must know to scale each parameter by itself."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_transformer.engine.optim import Layout, RMSScaledAdamW, Segment
from dist_transformer.parallel.mesh import Mesh


def set_layouts(optimizer: Any, inner: RMSScaledAdamW, mesh: Mesh) -> None:
    """Tell the inner optimizer how ZeRO's optimizer has flattened the parameters; called under ZeRO only.

    Args:
        optimizer: DeepSpeed's wrapper, of stage 1, 2 or 3, or of mixed precision.
    """
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        groups = zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
        found = [(flat, _stage3_segments(params, mesh.dp_rank), len(params)) for params, flat in groups]
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        groups = zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True)
        found = [(flat, _mapped_segments(params), len(params)) for params, flat in groups]
    elif hasattr(optimizer, "fp32_groups_flat_partition"):
        groups = zip(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, strict=True)
        found = [(flat, _mapped_segments(params), len(params)) for params, flat in groups]
    else:
        raise TypeError(
            f"{type(optimizer).__name__}: where parameters lie in this DeepSpeed optimizer is not known"
        )

    def all_reduce(values: Tensor) -> None:
        if mesh.dp_size > 1:
            # Optimizer states may live in CPU memory, where NCCL cannot reach.
            on_device = values.to(mesh.device)
            dist.all_reduce(on_device, group=mesh.dp_group)
            values.copy_(on_device)

    inner.layouts = {id(flat): Layout(segments, n, all_reduce) for flat, segments, n in found}


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
