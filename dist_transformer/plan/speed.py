"""How long a step takes, by a roofline: each operation is bound by arithmetic, by memory, or by the time it takes to
start it (Williams et al. 2009); collectives by the slowest link that they cross.
"""

from dataclasses import dataclass

import torch

from dist_transformer.config import Config
from dist_transformer.plan.devices import Gpu, Rates
from dist_transformer.plan.micro_step import Kernel, MicroStep


@dataclass(frozen=True)
class Cluster:
    """What a run gets."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu
    network: float
    """Bytes a second of each GPU's share of its node's network, in one direction."""

    @property
    def n_gpus(self) -> int:
        """All of them: one rank each."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class MicroStepSeconds:
    """One micro-step on one rank: what the device needs, and what the host needs to tell it, side by side."""

    forward: float
    backward: float
    forward_host: float
    backward_host: float
    tensor_parallel: float
    """Waiting for the ranks that share a layer, in both passes; nothing is assumed to be hidden."""
    n_modules: float
    """At each of which DeepSpeed's hooks may stop."""

    def passes(self, zero_stage: int, rates: Rates) -> tuple[float, float]:
        """Forward and backward: the device's time, or the host's where that is more."""
        before, after = 0.0, rates.zero_2_hook_s if zero_stage == 2 else 0.0
        if zero_stage == 3:
            before = after = rates.zero_3_hooks_s / 2
        return (
            max(self.forward, self.forward_host + before * self.n_modules),
            max(self.backward, self.backward_host + after * self.n_modules),
        )


@dataclass(frozen=True)
class StepSeconds:
    """One update, by where its time goes."""

    forward: float
    backward: float
    tensor_parallel: float
    data_parallel: float
    """What of gradients' and weights' exchange is not hidden behind computing."""
    update: float
    bound_by_host: float
    """Share of forward and backward in which the device waits for the next kernel."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.forward + self.backward + self.tensor_parallel + self.data_parallel + self.update


_HIDDEN = 0.8
"""Share of computing behind which communication is hidden, where DeepSpeed overlaps the two."""
_CPU_ADAM = 1.0e9
"""Elements a second that a node's processors update, with offloaded optimizer states."""
_PCIE = 25e9
_ELEMENT = 30.0
"""Bytes that a fused AdamW reads and writes for an element: gradient, master weight, two moments, weight."""


def dtype_of(config: Config) -> torch.dtype:
    """What the model computes in."""
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


def micro_step_seconds(step: MicroStep, config: Config, cluster: Cluster, rates: Rates) -> MicroStepSeconds:
    """By each of its operations."""
    peak = cluster.gpu.peak_flops(dtype_of(config))
    flops = {"product": peak * rates.products, "attention": peak * rates.attention}
    bandwidth, link = cluster.gpu.bandwidth * rates.memory, cluster.gpu.link * rates.links
    if config.parallel.tp_degree > cluster.gpus_per_node:
        link = cluster.network * rates.links

    def seconds(kernel: Kernel) -> float:
        arithmetic = kernel.flops / flops[kernel.kind] if kernel.flops else 0.0
        return max(arithmetic, kernel.n_bytes / bandwidth, rates.kernel_s)

    device, host = [], []
    for is_backward in (False, True):
        kernels = [k for k in step.kernels if k.kind != "communication" and k.backward == is_backward]
        device.append(sum(map(seconds, kernels)))
        host.append(len(kernels) * rates.launch_s)
    sent = sum(k.n_bytes / link + rates.kernel_s for k in step.kernels if k.kind == "communication")
    return MicroStepSeconds(device[0], device[1], host[0], host[1], sent, step.n_modules)


def step_seconds(
    micro: MicroStepSeconds,
    n_parameters: int,
    n_micro_steps: int,
    config: Config,
    cluster: Cluster,
    rates: Rates,
) -> StepSeconds:
    """One update of `n_micro_steps` micro-steps.

    Args:
        n_parameters: of a rank's tensor-parallel part.
    """
    parallel = config.parallel
    dp_size = cluster.n_gpus // parallel.tp_degree
    stage, own = parallel.zero_stage, n_parameters / (dp_size if parallel.zero_stage else 1)
    factor = 2.0 if config.optimizer.name == "adamw_rms" else 1.0
    update = factor * _ELEMENT * own / (cluster.gpu.bandwidth * rates.memory)
    if parallel.offload != "none":
        update = own * cluster.gpus_per_node / _CPU_ADAM + 6.0 * own / _PCIE
    forward, backward = micro.passes(stage, rates)
    return StepSeconds(
        forward=forward * n_micro_steps,
        backward=backward * n_micro_steps,
        tensor_parallel=micro.tensor_parallel * n_micro_steps,
        data_parallel=_data_parallel(forward, backward, n_parameters, n_micro_steps, config, cluster, rates)
        if dp_size > 1
        else 0.0,
        update=update if stage else update + 4.0 * own / (cluster.gpu.bandwidth * rates.memory),
        bound_by_host=1.0 - (micro.forward + micro.backward) / (forward + backward),
    )


def _data_parallel(
    forward: float,
    backward: float,
    n_parameters: int,
    n_micro_steps: int,
    config: Config,
    cluster: Cluster,
    rates: Rates,
) -> float:
    parallel, train = config.parallel, config.train
    stage, tp = parallel.zero_stage, parallel.tp_degree
    dp_size = cluster.n_gpus // tp
    link = cluster.gpu.link
    if cluster.nodes > 1:  # The ring's ranks of a node share the network of all of them.
        link = min(link, cluster.network * max(1, cluster.gpus_per_node // tp))
    weight = 2.0 if train.precision == "bf16" else 4.0
    adds_fp32 = train.precision == "bf16" and train.grad_accum_dtype == "fp32"

    def once(bytes_an_element: float) -> float:
        """All-gather or reduce-scatter of all parameters; an all-reduce is both."""
        return bytes_an_element * n_parameters * (dp_size - 1) / dp_size / (link * rates.links)

    forward, backward = _HIDDEN * forward, _HIDDEN * backward
    if stage == 0:  # DeepSpeed reduces at the end of the last backward pass.
        return 2 * once(weight)
    if stage == 1:
        reduce = once(4.0) if adds_fp32 else max(0.0, once(weight) - backward)
        return reduce + once(weight)
    reduce = once(weight)
    if stage == 2:
        return n_micro_steps * max(0.0, reduce - backward) + once(weight)
    gathers = max(0.0, once(weight) - forward) + max(0.0, once(weight) + reduce - backward)
    return n_micro_steps * gathers
