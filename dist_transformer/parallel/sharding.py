"""Which part of a parameter a rank holds, over the ranks that share a layer (tensor parallelism)."""

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
    partition: Partition | None = getattr(parameter, "partition", None)
    return partition


def set_partition(parameter: nn.Parameter, partition: Partition) -> None:
    """Mark a parameter as a part; DeepSpeed reads `tensor_model_parallel` to count replicated ones once in its norm."""
    parameter.partition = partition  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
