"""Does a run fit, and how fast will it be."""

from dataclasses import dataclass
from pathlib import Path

from dist_transformer.config import Config
from dist_transformer.config.layout import data_parallel_size, grad_accum_steps, with_vocabulary
from dist_transformer.data.check import PACKED_FILL
from dist_transformer.data.locations import expand_braces
from dist_transformer.data.manifest import load_manifest
from dist_transformer.model.flops import Work, training_flops
from dist_transformer.plan.devices import Rates
from dist_transformer.plan.micro_step import run_micro_step, samples_of_row
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
    def is_packed(self) -> bool:
        """Else rows hold an unknown share of padding."""
        return self.config.data.packing

    @property
    def tokens_per_s(self) -> float:
        """Real tokens of both sides, all ranks, of rows as full as packing usually makes them; without packing, padding
        counts too.
        """
        data = self.config.data
        return self._n_full_rows * (data.max_source_len + data.max_target_len) / self.time.total

    @property
    def mfu(self) -> float:
        """Model FLOPs over the data sheet's peak, of full rows of one sample each."""
        data = self.config.data
        source, target = data.max_source_len, data.max_target_len
        work = Work(source, target, source**2, target * (target + 1) // 2, source * target)
        n_passes = 2 if self.config.train.r_drop else 1
        peak = self.cluster.n_gpus * self.cluster.gpu.peak_flops(dtype_of(self.config))
        flops = n_passes * self._n_full_rows * training_flops(self.config.model, work)
        return flops / (self.time.total * peak)

    @property
    def run_seconds(self) -> float:
        """All steps, without evaluations and saves."""
        return self.config.train.steps * self.time.total

    @property
    def _n_full_rows(self) -> float:
        """In a step: rows of full length without padding that hold as many tokens."""
        fill = PACKED_FILL if self.is_packed else 1.0
        return fill * self.config.train.global_batch_size * samples_of_row(self.config)


@dataclass(frozen=True)
class Measure:
    """What the model's own code says about a micro-step, without its operations."""

    whole: int
    """Parameters of the model."""
    n_parameters: int
    """Of a rank's tensor-parallel part."""
    largest: int
    forward_peak: float
    backward_peak: float
    seconds: MicroStepSeconds


class Planner:
    """Plans layouts of one run; the model is run once for each way to cut and recompute it, and micro-batch.

    Args:
        reserved: bytes of a GPU for CUDA, NCCL and fragmentation; None: 1.5 GiB and 5 % of the activations.
    """

    def __init__(self, cluster: Cluster, rates: Rates | None = None, reserved: float | None = None) -> None:
        self.cluster, self.rates, self.reserved = cluster, rates or Rates(), reserved
        self._measured: dict[tuple[object, ...], Measure] = {}

    def plan(self, config: Config) -> Plan:
        """Memory and time of a layout.

        Args:
            config: with `model.vocab_size` known; the same but for its layout at every call.

        Raises:
            ConfigError: if ranks and batch sizes do not fit together.
        """
        grad_accum_steps(
            config, data_parallel_size(self.cluster.n_gpus, config.parallel.tp_degree)
        )  # or say why not
        return self.plan_from(config, self.measure(config))

    def plan_from(self, config: Config, measured: Measure) -> Plan:
        """As `plan`, from a measure of its micro-step."""
        dp_size = data_parallel_size(self.cluster.n_gpus, config.parallel.tp_degree)
        n_micro_steps = grad_accum_steps(config, dp_size)
        states = plan_states(config, measured.n_parameters, measured.largest, dp_size)
        without = max(measured.forward_peak, measured.backward_peak)
        most = states.with_activations(measured.forward_peak, measured.backward_peak)
        reserved = 1.5 * GIB + 0.05 * without if self.reserved is None else self.reserved
        return Plan(
            config=config,
            cluster=self.cluster,
            n_parameters=measured.whole,
            dp_size=dp_size,
            n_micro_steps=n_micro_steps,
            memory=Memory(states, without, most - without, reserved, self.cluster.gpu.memory_gib * GIB),
            host_bytes=self.cluster.gpus_per_node * offloaded_bytes(config, measured.n_parameters, dp_size),
            time=step_seconds(
                measured.seconds, measured.n_parameters, n_micro_steps, config, self.cluster, self.rates
            ),
        )

    def measure(self, config: Config) -> Measure:
        """Run a micro-step on the meta device, if none like it has been run."""
        key = (config.parallel.tp_degree, config.recompute, config.train.micro_batch_size)
        if key not in self._measured:
            step = run_micro_step(config, config.train.micro_batch_size)
            self._measured[key] = Measure(
                step.whole,
                step.n_parameters,
                step.largest,
                step.forward_peak,
                step.backward_peak,
                micro_step_seconds(step, config, self.cluster, self.rates),
            )
        return self._measured[key]


def known_vocabulary(config: Config) -> tuple[Config, str]:
    """The configuration with a vocabulary, and where its size is from.

    Raises:
        ConfigError: if the configuration's is smaller than that of the shards' tokenizer.
        DataError: the shards are here, and what describes them cannot be read.
    """
    corpus = config.data.corpora()[0].train
    if all(Path(place).is_dir() for place in expand_braces(corpus)):
        # Their tokenizer is enough here: shards may be elsewhere.
        data = config.data.model_copy(update={"on_bad_shard": "skip"})
        known = with_vocabulary(config, load_manifest(corpus, data).vocab_size)
        source = f"the tokenizer of {corpus}"
    else:
        known = with_vocabulary(config, 0 if config.model.vocab_size else USUAL_VOCABULARY)
        source = f"assumed, for {corpus} is no folder here: give model.vocab_size=N"
    return known, "model.vocab_size" if config.model.vocab_size else source
