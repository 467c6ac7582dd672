"""Where parameters lie in the tensors that an optimizer updates, under every one of DeepSpeed's wrappers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Run:
    """Elements of one parameter, one behind the other, in a tensor of the optimizer's."""

    parameter: nn.Parameter
    owner: Tensor
    """The tensor: a flat partition of many parameters under ZeRO, else the parameter's master or itself."""
    offset: int
    """Where in it the run begins."""
    start: int
    """Which element of this rank's part of the parameter (see `parallel.partition`) it begins with."""
    length: int
    """0 where none of the parameter is in this rank's partition."""


def runs(optimizer: Any, dp_rank: int) -> Iterator[Run]:
    """All runs on this rank, parameters in the same order on every rank.

    Args:
        optimizer: DeepSpeed's wrapper, of any stage or of mixed precision, or torch's optimizer itself.

    Raises:
        TypeError: it is a wrapper that is not known.
    """
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        yield from _stage3_runs(optimizer, dp_rank)
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        yield from _mapped_runs(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups)
    elif hasattr(optimizer, "fp32_groups_flat_partition"):
        yield from _mapped_runs(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition)
    elif hasattr(optimizer, "fp32_groups"):
        for parameters, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, master in zip(parameters, masters, strict=True):
                yield Run(parameter, master, 0, 0, master.numel())
    elif isinstance(optimizer, torch.optim.Optimizer):
        for group in optimizer.param_groups:
            yield from (Run(parameter, parameter, 0, 0, parameter.numel()) for parameter in group["params"])
    else:
        raise TypeError(
            f"{type(optimizer).__name__}: where parameters lie in this DeepSpeed optimizer is not known"
        )


def is_sharded(optimizer: Any) -> bool:
    """Whether data-parallel ranks hold different runs (ZeRO 1 to 3), and not copies of the same."""
    return not hasattr(optimizer, "fp32_groups") and not isinstance(optimizer, torch.optim.Optimizer)


def part_shape(parameter: nn.Parameter) -> torch.Size:
    """Of this rank's part of a parameter, also where ZeRO 3 has taken it to pieces."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _stage3_runs(optimizer: Any, dp_rank: int) -> Iterator[Run]:
    """Stage 3: every rank holds an equal part of every parameter, the last one padded at its end."""
    groups = zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
    for parameters, flat in groups:
        offset = 0
        for parameter in parameters:
            length: int = parameter.ds_tensor.ds_numel
            start = dp_rank * length
            yield Run(parameter, flat, offset, start, max(0, min(length, parameter.ds_numel - start)))
            offset += length


def _mapped_runs(groups: Any, partitions: Any) -> Iterator[Run]:
    """Stages 1 and 2: a rank's partition holds a run of parameters, the first and last perhaps cut."""
    for parameters, flat in zip(groups, partitions, strict=True):
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is None:
                yield Run(parameter, flat, 0, 0, 0)
                continue
            address, part = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
            yield Run(parameter, flat, address.start, part.start, part.numel)
