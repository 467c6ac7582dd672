"""Which layer is shared out over tensor-parallel ranks, and how: one table, applied to a model on the meta device."""

import fnmatch
from collections.abc import Callable, Iterable
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_transformer.model import EncoderDecoder
from dist_transformer.model.attention import MultiHeadAttention
from dist_transformer.model.layers import StackInput
from dist_transformer.model.positions import RelativeBias
from dist_transformer.model.transformer import Embedding
from dist_transformer.parallel.layers import (
    ColumnLinear,
    ColumnProject,
    OwnInput,
    RowLinear,
    VocabularyEmbedding,
    cut_parameter,
)
from dist_transformer.parallel.partition import (
    Partition,
    has_partial_gradient,
    partition_of,
    set_partial_gradient,
    set_partition,
)
from dist_transformer.parallel.random import draw_apart
from dist_transformer.parallel.regions import Enter, TensorParallel

Rule = Callable[[EncoderDecoder, str, TensorParallel], None]
"""Shards the module at a path of the model, in place."""


def shard(model: EncoderDecoder, tp: TensorParallel) -> None:
    """Leave each rank its part of every layer, in place; parameter names stay. The model is on the meta device.

    Raises:
        ValueError: if a module with parameters stands in no row of the table, or a rule finds nothing to share.
    """
    if tp.size == 1:
        return
    paths = [path for path, _ in model.named_modules()]
    owners = {path for path, module in model.named_modules() if list(module.parameters(recurse=False))}
    for pattern, rule in TABLE:
        for path in fnmatch.filter(paths, pattern):
            rule(model, path, tp)
            owners.discard(path)
    if owners:
        raise ValueError(f"parallel.sharding has no row for {', '.join(sorted(owners))}")


def _column(model: EncoderDecoder, path: str, tp: TensorParallel) -> None:
    """A linear map whose outputs are shared out."""
    model.set_submodule(path, ColumnLinear(cast("nn.Linear", model.get_submodule(path)), tp))


def _row(model: EncoderDecoder, path: str, tp: TensorParallel) -> None:
    """A linear map whose inputs are shared out."""
    model.set_submodule(path, RowLinear(cast("nn.Linear", model.get_submodule(path)), tp))


def _keys_values(model: EncoderDecoder, path: str, tp: TensorParallel) -> None:
    """As `_column`, where there is a key-value head for each rank; else every rank computes the one that it needs."""
    whole = cast("nn.Linear", model.get_submodule(path))
    attention = cast("MultiHeadAttention", model.get_submodule(path.rpartition(".")[0]))
    n_heads = whole.out_features // attention.head_dim
    if n_heads % tp.size == 0:
        _column(model, path, tp)
        return
    head = tp.rank * n_heads // tp.size
    rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
    model.set_submodule(path, ColumnLinear(whole, tp, rows))


def _attention(model: EncoderDecoder, path: str, tp: TensorParallel) -> None:
    """Each rank has some query heads, and the key-value heads that they read."""
    attention = cast("MultiHeadAttention", model.get_submodule(path))
    attention.n_heads //= tp.size
    attention.n_groups = min(attention.n_groups, attention.n_heads)
    _draws(model, path, tp)


def _draws(model: EncoderDecoder, path: str, tp: TensorParallel) -> None:
    """Draws random numbers about what is this rank's alone."""
    draw_apart(model.get_submodule(path), tp)


def _vocabulary(model: EncoderDecoder, path: str, tp: TensorParallel) -> None:
    """An embedding whose tokens are shared out."""
    model.set_submodule(path, VocabularyEmbedding(cast("Embedding", model.get_submodule(path)), tp))


def _own_input(model: EncoderDecoder, path: str, tp: TensorParallel) -> None:
    """A stack's input, of which each rank has some positions with sequence parallelism."""
    model.set_submodule(path, OwnInput(cast("StackInput", model.get_submodule(path)), tp))


def _bias_heads(model: EncoderDecoder, path: str, tp: TensorParallel) -> None:
    """T5's bias on scores: each rank has its heads' columns."""
    bias = cast("RelativeBias", model.get_submodule(path))
    bias.weight = cut_parameter(bias.weight, 1, tp)


def _heads_norm(model: EncoderDecoder, path: str, tp: TensorParallel) -> None:
    """A gain that all heads share, and each rank uses on its own heads."""
    _mark(model.get_submodule(path).parameters(recurse=False))


def _on_positions(model: EncoderDecoder, path: str, tp: TensorParallel) -> None:
    """Used outside the shared parts: on a part of the positions with sequence parallelism, else on all of them."""
    if tp.sequence:
        _mark(model.get_submodule(path).parameters(recurse=False))


def _mark(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        set_partial_gradient(parameter)


def _project(*names: str) -> Rule:
    """Where these neighbours (those that there are) read their common input."""

    def rule(model: EncoderDecoder, path: str, tp: TensorParallel) -> None:
        parent = model.get_submodule(path.rpartition(".")[0])
        maps = [cast("ColumnLinear", getattr(parent, name)) for name in names if getattr(parent, name)]
        model.set_submodule(path, ColumnProject(tp, maps))

    return rule


def _enter(model: EncoderDecoder, path: str, tp: TensorParallel) -> None:
    """Where what every rank needs as a whole is gathered, once for all that read it."""
    model.set_submodule(path, Enter(tp))


TABLE: tuple[tuple[str, Rule], ...] = (
    ("*_embedding", _vocabulary),
    ("*coder.input", _own_input),
    ("*coder.input.learned", _on_positions),
    ("*coder.input.norm", _on_positions),
    ("*coder.relative_bias", _bias_heads),
    ("*_attention.q_proj", _column),
    ("*_attention.[kv]_proj", _keys_values),
    ("*_attention.[qk]_norm", _heads_norm),
    ("*_attention.o_proj", _row),
    ("*.self_attention.project", _project("q_proj", "k_proj", "v_proj")),
    ("*.cross_attention.project", _project("q_proj")),
    ("*_attention", _attention),
    ("*.feed_forward.up", _column),
    ("*.feed_forward.gate", _column),
    ("*.feed_forward.down", _row),
    ("*.feed_forward.project", _project("gate", "up")),
    ("*.feed_forward", _draws),
    ("*_residual.norm", _on_positions),
    ("*coder.final_norm", _on_positions),
    ("decoder.memory_input", _enter),
    ("decoder.output_input", _enter),
    ("output", _column),
)
"""Path of a module (with wildcards) to what becomes of it; applied from top to bottom."""


def place(empty: nn.Parameter, value: Tensor, tp: TensorParallel) -> nn.Parameter:
    """A parameter of a sharded model with its value, in place of the one on the meta device.

    A replica whose gradient is a part of a sum gets the sum from autograd itself, before anything else (such as
    ZeRO's hooks) sees it.

    Args:
        value: this rank's part.
    """
    parameter = nn.Parameter(value, requires_grad=empty.requires_grad)
    partition = partition_of(empty)
    if partition is not None:
        set_partition(parameter, partition)
    if has_partial_gradient(empty):
        set_partial_gradient(parameter)
        parameter.register_hook(tp.all_reduce)  # type: ignore[no-untyped-call]
    return parameter


def gather_whole(part: Tensor, partition: Partition | None, tp: TensorParallel) -> Tensor:
    """The whole of what ranks hold parts of, on every rank. A collective, if it is in parts."""
    if partition is None:
        return part
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(tp.size)]
    dist.all_gather(parts, part.contiguous(), group=tp.group)
    return torch.cat(parts, dim=partition.dim)


__all__ = ["TABLE", "Partition", "gather_whole", "partition_of", "place", "shard"]
