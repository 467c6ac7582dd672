"""A plan for people, and for programs."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from dist_transformer.config import Config
from dist_transformer.plan.micro_step import samples_of_row
from dist_transformer.plan.planner import GIB, Plan
from dist_transformer.plan.search import layout_of


def describe(plan: Plan) -> list[str]:
    """The layout, its memory and its time, a table each."""
    memory, states = plan.memory, plan.memory.states
    lines: list[str | None] = [
        headline(plan),
        "",
        "memory of one GPU                                   GiB",
        _row("weights", states.weights),
        _row("  gathered for computing (ZeRO 3)", states.gathered),
        _row("gradients", states.gradients),
        _row("optimizer states", states.optimizer),
        _row(
            "gradients on their way (ZeRO buckets)",
            memory.step - memory.activations - _unbucketed(plan),
        ),
        _row("activations, at the moment that needs most", memory.activations),
        _row("more, while the optimizer works", max(0.0, memory.update - memory.step)),
        _row("CUDA, NCCL, fragments (assumed)", memory.reserved),
        f"{'together':<48}{memory.total / GIB:>8.2f} of {memory.available / GIB:.1f}: {verdict(plan)}",
        _row("CPU memory of a node, offloaded", plan.host_bytes),
        "",
        "time of one step, estimated                          ms",
    ]
    time = plan.time
    lines += [
        _milliseconds("forward", time.forward),
        _milliseconds("backward", time.backward),
        _milliseconds("exchange between tensor-parallel ranks", time.tensor_parallel),
        _milliseconds("exchange between replicas, not hidden", time.data_parallel),
        _milliseconds("copies to and from the host, not hidden", time.offload),
        _milliseconds("update", time.update),
        _milliseconds("together", time.total),
    ]
    if plan.time.bound_by_host > 0.1:
        lines.append(_advice(plan))
    lines += _caveats(plan)
    lines += ["", outlook(plan)]
    return [line for line in lines if line is not None]


def _advice(plan: Plan) -> str:
    """Where the host is what a step waits for."""
    train, parallel = plan.config.train, plan.config.parallel
    remedies = [
        "a larger train.micro_batch_size" if plan.n_micro_steps > 1 else "a larger train.global_batch_size"
    ]
    if parallel.zero_stage > 1 and parallel.offload == "none" and plan.dp_size > 1:
        remedies.append("a lower ZeRO stage")
    elif not train.compile and parallel.tp_degree == 1 and parallel.zero_stage < 3:
        remedies.append("train.compile")
    return (
        f"In {100 * plan.time.bound_by_host:.0f} % of forward and backward the GPU would wait for Python to start the "
        f"next kernel: {' or '.join(remedies)} helps."
    )


def _caveats(plan: Plan) -> Iterator[str]:
    """What the tables do not know, or do not show."""
    train = plan.config.train
    left_out = ["train.compile"] if train.compile else []
    left_out += ["train.attention=flex"] if train.attention == "flex" else []
    if left_out:
        yield f"Planned as if {' and '.join(left_out)} were off: that has not been run on a GPU yet."
    adds_bf16 = train.precision == "bf16" and train.grad_accum_dtype == "fp32" and plan.n_micro_steps > 1
    if adds_bf16 and plan.config.parallel.zero_stage == 0:
        yield "ZeRO 0 adds micro-steps' gradients up in bf16, whatever train.grad_accum_dtype says."


def headline(plan: Plan) -> str:
    """What is planned."""
    config, cluster = plan.config, plan.cluster
    data, parallel, recompute = config.data, config.parallel, config.recompute
    batch = f"{config.train.micro_batch_size} x {plan.n_micro_steps} micro-steps"
    rows = "rows"
    if data.bucket_tokens:
        rows = f"buckets (of up to {samples_of_row(config)} samples of full length)"
    parts = [
        f"{plan.n_parameters / 1e6:,.1f} M parameters",
        config.train.precision,
        f"rows of {data.max_source_len} + {data.max_target_len}",
        f"on {cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}: dp {plan.dp_size} x tp {parallel.tp_degree}",
        f"ZeRO {parallel.zero_stage}",
        *([f"offload {parallel.offload}"] if parallel.offload != "none" else []),
        f"recompute {recompute.encoder}/{recompute.decoder}",
        f"{config.train.global_batch_size:,} {rows} a step = {plan.dp_size} x {batch}",
    ]
    return ", ".join(parts)


def verdict(plan: Plan) -> str:
    """Fits, or by how much not."""
    memory = plan.memory
    if memory.fits:
        return f"fits, {(memory.available - memory.total) / GIB:.1f} left"
    return f"does not fit, {(memory.total - memory.available) / GIB:.1f} too much"


def outlook(plan: Plan) -> str:
    """Speed and length of the whole run."""
    tokens = "tokens/s" if plan.is_packed else "positions/s (padding is not known)"
    return (
        f"about {_three_digits(plan.tokens_per_s)} {tokens} of both sides, MFU {100 * plan.mfu:.0f} %, "
        f"{plan.config.train.steps:,} steps in {duration(plan.run_seconds)} "
        f"({_three_digits(plan.run_seconds / 3600 * plan.cluster.n_gpus)} GPU hours), evaluations and saves not counted"
    )


def duration(seconds: float) -> str:
    """`3 d 4 h`, `5 h 20 min`, `12 min`, `40 s`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    days, hours = divmod(minutes // 60, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"


def table(plans: Sequence[Plan], given: Config) -> list[str]:
    """One layout a line, with what to type for it over the given configuration."""
    kept = set(layout_of(given).split())
    lines = ["   GiB   step s    tokens/s   MFU   layout"]
    lines += [
        f"{plan.memory.total / GIB:>6.1f} {plan.time.total:>8.3f} {_three_digits(plan.tokens_per_s):>11} "
        f"{100 * plan.mfu:>4.0f} %"
        f"   {' '.join(part for part in layout_of(plan.config).split() if part not in kept) or '(as it is)'}"
        for plan in plans
    ]
    return lines


def as_json(plan: Plan) -> dict[str, Any]:
    """Bytes and seconds."""
    seconds = asdict(plan.time)
    del seconds["bound_by_host"]
    return {
        "layout": layout_of(plan.config),
        "nodes": plan.cluster.nodes,
        "gpus_per_node": plan.cluster.gpus_per_node,
        "gpu": plan.cluster.gpu.name,
        "dp_size": plan.dp_size,
        "micro_steps": plan.n_micro_steps,
        "n_parameters": plan.n_parameters,
        "fits": plan.memory.fits,
        "memory_bytes": {
            "weights": plan.memory.states.weights,
            "gathered": plan.memory.states.gathered,
            "gradients": plan.memory.states.gradients,
            "optimizer": plan.memory.states.optimizer,
            "buckets": plan.memory.step - plan.memory.activations - _unbucketed(plan),
            "activations": plan.memory.activations,
            "step": plan.memory.step,
            "update": plan.memory.update,
            "reserved": plan.memory.reserved,
            "total": plan.memory.total,
            "available": plan.memory.available,
        },
        "host_bytes": plan.host_bytes,
        "step_seconds": {**seconds, "total": plan.time.total},
        "bound_by_host": plan.time.bound_by_host,
        "tokens_per_s": plan.tokens_per_s,
        "mfu_pct": 100 * plan.mfu,
        "run_seconds": plan.run_seconds,
    }


def _three_digits(x: float) -> str:
    """As many as an estimate has at most."""
    return f"{float(f'{x:.3g}'):,.{2 if x < 1 else 1 if x < 100 else 0}f}"


def _unbucketed(plan: Plan) -> float:
    """All states but gradients on their way."""
    states = plan.memory.states
    return states.weights + states.gathered + states.gradients + states.optimizer


def _row(name: str, n_bytes: float) -> str | None:
    return f"{name:<48}{n_bytes / GIB:>8.2f}" if n_bytes else None


def _milliseconds(name: str, seconds: float) -> str | None:
    return f"{name:<48}{1e3 * seconds:>8.1f}" if seconds else None
