"""Bytes of weights, gradients, optimizer states and ZeRO's buffers on a rank (Rajbhandari et al. 2020, figure 1)."""

from dataclasses import dataclass
from typing import Literal

from dist_transformer.config import Config
from dist_transformer.config.zero import zero_settings

BucketsAre = Literal["always", "in the backward pass", "after the last one"]
_FLAT = 5e8


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
    buckets_are: BucketsAre
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
    stage, settings = parallel.zero_stage, zero_settings(config, dp_size)
    weight = 2.0 if train.precision == "bf16" else 4.0
    adds_fp32 = train.precision == "bf16" and train.grad_accum_dtype == "fp32" and stage > 0
    summed = 4.0 if adds_fp32 else weight
    n, own = float(n_parameters), n_parameters / (dp_size if stage else 1)  # `own`: what this rank updates
    has_masters = stage > 0 or train.precision == "bf16"
    is_offloaded = parallel.offload != "none"
    gathered = buckets = 0.0
    buckets_are: BucketsAre = "always"
    if stage == 0 and dp_size > 1:
        # The engine's own all-reduce makes gradients flat, half a billion elements at a time.
        buckets_are, buckets = "after the last one", weight * min(n, _FLAT)
    elif stage == 1 and adds_fp32 and not is_offloaded:
        # Another wrapper of DeepSpeed's: a copy only where there are several groups of parameters.
        buckets_are, buckets = "after the last one", 4.0 * n if config.optimizer.weight_decay else 0.0
    elif stage:
        doubled = 2 if settings.get("overlap_comm") and stage < 3 else 1
        buckets = (
            doubled * (summed if stage == 1 else weight) * float(settings.get("reduce_bucket_size", 5e8))
        )
        buckets_are = "in the backward pass" if stage == 2 else "always"
    if stage == 3:
        live = float(settings.get("stage3_max_live_parameters", 1e9))
        prefetched = float(settings.get("stage3_prefetch_bucket_size", 5e7))
        gathered = weight * min(n, max(live, float(largest)) + prefetched)
    weights = weight * (own if stage == 3 else n)
    optimizer = ((12.0 if has_masters else 8.0) + (4.0 if train.ema_decay is not None else 0.0)) * own
    gradients = summed * (own if stage >= 2 else n)
    if not has_masters or (stage == 1 and adds_fp32):
        updated = gradients
    else:  # This rank's gradients; with ZeRO flat too; and in fp32.
        updated = (summed + 4.0 + (weight if stage and summed < 4.0 else 0.0)) * own
    if config.optimizer.name == "adamw_rms":
        updated += 6.0 * own
    if is_offloaded:
        weights = 0.0 if parallel.offload == "all" else weights
        optimizer, updated = 0.0, 0.0
        gradients = _gradients_on_their_way(stage, summed * n, 4.0 * own if adds_fp32 else 0.0, 4.0 * largest)
    update = weights + optimizer + updated + (buckets if stage == 3 else 0.0)
    return StateBytes(weights, gathered, gradients, optimizer, buckets, buckets_are, update)


def _gradients_on_their_way(stage: int, whole: float, part: float, largest: float) -> float:
    """What stays on the device of gradients that go to the host: stage 1 sends them after the last micro-step."""
    return {1: whole + part + largest, 2: part + largest, 3: 0.0}[stage]


def offloaded_bytes(config: Config, n_parameters: int, dp_size: int) -> float:
    """CPU memory that a rank needs for what `parallel.offload` puts there."""
    if config.parallel.offload == "none":
        return 0.0
    weight = 2.0 if config.train.precision == "bf16" else 4.0
    # Master weights and two moments; gradients in fp32, in stage 3 once more; a copy of the weights on their way back.
    per_element = 12.0 + (8.0 if config.parallel.zero_stage == 3 else 4.0) + weight
    if config.train.ema_decay is not None:
        per_element += 4.0
    if config.parallel.offload == "all":
        per_element += weight
    return per_element * n_parameters / dp_size
