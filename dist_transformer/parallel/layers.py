"""Layers of which each tensor-parallel rank holds a part (Megatron-LM, Shoeybi et al. 2019).

They take the place of the model's own layers, with the same parameter names; `parallel.sharding` says which is which.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dist_transformer.model.layers import StackInput
from dist_transformer.model.transformer import Embedding
from dist_transformer.parallel.partition import Partition, set_partial_gradient, set_partition
from dist_transformer.parallel.regions import (
    TensorParallel,
    enter,
    leave,
    own_positions,
    start_gather,
    start_scatter,
    start_sum,
)


def cut_parameter(whole: Tensor, dim: int, tp: TensorParallel) -> nn.Parameter:
    """This rank's part of a parameter, marked as such."""
    partition = Partition(dim, tp.size, tp.rank)
    # Contiguous, and not a view: a part must not keep the whole alive.
    part = nn.Parameter(partition.cut(whole.detach()).clone(memory_format=torch.contiguous_format))
    set_partition(part, partition)
    return part


class ColumnLinear(nn.Module):
    """Some outputs of a linear map: the rows of its weight that are this rank's.

    Its input has entered the shared part; `ColumnProject` does that for several of them at once.

    Args:
        whole: the linear map of which this is a part.
        rows: which of the weight's rows this rank computes where all ranks hold all of them, because there are
            fewer key-value heads than ranks; None: each rank holds an equal part.
    """

    def __init__(self, whole: nn.Linear, tp: TensorParallel, rows: slice | None = None) -> None:
        super().__init__()
        self.rows = rows
        self.weight = cast("nn.Parameter", whole.weight)
        self.bias: nn.Parameter | None = whole.bias
        if rows is None:
            self.weight = cut_parameter(whole.weight, 0, tp)
            self.bias = None if whole.bias is None else cut_parameter(whole.bias, 0, tp)
            return
        for parameter in self.parameters():
            set_partial_gradient(parameter)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] to this rank's outputs [B, T, F/tp]."""
        return _linear(x_BTD, self.weight, self.bias, self.rows)


class ColumnProject(nn.Module):
    """Enters the shared part and applies several `ColumnLinear`: one communication in each direction for all.

    Args:
        maps: what it will be called with; ZeRO 3 must know whose weights are read here.
    """

    def __init__(self, tp: TensorParallel, maps: list[ColumnLinear]) -> None:
        super().__init__()
        self.tp = tp
        # A tuple, which torch does not look into: as submodules they would be found twice.
        self.maps = tuple(maps)

    def forward(self, x: Tensor, *maps: ColumnLinear) -> tuple[Tensor, ...]:
        """[B, T/tp, D] (with sequence parallelism; else [B, T, D]) to each map's [B, T, F/tp]."""
        weights, biases = [map_.weight for map_ in maps], [map_.bias for map_ in maps]
        rows = tuple(map_.rows for map_ in maps)
        outputs = _ColumnProject.apply(self.tp, rows, x, *weights, *biases)  # type: ignore[no-untyped-call]
        return cast("tuple[Tensor, ...]", outputs)


class _ColumnProject(torch.autograd.Function):
    """Keeps the rank's own positions only, and hides communication behind products of matrices in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, tp: TensorParallel, rows: tuple[slice | None, ...], x: Tensor, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights, biases = parameters[: len(rows)], parameters[len(rows) :]
        ctx.tp, ctx.rows, ctx.has_bias = tp, rows, [bias is not None for bias in biases]
        ctx.save_for_backward(x, *weights)
        whole = start_gather(x, tp)() if tp.sequence else x
        return tuple(
            _linear(whole, cast("Tensor", weight), bias, part)
            for part, weight, bias in zip(rows, weights, biases, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        tp, rows = ctx.tp, ctx.rows
        x, *weights = ctx.saved_tensors
        gathering = start_gather(x, tp) if tp.sequence else None
        d_flat = [d_output.flatten(0, 1) for d_output in d_outputs]
        d_x = d_flat[0] @ _own(weights[0], rows[0])
        for part, weight, d_output in zip(rows[1:], weights[1:], d_flat[1:], strict=True):
            d_x.addmm_(d_output, _own(weight, part))
        d_x = d_x.view(*d_outputs[0].shape[:2], -1)
        whole = x if gathering is None else gathering()
        # Underway while the weights' gradients are computed.
        adding = start_scatter(d_x, tp) if tp.sequence else start_sum(d_x, tp)
        inputs = whole.flatten(0, 1)
        d_weights, d_biases = [], []
        for part, weight, d_output, has_bias in zip(rows, weights, d_flat, ctx.has_bias, strict=True):
            n_rows = weight.shape[0]
            d_weights.append(_in_rows(d_output.t() @ inputs, part, n_rows))
            d_biases.append(_in_rows(d_output.sum(0), part, n_rows) if has_bias else None)
        return None, None, adding(), *d_weights, *d_biases


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, rows: slice | None) -> Tensor:
    """Product, then bias, out of place: selective recomputation keeps the product."""
    y = F.linear(x, _own(weight, rows))
    return y if bias is None else y + _own(bias, rows)


def _own(parameter: Tensor, rows: slice | None) -> Tensor:
    """The rows that this rank computes. The parameter itself where it has no others: ZeRO 3 can then free it."""
    return parameter if rows is None else parameter[rows]


def _in_rows(part: Tensor, rows: slice | None, n_rows: int) -> Tensor:
    """A gradient of some rows as one of all."""
    if rows is None:
        return part
    whole = part.new_zeros(n_rows, *part.shape[1:])
    whole[rows] = part
    return whole


class RowLinear(nn.Module):
    """A linear map of which each rank reads some inputs: the columns of its weight that are this rank's.

    The ranks' products are added as they leave the shared part; the bias is added once, after that.
    """

    def __init__(self, whole: nn.Linear, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.weight, self.bias = cut_parameter(whole.weight, 1, tp), whole.bias
        if self.bias is not None and tp.sequence:
            set_partial_gradient(self.bias)

    def forward(self, x_BTF: Tensor) -> Tensor:
        """This rank's inputs [B, T, F/tp] to [B, T/tp, D] (with sequence parallelism; else [B, T, D])."""
        y = leave(F.linear(x_BTF, self.weight), self.tp)
        return y if self.bias is None else y + self.bias


class VocabularyEmbedding(Embedding):
    """Each rank holds the vectors of some tokens; the others' are zero here and come with the sum over ranks."""

    def __init__(self, whole: Embedding, tp: TensorParallel) -> None:
        nn.Module.__init__(self)
        self.tp, self.scale = tp, whole.scale
        self.weight = cut_parameter(whole.weight, 0, tp)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """[B, T] token ids to [B, T/tp, D] (with sequence parallelism; else [B, T, D])."""
        n_own = self.weight.shape[0]
        own_BT = tokens_BT - self.tp.rank * n_own
        is_own_BT = (own_BT >= 0) & (own_BT < n_own)
        x_BTD = F.embedding(torch.where(is_own_BT, own_BT, 0), self.weight) * is_own_BT.unsqueeze(-1)
        return self.scaled(leave(x_BTD, self.tp))


class OwnInput(StackInput):
    """A stack's input where each rank has some of the positions."""

    def __init__(self, whole: StackInput, tp: TensorParallel) -> None:
        nn.Module.__init__(self)
        self.positions, self.dropout = whole.positions, whole.dropout
        self.tp, self.learned, self.norm = tp, whole.learned, whole.norm

    def forward(self, x_BTD: Tensor, positions_BT: Tensor, length: int) -> Tensor:
        """[B, T/tp, D] and all positions [B, T] to [B, T/tp, D] (without sequence parallelism T everywhere)."""
        return super().forward(x_BTD, own_positions(positions_BT, self.tp), length)


__all__ = [
    "ColumnLinear",
    "ColumnProject",
    "OwnInput",
    "RowLinear",
    "VocabularyEmbedding",
    "cut_parameter",
    "enter",
]
