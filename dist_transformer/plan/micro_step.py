"""One micro-step of the real model on the meta device: no arithmetic, no memory, but every operation and every tensor.

What a rank would hold and compute is not estimated by formulas of its own: it is the model's code, with its sharding
and recomputation, that is run. Shapes alone are followed, as on a GPU: its fused kernels of attention, RMSNorm and
dropout are called in place of the plain formulas that meta would take.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dist_transformer.config import Config
from dist_transformer.data.batch import Batch
from dist_transformer.model import build_model
from dist_transformer.model.initialize import fill
from dist_transformer.parallel.objective import TrainingModule
from dist_transformer.parallel.recompute import apply_recompute
from dist_transformer.parallel.regions import TensorParallel
from dist_transformer.parallel.sharding import place, shard
from dist_transformer.plan.live_bytes import LiveBytes

Kind = Literal["product", "attention", "other", "communication"]
"""Matrix products; fused attention; what moves memory; what moves bytes between tensor-parallel ranks."""


@dataclass(frozen=True)
class Kernel:
    """One operation on the device."""

    kind: Kind
    flops: float
    n_bytes: float
    """Read and written; of communication, what a rank would send to very many others."""
    backward: bool
    """In the backward pass, recomputation included."""


@dataclass(frozen=True)
class MicroStep:
    """What one micro-step needs on one rank."""

    whole: int
    """Parameters of the whole model."""
    n_parameters: int
    """Of this rank's tensor-parallel part."""
    largest: int
    """Elements of the largest parameter."""
    n_modules: int
    """Modules with parameters of their own."""
    kept: int
    """Bytes of activations that are alive between the forward and the backward pass."""
    forward_peak: int
    """Most bytes alive in the forward pass, the loss included, beside weights and gradients."""
    backward_peak: int
    """The same in the backward pass."""
    kernels: tuple[Kernel, ...]


def run_micro_step(config: Config, n_rows: int) -> MicroStep:
    """Forward and backward of `n_rows` full rows on one rank of a tensor-parallel group.

    Args:
        config: with `model.vocab_size` known. FlexAttention and compiled layers are followed as torch's fused kernels
            without a compiler would do it: no more memory than that.
    """
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    with _ranks(config) as tp, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build_model(config.model)
        whole = sum(parameter.numel() for parameter in model.parameters())
        shard(model, tp)

        def build(_: str, empty: nn.Parameter) -> nn.Parameter:
            return place(empty, torch.empty(empty.shape, dtype=dtype, device="meta"), tp)

        fill(model, build)
        apply_recompute(model, config.recompute)
        module = TrainingModule(model, config.train, tp).train()
        parameters = list(module.parameters())
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(_take_gradient)  # type: ignore[no-untyped-call]
        rows = full_rows(config, n_rows, torch.device("meta"))
        with _fused_kernels(), Recorder("meta", known=parameters) as recorder:
            loss = module(rows)
            kept, forward_peak = recorder.now, recorder.peak
            recorder.backward, recorder.peak = True, kept
            loss.objective.backward()
    return MicroStep(
        whole=whole,
        n_parameters=sum(parameter.numel() for parameter in parameters),
        largest=max(parameter.numel() for parameter in parameters),
        n_modules=sum(1 for each in module.modules() if list(each.parameters(recurse=False))),
        kept=kept,
        forward_peak=forward_peak,
        backward_peak=recorder.peak,
        kernels=tuple(recorder.kernels),
    )


def full_rows(config: Config, n_rows: int, device: torch.device) -> Batch:
    """Rows without padding, one sample each."""

    def ones(length: int, dtype: torch.dtype) -> Tensor:
        return torch.ones(n_rows * samples_of_row(config), length, dtype=dtype, device=device)

    source, target = config.data.max_source_len, config.data.max_target_len
    return Batch(
        encoder_input_tokens=ones(source, torch.int64),
        encoder_segment_ids=ones(source, torch.int32),
        encoder_positions=ones(source, torch.int32),
        decoder_input_tokens=ones(target, torch.int64),
        decoder_target_tokens=ones(target, torch.int64),
        decoder_segment_ids=ones(target, torch.int32),
        decoder_positions=ones(target, torch.int32),
    )


def samples_of_row(config: Config) -> int:
    """Rows of full length that one row of the global batch stands for: a bucket is several (`data.bucket_tokens`)."""
    data = config.data
    return (
        1
        if data.bucket_tokens is None
        else data.bucket_tokens // max(data.max_source_len, data.max_target_len)
    )


def _take_gradient(parameter: Tensor) -> None:
    """As ZeRO does: what becomes of gradients is counted elsewhere."""
    parameter.grad = None


@contextlib.contextmanager
def _ranks(config: Config) -> Iterator[TensorParallel]:
    """A tensor-parallel group as its first rank sees it; the others are not there, and nothing is sent."""
    size = config.parallel.tp_degree
    if size == 1:
        yield TensorParallel(cast("dist.ProcessGroup", None), 0, 1, sequence=False)
        return
    import torch.distributed._tools.fake_collectives  # noqa: F401 - collectives on meta
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        group = dist.group.WORLD
        assert group is not None
        yield TensorParallel(group, 0, size, config.parallel.sequence_parallel)
    finally:
        dist.destroy_process_group()


class Recorder(LiveBytes):  # type: ignore[no-untyped-call]
    """Every operation's arithmetic and traffic, and all bytes that are alive."""

    def __init__(self, device: str, **options: Any) -> None:
        super().__init__(device, **options)
        self.kernels: list[Kernel] = []
        self.backward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        kernel = _kernel(func, args, kwargs or {}, result)
        if kernel is not None:
            self.kernels.append(replace(kernel, backward=self.backward))
        return result


def _kernel(func: Any, args: Any, kwargs: Any, result: Any) -> Kernel | None:
    """What an operation costs; None: nothing, as a view or memory that is not written."""
    name = func.overloadpacket.__name__
    # In place, a product costs what it costs elsewhere.
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    if func.namespace == "c10d":
        # A gather or scatter sends all but its own part of the larger of its tensors, a sum is one of each.
        passes = 2.0 if "allreduce" in name else 1.0
        return Kernel("communication", 0.0, passes * max(map(_bytes, inputs)), False)
    outputs = [x for x in outputs if x.is_meta]  # What the host computes, such as tables, is no kernel.
    if name in _UNWRITTEN or not outputs:
        return None
    if not func._schema.is_mutable and _are_views(inputs, outputs):
        return None
    if name in _SPARSE:
        whole = inputs[0].untyped_storage()
        n_bytes = 2.0 * max(_bytes(x) for x in [*inputs[1:], *outputs] if x.untyped_storage() is not whole)
    elif name in _WRITTEN_ONLY:
        n_bytes = float(sum(map(_bytes, inputs[1:]))) + _bytes(outputs[0])
    else:
        n_bytes = float(sum(map(_bytes, [*inputs, *outputs])))
    if packet not in flop_registry:
        return Kernel("other", 0.0, n_bytes, False)
    flops = float(flop_registry[packet](*args, **kwargs, out_val=result))
    return Kernel("attention" if "attention" in name else "product", flops, n_bytes, False)


_UNWRITTEN = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
_WRITTEN_ONLY = {"copy_", "zero_", "fill_"}
"""Their first argument is not read."""
_SPARSE = {"gather", "index", "embedding", "index_put_", "scatter_"}
"""They touch some elements of their first argument only: as many as the largest of the others has."""


def _are_views(inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    storages = [x.untyped_storage() for x in inputs]
    return all(any(y.untyped_storage() is storage for storage in storages) for y in outputs)


def _bytes(x: Tensor) -> int:
    """What is read or written of a tensor; what a broadcast repeats, once."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


@contextlib.contextmanager
def _fused_kernels() -> Iterator[None]:
    """CUDA's fused kernels where the meta device would take their formulas apart.

    In place of torch's functions: a mode that catches calls of them would be off while layers are recomputed.
    """
    plain = {name: getattr(F, name) for name in _FUSED}
    try:
        for name, fused in _FUSED.items():
            setattr(F, name, fused)
        yield
    finally:
        for name, function in plain.items():
            setattr(F, name, function)


_ALIGNED = 8
"""Elements: rows of a mask must begin at multiples of so many for CUDA's fused attention."""


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    if attn_mask is not None:
        if any(
            stride % _ALIGNED for stride in attn_mask.stride()[:-1]
        ):  # the kernel then makes a copy of its own
            attn_mask = F.pad(attn_mask, (0, -k.shape[2] % _ALIGNED))[..., : k.shape[2]]
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    return cast(
        "Tensor",
        torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, attn_mask, torch.is_grad_enabled(), dropout_p, False, scale=scale
        )[0],
    )


def _rms_norm(
    x: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Layer norm's kernel, which reads, writes and keeps the same (and a mean a row): meta has none of RMSNorm's."""
    return torch.native_layer_norm(x, normalized_shape, weight, None, eps or 0.0)[0]


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p else x


_FUSED: dict[str, Callable[..., Tensor]] = {
    "scaled_dot_product_attention": _attention,
    "rms_norm": _rms_norm,
    "dropout": _dropout,
}
