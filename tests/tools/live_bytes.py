"""Counts the bytes of all tensors that are alive, as they come and go: the truth about memory on a CPU."""

import gc
from types import TracebackType
from typing import Any, Self

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While active: every storage that an operation returns, until it is freed. `known` ones do not count."""

    def __init__(self, known: list[Tensor] | None = None) -> None:
        super().__init__()
        self._known = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in known or []}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._at_most = 0
        self.peak = 0
        """Most bytes alive after any operation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and not value.is_meta:
                storage = value.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference.cdata not in self._known:
                    self._alive[reference.cdata] = (reference, storage.nbytes())
                    self._at_most += storage.nbytes()
        if self._at_most > self.peak:
            self.peak = max(self.peak, self.now())
        return result

    def settled(self) -> int:
        """Bytes alive at present, without garbage that waits to be collected."""
        gc.collect()
        return self.now()

    def now(self) -> int:
        """Bytes alive at present."""
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self._at_most = sum(size for _, size in self._alive.values())
        return self._at_most

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
