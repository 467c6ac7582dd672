"""Ways to compute the attention of packed rows, each by itself: milliseconds, and error against fp32 arithmetic."""

import functools
import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_sections.measure import synchronize
from benchmarks.gpu_sections.ours import config_of
from benchmarks.gpu_sections.plan import Setting
from benchmarks.gpu_sections.rows import Pool
from benchmarks.gpu_sections.task import Task, UnavailableError, first_line
from dist_transformer.model.attention import may_attend, scores_mask

ROWS, TINY_ROWS = 32, 2
MARGIN_S = 8.0
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries [B, H, T, K], keys and values [B, H, S, K] to heads [B, H, T, K]."""


@dataclass(frozen=True)
class Case:
    """One of the three attentions of a layer, on rows that hold several samples."""

    name: str
    queries: Tensor
    """[B, T] segment ids."""
    keys: Tensor
    """[B, S] segment ids."""
    causal: bool
    n_heads: int
    head_dim: int

    @property
    def allowed(self) -> Tensor:
        """The model's own mask, [B, 1, T, S]."""
        return may_attend(self.queries, self.keys, self.causal)

    @functools.cached_property
    def biases(self) -> Tensor:
        """A learned bias for each head and each distance of a key from a query, [H, T + S - 1]."""
        n_distances = self.queries.shape[1] + self.keys.shape[1] - 1
        generator = torch.Generator().manual_seed(5)
        bias = torch.randn(self.n_heads, n_distances, generator=generator)
        return bias.to(self.queries.device).requires_grad_()

    def bias(self) -> Tensor:
        """The same as a bias on scores, [1, H, T, S]; keeps the graph to the learned one."""
        n_queries, n_keys = self.queries.shape[1], self.keys.shape[1]
        device = self.queries.device
        query_T, key_S = torch.arange(n_queries, device=device), torch.arange(n_keys, device=device)
        return self.biases[:, key_S[None, :] - query_T[:, None] + n_queries - 1][None]


def reference(case: Case, biased: bool) -> Attend:
    """Scores, softmax and weighted sum, as they stand in the paper."""
    allowed = case.allowed

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q.float() @ k.float().transpose(-1, -2) / math.sqrt(case.head_dim)
        if biased:
            scores = scores + case.bias()
        return scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1) @ v.float()

    return attend


def sdpa_mask(case: Case) -> Attend:
    """What the model runs without a bias."""
    mask = scores_mask(case.allowed, None, torch.bfloat16)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))


def sdpa_boolean(case: Case) -> Attend:
    """The same, of which each call makes a mask to add."""
    allowed = case.allowed
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


def sdpa_bias(case: Case) -> Attend:
    """What the model runs with T5's bias, which learns."""
    allowed = case.allowed

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = scores_mask(allowed, case.bias().to(q.dtype), q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return attend


def sdpa_unmasked(case: Case) -> Attend:
    """Every pair, samples not kept apart: not the same function, but what the fastest kernel needs for whole rows."""
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v)


def flex(case: Case, biased: bool = False) -> Attend:
    """FlexAttention, which skips blocks in which no sample meets itself; compiled on a GPU.

    Raises:
        UnavailableError: if this torch has none.
    """
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError as error:
        raise UnavailableError(f"this torch has no FlexAttention: {error}") from None
    # Each case is a graph of its own, and of one function the compiler keeps only a few.
    torch.compiler.reset()
    queries_BT, keys_BS = case.queries, case.keys
    (n_rows, n_queries), n_keys, device = queries_BT.shape, keys_BS.shape[1], queries_BT.device

    def may(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed = (queries_BT[b, q] == keys_BS[b, k]) | (queries_BT[b, q] == 0)
        return allowed & (q >= k) if case.causal else allowed

    def add_bias(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + case.biases[h, k - q + n_queries - 1]

    mask = create_block_mask(may, n_rows, None, n_queries, n_keys, device=str(device))
    kernel: Any = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention
    modify = add_bias if biased else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads: Tensor = kernel(q, k, v, score_mod=modify, block_mask=mask)
        return heads

    return attend


def varlen(case: Case, packed: bool = False) -> Attend:
    """Flash attention over samples one behind the other, without padding or a mask.

    Args:
        packed: Take as many positions as there are tokens, as if they stood so: not the same function, but what it
            costs a model that keeps its activations in this form from the embedding on.

    Raises:
        UnavailableError: if this torch or this device has none.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise UnavailableError(f"this torch has no torch.nn.attention.varlen: {error}") from None
    if case.queries.device.type != "cuda":
        raise UnavailableError("torch.nn.attention.varlen needs a CUDA device")
    (ends_q, longest_q), (ends_k, longest_k) = map(_ends, (case.queries, case.keys))
    # Indices, and not a boolean mask, whose size the host would have to wait for.
    places_q, places_k = (
        torch.arange(int((x != 0).sum()), device=x.device) if packed else x.flatten().nonzero().flatten()
        for x in (case.queries, case.keys)
    )
    options: dict[str, Any] = {}
    if case.causal:
        # Renamed between versions.
        is_old = "is_causal" in inspect.signature(varlen_attn).parameters
        options = {"is_causal": True} if is_old else {"window_size": (-1, 0)}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows_q, rows_k, rows_v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        if packed:
            q_NHK, k_NHK, v_NHK = rows_q[: len(places_q)], rows_k[: len(places_k)], rows_v[: len(places_k)]
        else:
            q_NHK = rows_q.index_select(0, places_q)
            k_NHK, v_NHK = (x.index_select(0, places_k) for x in (rows_k, rows_v))
        heads_NHK: Any = varlen_attn(q_NHK, k_NHK, v_NHK, ends_q, ends_k, longest_q, longest_k, **options)
        heads = torch.zeros_like(rows_q).index_copy(0, places_q, heads_NHK)
        return heads.view(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)

    return attend


def _ends(segments_BT: Tensor) -> tuple[Tensor, int]:
    """Where samples begin and end when they stand one behind the other, int32, and the longest one's length."""
    n_segments = int(segments_BT.max())
    lengths = torch.stack([(segments_BT == n + 1).sum(dim=1) for n in range(n_segments)], dim=1).flatten()
    lengths = lengths[lengths > 0]
    return F.pad(lengths.cumsum(0), (1, 0)).int(), int(lengths.max())


KERNELS: dict[str, tuple[Callable[[Case], Attend], bool | None]] = {
    "sdpa, the model's mask": (sdpa_mask, False),
    "sdpa, boolean mask": (sdpa_boolean, False),
    "sdpa, T5 bias": (sdpa_bias, True),
    "flex, block mask": (flex, False),
    "flex, block mask and T5 bias": (functools.partial(flex, biased=True), True),
    "varlen, with packing and unpacking": (varlen, False),
    "varlen, packed before: a lower bound": (functools.partial(varlen, packed=True), None),
    "sdpa, no mask: a lower bound": (sdpa_unmasked, None),
}
"""Each with whether it has a bias; None: nothing to compare it with."""


def attention(task: Task) -> None:
    """Every kernel on the three attentions of a preset's layer."""
    setting, pool = task.setting, Pool(task.setting)
    rows = TINY_ROWS if setting.tiny else ROWS
    stack = config_of(setting, task.arguments["preset"], "none", 1, pool.vocab_size).model.stack("decoder")
    batch = pool.batches(rows, 1)[0].to(torch.device(setting.device))
    source, target = batch.encoder_segment_ids, batch.decoder_segment_ids
    task.add(preset=task.arguments["preset"], rows=rows, heads=stack.n_heads, head_dim=stack.head_dim)
    found: dict[str, dict[str, Any]] = {}
    for name, queries, keys, causal in (
        ("encoder", source, source, False), ("decoder", target, target, True), ("cross", target, source, False),
    ):  # fmt: skip
        case = Case(name, queries, keys, causal, stack.n_heads, stack.head_dim)
        found[name] = {}
        for kernel, (build, biased) in KERNELS.items():
            if task.time_left() < MARGIN_S:
                found[name][kernel] = {"why_not": "the section's time is over"}
                continue
            if biased and name == "cross":
                found[name][kernel] = {"why_not": "T5 has no bias in cross-attention"}
                continue
            try:
                found[name][kernel] = _measure(setting, case, build(case), biased)
            except Exception as error:  # an unsupported kernel must not end the others
                why = str(error) if isinstance(error, UnavailableError) else first_line(error)
                found[name][kernel] = {"why_not": why}
            task.add(cases=found)
    task.add(cases=found)


def _measure(setting: Setting, case: Case, attend: Attend, biased: bool | None) -> dict[str, Any]:
    """Milliseconds forward and with the backward pass, and the largest errors of heads and gradients."""
    generator = torch.Generator().manual_seed(7)
    (n_rows, n_queries), n_keys = case.queries.shape, case.keys.shape[1]
    lengths = (n_queries, n_keys, n_keys, n_queries)
    # As the model has them: positions first in memory, heads second.
    q, k, v, out_grad = (
        torch.randn(n_rows, length, case.n_heads, case.head_dim, generator=generator)
        .to(device=setting.device, dtype=torch.bfloat16)
        .transpose(1, 2)
        for length in lengths
    )
    # What a query on padding gives is used nowhere.
    is_query = (case.queries != 0)[:, None, :, None]
    out_grad = out_grad * is_query

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(q, k, v) * is_query

    def both(attend: Attend = attend) -> list[Tensor]:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        heads = attend(*inputs)
        learned = [case.biases] if biased else []
        gradients = torch.autograd.grad(heads, [*inputs, *learned], out_grad.to(heads.dtype))
        return [heads.detach() * is_query, *gradients]

    found: dict[str, Any] = {"forward_ms": 1e3 * _seconds(setting, forward)}
    try:
        actual = both()
        found["forward_backward_ms"] = 1e3 * _seconds(setting, both)
    except NotImplementedError as error:
        actual, found["no_backward"] = [forward()], str(error).split(".")[0]
    if biased is not None:
        names = ("heads", "queries", "keys", "values", "bias")
        found["relative_error"] = {
            name: float((x.float() - y).abs().max() / y.abs().max())
            for name, x, y in zip(names, actual, both(reference(case, biased)), strict=False)
        }
    if setting.device == "cuda":
        found["kernels"] = _kernel_names(both if "forward_backward_ms" in found else forward)
    return found


def _seconds(setting: Setting, action: Callable[[], Any]) -> float:
    """Of one call, after a first one that may compile."""
    for _ in range(2):
        began = time.perf_counter()
        action()
        synchronize(setting)
        took = time.perf_counter() - began
    n = max(1, min(100, int((0.01 if setting.tiny else 0.15) / took)))
    began = time.perf_counter()
    for _ in range(n):
        action()
    synchronize(setting)
    return (time.perf_counter() - began) / n


def _kernel_names(action: Callable[[], Any]) -> list[str]:
    """The three dearest kernels of a call: which of its backends SDPA has chosen."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        action()
        torch.cuda.synchronize()
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)
    return [row.key[:100] for row in rows[:3]]
