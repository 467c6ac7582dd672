"""What a parameter is to the ranks that share a layer: a part of a whole, or a replica, and whose gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Partition:
    """An equal part of a parameter along one dimension."""

    dim: int
    """The dimension that is cut."""
    n_parts: int
    """In how many equal parts: the tensor-parallel size."""
    part: int
    """Which of them this rank holds: its tensor-parallel rank."""

    def whole_shape(self, shape: torch.Size) -> torch.Size:
        """The whole parameter's shape, of a part's."""
        return torch.Size(n * (self.n_parts if i == self.dim else 1) for i, n in enumerate(shape))

    def cut(self, whole: Tensor) -> Tensor:
        """This part of a whole parameter: a view."""
        return whole.chunk(self.n_parts, dim=self.dim)[self.part]


def partition_of(parameter: nn.Parameter) -> Partition | None:
    """The part of the whole parameter that this one is; None: every tensor-parallel rank has all of it."""
    partition: Partition | None = getattr(parameter, "tp_partition", None)  # ZeRO 3 has `partition`
    return partition


def set_partition(parameter: nn.Parameter, partition: Partition) -> None:
    """Mark a parameter as a part; DeepSpeed reads `tensor_model_parallel` to count replicated ones once in its norm."""
    parameter.tp_partition = partition  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def set_partial_gradient(parameter: nn.Parameter) -> None:
    """Mark a replica of which each rank's gradient is a part of a sum: see `parallel.sharding.place`."""
    parameter.partial_gradient = True  # type: ignore[attr-defined]


def has_partial_gradient(parameter: nn.Parameter) -> bool:
    """Whether the gradient must be added over the ranks that hold the parameter."""
    return bool(getattr(parameter, "partial_gradient", False))
