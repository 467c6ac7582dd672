"""Bytes of weights, gradients, optimizer states and ZeRO's buffers on a rank (Rajbhandari et al. 2020, figure 1)."""

from dataclasses import dataclass
from typing import Literal

from dist_transformer.config import Config
from dist_transformer.config.zero import zero_settings


@dataclass(frozen=True)
class StateBytes:
    """What a rank holds beside activations, as DeepSpeed 0.19 does."""

    weights: float
    """Those that the model computes with; under ZeRO 3 this rank's part of them."""
    gathered: float
    """Under ZeRO 3: whole weights, as many as are here at the same time."""
    gradients: float
    """Between micro-steps."""
    optimizer: float
    """Master weights, Adam's moments and the moving average."""
    buckets: float
    """Gradients on their way to other ranks."""
    buckets_are: Literal["always", "in the backward pass", "after the last one"]
    update: float
    """All that is there while the optimizer works: activations are gone then."""

    @property
    def total(self) -> float:
        """What is there all through forward and backward."""
        always = self.buckets if self.buckets_are == "always" else 0.0
        return self.weights + self.gathered + self.gradients + self.optimizer + always

    def with_activations(self, forward_peak: float, backward_peak: float) -> float:
        """The most that a micro-step needs beside `total`."""
        if self.buckets_are == "in the backward pass":
            backward_peak += self.buckets
        elif self.buckets_are == "after the last one":
            backward_peak = max(backward_peak, self.buckets)
        return max(forward_peak, backward_peak)


def plan_states(config: Config, n_parameters: int, largest: int, dp_size: int) -> StateBytes:
    """By stage, precision, accumulation and offloading.

    Args:
        n_parameters: of this rank's tensor-parallel part.
        largest: elements of its largest parameter.
        dp_size: data-parallel ranks.
    """
    train, parallel = config.train, config.parallel
    stage, settings = parallel.zero_stage, zero_settings(config)
    weight = 2.0 if train.precision == "bf16" else 4.0
    adds_fp32 = train.precision == "bf16" and train.grad_accum_dtype == "fp32" and stage > 0
    summed = 4.0 if adds_fp32 else weight
    n, own = float(n_parameters), n_parameters / (dp_size if stage else 1)  # `own`: what this rank updates
    has_masters = stage > 0 or train.precision == "bf16"
    gathered = buckets = 0.0
    buckets_are: Literal["always", "in the backward pass", "after the last one"] = "always"
    if stage:
        doubled = 2 if settings.get("overlap_comm") and stage < 3 else 1
        staged = summed if stage == 1 else weight
        buckets = doubled * staged * float(settings.get("reduce_bucket_size", 5e8))
    if stage == 1 and adds_fp32:
        buckets_are = "after the last one"
    elif stage == 2:
        buckets_are = "in the backward pass"
    elif stage == 3:
        live = float(settings.get("stage3_max_live_parameters", 1e9))
        prefetched = float(settings.get("stage3_prefetch_bucket_size", 5e7))
        gathered = weight * min(n, max(live, float(largest)) + prefetched)
    weights = weight * (own if stage == 3 else n)
    optimizer = ((12.0 if has_masters else 8.0) + (4.0 if train.ema_decay is not None else 0.0)) * own
    # Stage 1 adds up in fp32 beside what the backward pass leaves.
    gradients = summed * own if stage >= 2 else (summed + weight if adds_fp32 else weight) * n
    if not has_masters or (stage == 1 and adds_fp32):
        updated = gradients
    else:  # This rank's gradients; with ZeRO flat too; and in fp32.
        updated = (summed + 4.0 + (weight if stage and summed < 4.0 else 0.0)) * own
    if config.optimizer.name == "adamw_rms":
        updated += 6.0 * own
    update = weights + optimizer + updated + (buckets if stage == 3 else 0.0)
    states = StateBytes(weights, gathered, gradients, optimizer, buckets, buckets_are, update)
    return states if parallel.offload == "none" else _offloaded(states, parallel.offload == "all")


def _offloaded(states: StateBytes, weights_too: bool) -> StateBytes:
    """What lives in CPU memory is not here; parameters come as gathered ones do."""
    weights = 0.0 if weights_too else states.weights
    return StateBytes(
        weights,
        states.gathered,
        0.0,
        0.0,
        states.buckets,
        states.buckets_are,
        update=weights + states.buckets,
    )


def offloaded_bytes(config: Config, n_parameters: int, dp_size: int) -> float:
    """CPU memory that a rank needs for what `parallel.offload` puts there."""
    if config.parallel.offload == "none":
        return 0.0
    own = n_parameters / dp_size
    per_element = 16.0 + (4.0 if config.train.ema_decay is not None else 0.0)  # fp32 gradients too
    return (per_element + (2.0 if config.parallel.offload == "all" else 0.0)) * own
