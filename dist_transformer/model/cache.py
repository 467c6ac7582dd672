"""Keys and values that decoding keeps, so that each new token costs one position and not all of them."""

import torch
from torch import Tensor


class LayerCache:
    """One decoder layer's keys and values: of the target so far, and of the memory."""

    def __init__(self, cross: tuple[Tensor, Tensor], max_len: int) -> None:
        self.cross = cross
        self.max_len, self.length = max_len, 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Add new positions; returns keys and values of all positions so far, [B, H, T, K]."""
        end = self.length + k_BHTK.shape[2]
        if self._keys is None or self._values is None:
            shape = (*k_BHTK.shape[:2], self.max_len, k_BHTK.shape[3])
            self._keys, self._values = k_BHTK.new_empty(shape), v_BHTK.new_empty(shape)
        self._keys[:, :, self.length : end] = k_BHTK
        self._values[:, :, self.length : end] = v_BHTK
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the target's keys and values, in this order."""
        for stored in (self._keys, self._values):
            if stored is not None:
                stored[: len(rows), :, : self.length] = stored[rows, :, : self.length]
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys[: len(rows)], self._values[: len(rows)]

    def select_cross(self, rows: Tensor) -> None:
        """Keep these rows of the memory's keys and values."""
        keys, values = self.cross
        self.cross = keys[rows], values[rows]


class KeyValueCache:
    """All layers' keys and values, and which memory positions may be attended to."""

    def __init__(self, cross: list[tuple[Tensor, Tensor]], is_memory_BS: Tensor, max_len: int) -> None:
        self.layers = [LayerCache(keys_values, max_len) for keys_values in cross]
        self.cross_mask = is_memory_BS[:, None, None, :]
        self.max_len = max_len
        self.length = 0

    def select(self, rows: Tensor, memory_changes: bool = True) -> None:
        """Keep and reorder rows (int64 indices).

        Args:
            memory_changes: false where every row stays with the same source, as hypotheses of one beam do:
                the memory's keys and values then need no copy.
        """
        for layer in self.layers:
            layer.select(rows)
            if memory_changes:
                layer.select_cross(rows)
        if memory_changes:
            self.cross_mask = self.cross_mask[rows]

    def repeat(self, n: int) -> None:
        """Every row n times, next to each other: from sources to hypotheses, before the first step."""
        rows = torch.arange(self.cross_mask.shape[0], device=self.cross_mask.device).repeat_interleave(n)
        self.select(rows)
