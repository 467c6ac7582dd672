"""Does a run fit, and how fast will it be: one layout, or the best of many."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from dist_transformer.config import Config, build_config
from dist_transformer.config.layout import data_parallel_size, grad_accum_steps
from dist_transformer.data.check import PACKED_FILL
from dist_transformer.data.manifest import load_manifest
from dist_transformer.errors import ConfigError
from dist_transformer.model.flops import Work, training_flops
from dist_transformer.plan.devices import Rates
from dist_transformer.plan.micro_step import run_micro_step
from dist_transformer.plan.speed import (
    Cluster,
    MicroStepSeconds,
    StepSeconds,
    dtype_of,
    micro_step_seconds,
    step_seconds,
)
from dist_transformer.plan.states import StateBytes, offloaded_bytes, plan_states

GIB = 2.0**30
USUAL_VOCABULARY = 32128
"""T5's, where the shards are not here to say."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at the moment that needs most."""

    states: StateBytes
    activations: float
    """Most bytes of a micro-step beside the states, ZeRO's buckets not counted."""
    buckets: float
    """What those that are not always there add to that moment."""
    reserved: float
    """CUDA, NCCL and what the allocator cannot use: an assumption."""
    available: float

    @property
    def step(self) -> float:
        """The most in forward and backward."""
        return self.states.total + self.activations + self.buckets

    @property
    def update(self) -> float:
        """While the optimizer works."""
        return self.states.update

    @property
    def total(self) -> float:
        """The most, with what is reserved."""
        return max(self.step, self.update) + self.reserved

    @property
    def fits(self) -> bool:
        """Whether the GPU has as much."""
        return self.total <= self.available


@dataclass(frozen=True)
class Plan:
    """One layout of a run on a cluster."""

    config: Config
    cluster: Cluster
    n_parameters: int
    """Of the whole model."""
    dp_size: int
    n_micro_steps: int
    memory: Memory
    host_bytes: float
    """CPU memory of a node for what is offloaded."""
    time: StepSeconds

    @property
    def tokens_per_s(self) -> float:
        """Real tokens of both sides, all ranks, of rows as full as packing usually makes them."""
        rows, data = self.config.train.global_batch_size, self.config.data
        return PACKED_FILL * rows * (data.max_source_len + data.max_target_len) / self.time.total

    @property
    def mfu(self) -> float:
        """Model FLOPs over the data sheet's peak, of full rows of one sample each."""
        rows, data = self.config.train.global_batch_size, self.config.data
        source, target = data.max_source_len, data.max_target_len
        work = Work(
            rows * source,
            rows * target,
            rows * source**2,
            rows * target * (target + 1) // 2,
            rows * source * target,
        )
        peak = self.cluster.n_gpus * self.cluster.gpu.peak_flops(dtype_of(self.config))
        return PACKED_FILL * training_flops(self.config.model, work) / (self.time.total * peak)

    @property
    def run_seconds(self) -> float:
        """All steps, without evaluations and saves."""
        return self.config.train.steps * self.time.total


def known_vocabulary(config: Config) -> tuple[Config, str]:
    """The configuration with a vocabulary, and where its size is from."""
    if config.model.vocab_size is not None:
        return config, "model.vocab_size"
    corpus = config.data.corpora()[0].train
    if Path(corpus).is_dir():
        n_tokens, source = load_manifest(corpus).vocab_size, f"the tokenizer of {corpus}"
    else:
        n_tokens, source = (
            USUAL_VOCABULARY,
            f"assumed, for {corpus} is not a folder here: set model.vocab_size",
        )
    unit = config.model.pad_vocab_to
    size = -(-n_tokens // unit) * unit
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})}), source


@dataclass(frozen=True)
class Measure:
    """What the model's own code says about a micro-step, without its operations."""

    whole: int
    n_parameters: int
    largest: int
    forward_peak: float
    backward_peak: float
    seconds: MicroStepSeconds


class Planner:
    """Plans layouts of one run; the model is run once for each way to cut and recompute it.

    Args:
        config: with its vocabulary known.
        reserved: bytes of a GPU for CUDA, NCCL and fragmentation; None: 1.5 GiB and 5 % of the activations.
    """

    def __init__(
        self, config: Config, cluster: Cluster, rates: Rates | None = None, reserved: float | None = None
    ) -> None:
        self.config, self.cluster, self.rates = config, cluster, rates or Rates()
        self.reserved = reserved
        self._measured: dict[tuple[object, ...], Measure] = {}

    def plan(self, config: Config | None = None) -> Plan:
        """Memory and time of one layout.

        Raises:
            ConfigError: if ranks and batch sizes do not fit together.
        """
        config = config or self.config
        grad_accum_steps(
            config, data_parallel_size(self.cluster.n_gpus, config.parallel.tp_degree)
        )  # or say why not
        return self._plan(config, self._measure(config))

    def search(self, n_best: int = 8, say: Callable[[str], None] = lambda _: None) -> list[Plan]:
        """The fastest layouts that fit, fastest first: micro-batch, recomputation, tensor parallelism, ZeRO stage.

        Two micro-batches of each way to cut and recompute the model tell of all the others (memory and time are nearly
        straight lines); those that look best are then run themselves.

        Args:
            say: told what is being looked at.
        """
        rough: list[Plan] = []
        for tp_degree in _degrees(self.config, self.cluster):
            if rough and tp_degree > max(2, self.config.parallel.tp_degree):
                break  # More is slower, and only helps where nothing fits.
            for policy in ("none", "selective", "full"):
                overrides = [
                    f"parallel.tp_degree={tp_degree}", f"recompute.encoder={policy}", f"recompute.decoder={policy}",
                ]  # fmt: skip
                say(" ".join(overrides))
                rough += [plan for plan in self._sizes_and_stages(overrides) if plan.memory.fits]
        rough.sort(key=lambda plan: plan.time.total)
        best = []
        for plan in rough[: 2 * n_best]:
            say(f"checking {layout_of(plan.config)}")
            exact = self.plan(plan.config)
            if exact.memory.fits:
                best.append(exact)
        return sorted(best, key=lambda plan: plan.time.total)[:n_best]

    def _sizes_and_stages(self, overrides: list[str]) -> Iterator[Plan]:
        """A plan for each micro-batch and stage that there can be, from two measured micro-batches."""
        low, high = _LOOKED_AT
        try:
            less, more = (
                self._measure(self._variant([*overrides, *_one_update(rows)])) for rows in _LOOKED_AT
            )
        except ConfigError:
            return  # this way to cut or recompute does not go with the run
        stages = [0, 1, 2, 3] if self.config.parallel.offload == "none" else [self.config.parallel.zero_stage]
        n_rows = 1
        while n_rows <= self.config.train.global_batch_size:
            at = (n_rows - low) / (high - low)
            for stage in stages:
                with contextlib.suppress(ConfigError):
                    config = self._variant(
                        [*overrides, f"train.micro_batch_size={n_rows}", f"parallel.zero_stage={stage}"]
                    )
                    yield self._plan(config, _between(less, more, at))
            n_rows *= 2

    def _variant(self, overrides: Sequence[str]) -> Config:
        return build_config(self.config.model_dump(mode="json"), overrides=overrides)

    def _plan(self, config: Config, measured: Measure) -> Plan:
        dp_size = data_parallel_size(self.cluster.n_gpus, config.parallel.tp_degree)
        n_micro_steps = grad_accum_steps(config, dp_size)
        states = plan_states(config, measured.n_parameters, measured.largest, dp_size)
        without = max(measured.forward_peak, measured.backward_peak)
        most = states.with_activations(measured.forward_peak, measured.backward_peak)
        memory = Memory(
            states, without, most - without,
            reserved=1.5 * GIB + 0.05 * without if self.reserved is None else self.reserved,
            available=self.cluster.gpu.memory_gib * GIB,
        )  # fmt: skip
        time = step_seconds(
            measured.seconds, measured.n_parameters, n_micro_steps, config, self.cluster, self.rates
        )
        return Plan(
            config, self.cluster, measured.whole, dp_size, n_micro_steps, memory,
            self.cluster.gpus_per_node * offloaded_bytes(config, measured.n_parameters, dp_size),
            time,
        )  # fmt: skip

    def _measure(self, config: Config) -> Measure:
        key = (config.parallel.tp_degree, config.recompute, config.train.micro_batch_size)
        if key not in self._measured:
            step = run_micro_step(config, config.train.micro_batch_size)
            seconds = micro_step_seconds(step, config, self.cluster, self.rates)
            self._measured[key] = Measure(
                step.whole, step.n_parameters, step.largest, step.forward_peak, step.backward_peak, seconds
            )
        return self._measured[key]


_LOOKED_AT = (4, 16)
"""Rows of the micro-batches that a search runs."""


def layout_of(config: Config) -> str:
    """What a search varies, as overrides."""
    values = {
        "train.micro_batch_size": config.train.micro_batch_size,
        "parallel.zero_stage": config.parallel.zero_stage,
        "parallel.tp_degree": config.parallel.tp_degree,
        "recompute.encoder": config.recompute.encoder,
        "recompute.decoder": config.recompute.decoder,
    }
    return " ".join(f"{key}={value}" for key, value in values.items())


def _one_update(n_rows: int) -> list[str]:
    """A batch of one micro-batch, so that any number of rows goes."""
    return [f"train.micro_batch_size={n_rows}", f"train.global_batch_size={n_rows}"]


def _degrees(config: Config, cluster: Cluster) -> list[int]:
    """Tensor parallelism within a node, and what the run has."""
    degrees = {1, config.parallel.tp_degree}
    degrees |= {n for n in (2, 4, 8, 16) if cluster.gpus_per_node % n == 0}
    return sorted(degrees)


def _between(low: Measure, high: Measure, at: float) -> Measure:
    """On the straight line through two measures: 0 gives the first, 1 the second; never less than nothing."""

    def line(x: float, y: float) -> float:
        return max(0.0, x + at * (y - x))

    seconds = MicroStepSeconds(
        *(line(x, y) for x, y in zip(astuple(low.seconds), astuple(high.seconds), strict=True))
    )
    return replace(
        low,
        forward_peak=line(low.forward_peak, high.forward_peak),
        backward_peak=line(low.backward_peak, high.backward_peak),
        seconds=seconds,
    )
