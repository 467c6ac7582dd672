"""How long a step takes, by a roofline: each operation is bound by arithmetic, by memory, or by the time it takes to
start it (Williams et al. 2009); collectives by the slowest link that they cross.
"""

from dataclasses import dataclass

import torch

from dist_transformer.config import Config
from dist_transformer.config.zero import zero_settings
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
    offload: float
    """What of copies to and from the host is not hidden."""
    update: float
    bound_by_host: float
    """Share of forward and backward in which the device waits for the next kernel."""

    @property
    def total(self) -> float:
        """All of it."""
        exchanges = self.tensor_parallel + self.data_parallel + self.offload
        return self.forward + self.backward + exchanges + self.update


_ADAM, _RMS_SCALED, _AVERAGE = 30.0, 120.0, 12.0
"""Bytes that an update reads and writes for an element: gradient, master weight, two moments and weight in one pass
(fused AdamW), in a dozen (`RMSScaledAdamW`); a moving average beside."""


def dtype_of(config: Config) -> torch.dtype:
    """What the model computes in."""
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


def micro_step_seconds(step: MicroStep, config: Config, cluster: Cluster, rates: Rates) -> MicroStepSeconds:
    """By each of its operations."""
    peak = cluster.gpu.peak_flops(dtype_of(config))
    flops = {"product": peak * rates.products, "attention": peak * rates.attention}
    bandwidth, link = cluster.gpu.bandwidth * rates.memory, cluster.gpu.link * rates.links
    tp_degree = config.parallel.tp_degree
    if cluster.nodes > 1 and cluster.gpus_per_node % tp_degree:  # then some group straddles two nodes
        link = min(link, cluster.network * rates.links)

    def seconds(kernel: Kernel) -> float:
        arithmetic = kernel.flops / flops[kernel.kind] if kernel.flops else 0.0
        return max(arithmetic, kernel.n_bytes / bandwidth, rates.kernel_s)

    device, host = [], []
    for is_backward in (False, True):
        kernels = [k for k in step.kernels if k.kind != "communication" and k.backward == is_backward]
        device.append(sum(map(seconds, kernels)))
        host.append(len(kernels) * rates.launch_s)
    share = (tp_degree - 1) / tp_degree
    sent = sum(share * k.n_bytes / link + rates.kernel_s for k in step.kernels if k.kind == "communication")
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
    forward, backward = micro.passes(stage, rates)
    return StepSeconds(
        forward=forward * n_micro_steps,
        backward=backward * n_micro_steps,
        tensor_parallel=micro.tensor_parallel * n_micro_steps,
        data_parallel=_data_parallel(forward, backward, n_parameters, n_micro_steps, config, cluster, rates),
        offload=_offload(forward, backward, own, n_micro_steps, config, cluster, rates),
        update=_update(own, config, cluster, rates),
        bound_by_host=1.0 - (micro.forward + micro.backward) / (forward + backward),
    )


def _update(own: float, config: Config, cluster: Cluster, rates: Rates) -> float:
    if config.parallel.offload != "none":
        return own * cluster.gpus_per_node / rates.cpu_adam
    per_element = _RMS_SCALED if config.optimizer.name == "adamw_rms" else _ADAM
    if config.train.ema_decay is not None:
        per_element += _AVERAGE
    return (per_element + 4.0) * own / (cluster.gpu.bandwidth * rates.memory)  # 4: the gradients' norm


def _offload(
    forward: float,
    backward: float,
    own: float,
    n_micro_steps: int,
    config: Config,
    cluster: Cluster,
    rates: Rates,
) -> float:
    """Copies to and from the host that no pass hides: gradients, updated weights, under offload=all weights anew."""
    if config.parallel.offload == "none":
        return 0.0
    weight = 2.0 if config.train.precision == "bf16" else 4.0
    host = cluster.gpu.host * rates.links
    one_way = weight * own / host
    if config.parallel.zero_stage < 3:
        adds_fp32 = config.train.precision == "bf16" and config.train.grad_accum_dtype == "fp32"
        if adds_fp32:  # Added up on the device, sent once.
            return 4.0 * own / host + one_way
        # To the host and, to be added to, back.
        return n_micro_steps * max(0.0, 2 * one_way - rates.hidden * backward) + one_way
    there, back = (one_way, 2 * one_way) if config.parallel.offload == "all" else (0.0, one_way)
    passes = max(0.0, there - rates.hidden * forward) + max(0.0, back - rates.hidden * backward)
    return n_micro_steps * passes + (0.0 if config.parallel.offload == "all" else one_way)


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
    stage, dp_size = parallel.zero_stage, cluster.n_gpus // parallel.tp_degree
    link = cluster.gpu.link
    if cluster.nodes > 1:  # The ring's ranks of a node share the network of all of them.
        link = min(link, cluster.network * max(1, cluster.gpus_per_node // parallel.tp_degree))
    settings = zero_settings(config, dp_size)
    weight = 2.0 if train.precision == "bf16" else 4.0

    def once(bytes_an_element: float) -> float:
        """All-gather or reduce-scatter of all parameters; an all-reduce is both."""
        return bytes_an_element * n_parameters * (dp_size - 1) / dp_size / (link * rates.links)

    # DeepSpeed adds up whole buckets in stages 1 and 2, and keeps of the sum what is the rank's.
    passes = 2.0 if stage < 3 and settings.get("use_multi_rank_bucket_allreduce", True) else 1.0
    if (
        stage == 0
    ):  # At the end of the last backward pass, as in stage 1 with sums in fp32: nothing is left to hide it.
        return 2 * once(weight)
    if stage == 1:
        adds_fp32 = train.precision == "bf16" and train.grad_accum_dtype == "fp32"
        reduce = 2 * once(4.0) if adds_fp32 else max(0.0, passes * once(weight) - rates.hidden * backward)
        return reduce + once(weight)
    reduce = passes * once(weight)
    if stage == 2:
        return n_micro_steps * max(0.0, reduce - rates.hidden * backward) + once(weight)
    # What is used again soon stays: a small model is gathered once for both passes.
    is_gathered_again = 2 * n_parameters > float(settings.get("stage3_max_reuse_distance", 1e9))
    in_backward = reduce + (once(weight) if is_gathered_again else 0.0)
    exposed = max(0.0, once(weight) - rates.hidden * forward) + max(
        0.0, in_backward - rates.hidden * backward
    )
    return n_micro_steps * exposed
