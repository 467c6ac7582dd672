"""Keys and values that decoding keeps, so that each new token costs one position and not all of them.

Shape legend, over the model's: B sources, N hypotheses of each, Q new tokens of all its hypotheses (N of one token, or
of T each: hypothesis after hypothesis), S slots, G key-value heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_DEAD = float("-inf")
_ROOM = 32
_LEAST_SLOTS = 16
"""Attended to from the first step on, empty ones too: CPUs add up products with fewer keys in another order, and
cached decoding would no longer be what computing everything anew is, bit for bit.
"""


class LayerCache:
    """One decoder layer's keys and values: of the target so far, and of the memory. All [B, G, S, K]."""

    def __init__(self, cross: tuple[Tensor, Tensor]) -> None:
        keys, values = cross
        missing = (0, 0, 0, max(0, _LEAST_SLOTS - keys.shape[2]))
        self.cross = F.pad(keys, missing).contiguous(), F.pad(values, missing).contiguous()
        self.n_slots = 0
        self._stored: list[Tensor] = []
        """Keys and values with room behind the slots in use, once there are any."""

    def append(self, k_BGQK: Tensor, v_BGQK: Tensor) -> tuple[Tensor, Tensor]:
        """Add new slots; returns keys and values of all slots so far, or of the least number, zero where empty."""
        if not self._stored:
            self._stored = [new[:, :, :0] for new in (k_BGQK, v_BGQK)]
        end = self.n_slots + k_BGQK.shape[2]
        if end > self._stored[0].shape[2]:
            self._stored = [_with_room(stored[:, :, : self.n_slots], end) for stored in self._stored]
        for stored, new in zip(self._stored, (k_BGQK, v_BGQK), strict=True):
            stored[:, :, self.n_slots : end] = new
        self.n_slots = end
        keys, values = (stored[:, :, : max(end, _LEAST_SLOTS)] for stored in self._stored)
        return keys, values

    def select(self, sources: Tensor | None, slots_BS: Tensor) -> None:
        """Keep these sources (None: all), and of each these slots, in this order."""
        if sources is not None:
            keys, values = self.cross
            self.cross = keys[sources], values[sources]
        n_slots = slots_BS.shape[1]
        for i, stored in enumerate(self._stored):
            n_before, n_heads, room, head_dim = stored.shape
            source_B = torch.arange(n_before, device=stored.device) if sources is None else sources
            head_BG = source_B[:, None] * n_heads + torch.arange(n_heads, device=stored.device)
            rows = (head_BG[:, :, None] * room + slots_BS[:, None, :]).flatten()
            # Whole heads' vectors are copied, many times as fast as gathering element by element.
            kept = stored.view(-1, head_dim).index_select(0, rows)
            self._stored[i] = _with_room(kept.view(-1, n_heads, n_slots, head_dim), n_slots)
        self.n_slots = n_slots


class KeyValueCache:
    """All layers' keys and values, and who may attend to which of them. Used without gradients.

    The hypotheses of a source are the leaves of a tree: they share the beginning of their outputs. Each token of
    the tree has one slot, whatever the number of hypotheses that descend from it, and a mask says which slots a
    hypothesis sees. When a beam is reordered only that mask is; keys and values move when dead branches are
    cleared away, which most become within a few steps. All tokens that a step adds to a source are queries of one
    attention, to the memory too: neither are its keys copied for each hypothesis nor read once for each.
    """

    def __init__(self, cross: list[tuple[Tensor, Tensor]], is_memory_BS: Tensor) -> None:
        self.layers = [LayerCache(keys_values) for keys_values in cross]
        keys = cross[0][0]
        self.device, self.dtype = keys.device, keys.dtype
        is_memory_BS = F.pad(is_memory_BS, (0, max(0, _LEAST_SLOTS - is_memory_BS.shape[1])))
        # Added to scores. Without padding, none is needed.
        self.cross_bias: Tensor | None = None
        if not bool(is_memory_BS.all()):
            bias_BS = torch.zeros(is_memory_BS.shape, dtype=self.dtype, device=self.device)
            self.cross_bias = bias_BS.masked_fill_(~is_memory_BS, _DEAD)[:, None, None, :]
        self.n_sources, self.n_hypotheses, self.length = is_memory_BS.shape[0], 1, 0
        self._sees_BNS: Tensor | None = None
        """0 where a hypothesis sees a slot, -inf elsewhere; None while there is one hypothesis, which sees all."""
        self._positions_BS = torch.zeros(1, 0, dtype=torch.int64, device=self.device)
        """Each slot's position in the target; one row for all sources while they are alike."""
        self._n_slots_wanted = _ROOM

    def extend(self, n_new: int) -> tuple[Tensor | None, Tensor]:
        """Slots for `n_new` further tokens of each hypothesis, whose keys and values every layer then appends.

        Returns:
            What is added to the scores [B or 1, 1, Q or 1, S] (None: nothing), and the slots' positions [B or 1, S];
            S slots, or the least number.
        """
        new_T = torch.arange(self.length, self.length + n_new, device=self.device)
        new_positions = new_T.repeat(self.n_hypotheses).expand(self._positions_BS.shape[0], -1)
        n_before = self._positions_BS.shape[1]
        self._positions_BS = torch.cat([self._positions_BS, new_positions], dim=1)
        self.length += n_new
        empty = (0, max(0, _LEAST_SLOTS - self._positions_BS.shape[1]))
        positions_BS = F.pad(self._positions_BS, empty) if empty[1] else self._positions_BS
        if self._sees_BNS is None and n_new == 1:
            if not empty[1]:
                return None, positions_BS
            seen = torch.zeros(1, 1, 1, self._positions_BS.shape[1], dtype=self.dtype, device=self.device)
            return F.pad(seen, empty, value=_DEAD), positions_BS
        old_BNS = self._sees_BNS
        if old_BNS is None:
            old_BNS = torch.zeros(self.n_sources, 1, n_before, dtype=self.dtype, device=self.device)
        hypothesis_Q = torch.arange(self.n_hypotheses, device=self.device).repeat_interleave(n_new)
        time_Q = new_T.repeat(self.n_hypotheses)
        sees_QQ = (hypothesis_Q[:, None] == hypothesis_Q) & (time_Q[:, None] >= time_Q)
        new_QQ = torch.zeros_like(sees_QQ, dtype=self.dtype).masked_fill_(~sees_QQ, _DEAD)
        bias_BQS = torch.cat(
            [old_BNS.repeat_interleave(n_new, dim=1), new_QQ.expand(self.n_sources, -1, -1)], dim=2
        )
        if self._sees_BNS is not None:
            self._sees_BNS = bias_BQS[:, n_new - 1 :: n_new]
        return F.pad(bias_BQS, empty, value=_DEAD)[:, None], positions_BS

    def branch(self, parents_BN: Tensor) -> None:
        """The hypotheses that go on: for each the one (int64) that it extends, or is."""
        n_next = parents_BN.shape[1]
        n_slots = self._positions_BS.shape[1]
        if self._sees_BNS is None and n_next == 1:
            return
        if self._sees_BNS is None:
            self._sees_BNS = torch.zeros(
                self.n_sources, n_next, n_slots, dtype=self.dtype, device=self.device
            )
        else:
            self._sees_BNS = self._sees_BNS.gather(1, parents_BN[:, :, None].expand(-1, -1, n_slots))
        self.n_hypotheses = n_next
        if n_slots > self._n_slots_wanted:
            self._clear(None)

    def keep(self, sources: Tensor) -> None:
        """Go on with these sources (int64 indices) only, in this order."""
        self._clear(sources)
        self.n_sources = len(sources)
        if self.cross_bias is not None:
            self.cross_bias = self.cross_bias[sources]

    def _clear(self, sources: Tensor | None) -> None:
        """Move what is seen together."""
        n_kept = self.n_sources if sources is None else len(sources)
        n_slots = self._positions_BS.shape[1]
        slots_BS = torch.arange(n_slots, device=self.device).expand(n_kept, -1)
        if self._sees_BNS is not None:
            sees_BNS = self._sees_BNS if sources is None else self._sees_BNS[sources]
            is_live_BS = (sees_BNS == 0).any(dim=1)
            n_live = int(is_live_BS.sum(dim=1).max()) if n_slots else 0
            # Of sources with fewer, dead slots fill the rest: nobody sees them.
            slots_BS = is_live_BS.logical_not().long().argsort(dim=1, stable=True)[:, :n_live]
            self._sees_BNS = sees_BNS.gather(2, slots_BS[:, None].expand(-1, self.n_hypotheses, -1))
            positions_BS = self._positions_BS.expand(self.n_sources, -1)
            positions_BS = positions_BS if sources is None else positions_BS[sources]
            self._positions_BS = positions_BS.gather(1, slots_BS)
            self._n_slots_wanted = n_live + max(_ROOM, n_live // 2)
        for layer in self.layers:
            layer.select(sources, slots_BS)


def _with_room(x_BGSK: Tensor, n_slots: int) -> Tensor:
    """The same with room for `n_slots` and more."""
    n_rows, n_heads, n_used, head_dim = x_BGSK.shape
    grown = x_BGSK.new_zeros(n_rows, n_heads, n_slots + max(_ROOM, n_slots // 2), head_dim)
    grown[:, :, :n_used] = x_BGSK
    return grown
