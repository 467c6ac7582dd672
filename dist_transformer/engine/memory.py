"""Bytes of a model's states on a rank, counted from its tensors; `plan.states` has the formulas."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dist_transformer.engine.engine import Engine


@dataclass(frozen=True)
class StateBytes:
    """What a rank holds between a backward pass and the update."""

    parameters: int
    """Those that the model computes with."""
    gradients: int
    optimizer: int
    """Master weights and moments, and their average where the run keeps one."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.parameters + self.gradients + self.optimizer


def state_bytes(engine: Engine) -> StateBytes:
    """This rank's bytes, from the tensors that are alive, after a backward pass and at least one update before it.

    Stage 1 holds whole gradients between micro-steps, and after the last one its part of them.
    A storage counts once, as the first of parameter, gradient, optimizer state that holds it.
    """
    seen: set[int] = set()
    optimizer = engine.optimizer
    return StateBytes(
        _count(_parameters(engine), seen),
        _count(_gradients(engine, optimizer), seen),
        _count(_optimizer_tensors(engine), seen),
    )


def _parameters(engine: Engine) -> Iterator[Tensor]:
    for parameter in engine.model.parameters():
        yield parameter.data
        part = getattr(parameter, "ds_tensor", None)
        if part is not None:
            yield part


def _gradients(engine: Engine, optimizer: Any) -> Iterator[Tensor]:
    for parameter in engine.model.parameters():
        if parameter.grad is not None:
            yield parameter.grad
    for name in _GRADIENTS:
        yield from _tensors(getattr(optimizer, name, None))


_GRADIENTS = (
    "averaged_gradients",
    "all_grad_tensors",
    "fp32_groups_gradients_flat",
    "fp32_groups_gradient_flat_partition",
    "grad_partitions_flat_buffer",
)
"""Where DeepSpeed's wrappers keep them: stages 1 and 2 (all, and between micro-steps), 1 in fp32, and 3."""

_MASTERS = (
    "fp32_groups",
    "fp32_groups_flat_partition",
    "single_partition_of_fp32_groups",
    "fp32_partitioned_groups_flat",
)


def _optimizer_tensors(engine: Engine) -> Iterator[Tensor]:
    optimizer = engine.optimizer
    for name in _MASTERS:
        yield from _tensors(getattr(optimizer, name, None))
    for state in optimizer.state.values():
        yield from _tensors(state)
    if engine.average is not None:
        yield from engine.average.values


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _count(tensors: Iterator[Tensor], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
