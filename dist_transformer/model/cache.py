"""Keys and values that decoding keeps, so that each new token costs one position and not all of them."""

import math

import torch
from torch import Tensor


class LayerCache:
    """One decoder layer's keys and values: of the target so far, and of the memory.

    Target positions come first in memory (`[T, B, H, K]`): the part in use is one block, so that adding a
    position and reordering rows copy whole runs and touch nothing else.
    """

    def __init__(self, cross: tuple[Tensor, Tensor], max_len: int) -> None:
        self.cross = cross
        self.max_len, self.length = max_len, 0
        self._stored: list[Tensor] = []
        """Keys and values [max_len, B, H, K], once there are any."""

    def append(self, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Add new positions; returns keys and values of all positions so far, [B, H, T, K] each."""
        n_rows, n_heads, n_new, head_dim = k_BHTK.shape
        if not self._stored:
            shape = (self.max_len, n_rows, n_heads, head_dim)
            self._stored = [k_BHTK.new_empty(shape), v_BHTK.new_empty(shape)]
        end = self.length + n_new
        for stored_TBHK, new_BHTK in zip(self._stored, (k_BHTK, v_BHTK), strict=True):
            stored_TBHK[self.length : end] = new_BHTK.permute(2, 0, 1, 3)
        self.length = end
        keys_TBHK, values_TBHK = (stored_TBHK[:end] for stored_TBHK in self._stored)
        return keys_TBHK.permute(1, 2, 0, 3), values_TBHK.permute(1, 2, 0, 3)

    def select(self, rows: Tensor, spare: list[Tensor]) -> None:
        """Keep these rows of the target's keys and values, in this order.

        Args:
            spare: at most one buffer that may be overwritten. The rows are copied there, and what they were
                copied from becomes the spare: all layers together need one buffer more, and no new ones.
        """
        for i, stored_TBHK in enumerate(self._stored):
            shape = (self.max_len, len(rows), *stored_TBHK.shape[2:])
            n_values = math.prod(shape)
            buffer = spare.pop() if spare else None
            if buffer is None or buffer.numel() < n_values:
                buffer = stored_TBHK.new_empty(n_values)
            selected_TBHK = buffer.view(-1)[:n_values].view(shape)
            torch.index_select(stored_TBHK[: self.length], 1, rows, out=selected_TBHK[: self.length])
            spare.append(stored_TBHK)
            self._stored[i] = selected_TBHK

    def select_sources(self, sources: Tensor) -> None:
        """Keep these rows of the memory's keys and values."""
        keys, values = self.cross
        self.cross = keys[sources], values[sources]


class KeyValueCache:
    """All layers' keys and values, and which memory positions may be attended to. Used without gradients.

    Rows are hypotheses: `n_hypotheses` neighbours of each source, 1 at first. The memory's keys and values
    are kept once a source, whatever the number of hypotheses: see `DecoderLayer`.
    """

    def __init__(self, cross: list[tuple[Tensor, Tensor]], is_memory_BS: Tensor, max_len: int) -> None:
        self.layers = [LayerCache(keys_values, max_len) for keys_values in cross]
        # Without padding, attention needs no mask and takes its fastest path.
        self.cross_mask = None if bool(is_memory_BS.all()) else is_memory_BS[:, None, None, :]
        self.n_sources, self.n_hypotheses = is_memory_BS.shape[0], 1
        self.device = is_memory_BS.device
        self.max_len = max_len
        self.length = 0
        self._spare: list[Tensor] = []

    def select(self, rows: Tensor, sources: Tensor | None = None) -> None:
        """Keep and reorder rows (int64 indices), `n_hypotheses` for each source that stays.

        Args:
            sources: the sources that stay, in their new order; None: all, where they are, as when the
                hypotheses of a beam are reordered: the memory's keys and values then need no copy.
        """
        for layer in self.layers:
            layer.select(rows, self._spare)
            if sources is not None:
                layer.select_sources(sources)
        if sources is not None:
            self.n_sources = len(sources)
            self.cross_mask = None if self.cross_mask is None else self.cross_mask[sources]

    def repeat(self, n: int) -> None:
        """Every row n times, next to each other: from sources to hypotheses."""
        n_rows = self.n_sources * self.n_hypotheses
        self.select(torch.arange(n_rows, device=self.device).repeat_interleave(n))
        self.n_hypotheses *= n
