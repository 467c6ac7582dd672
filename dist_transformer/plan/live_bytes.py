"""Counts the bytes of all tensors that are alive, as they come and go, on any device: on `meta` nothing is computed."""

import gc
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_GRAIN = 512
"""CUDA's allocator gives out multiples of so many bytes."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active: every storage of a device that an operation returns, until it is freed.

    Args:
        device: its type; others' tensors do not count.
        grain: each storage counts as a multiple of so many bytes.
        known: tensors that were there before and do not count.
    """

    def __init__(self, device: str, grain: int = _GRAIN, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._grain = grain
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        """By identity, so that one that has taken a dead one's place is told from it."""
        storages = [tensor.untyped_storage() for tensor in known]
        self._known = {id(storage): storage for storage in storages}
        self.now = 0
        """Bytes alive at present."""
        self.peak = 0
        """Most bytes alive after any operation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(result)
        return result

    def settled(self) -> int:
        """Bytes alive at present, without garbage that waits to be collected."""
        gc.collect()
        return self.now

    def add(self, result: Any) -> None:
        """Count the tensors of a result, those that are not known yet."""
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.device.type == self._device:
                self._add(value.untyped_storage())
        self.peak = max(self.peak, self.now)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        there = self._alive.get(key)
        if (there is not None and there() is storage) or key in self._known:
            return
        size = -(-storage.nbytes() // self._grain) * self._grain

        def end(_: object) -> None:
            self.now -= size
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, end)
        self.now += size

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
