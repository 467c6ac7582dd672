"""The fastest layouts of a run that fit: micro-batch, recomputation, ZeRO stage, tensor parallelism."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, replace

from dist_transformer.config import Config, build_config
from dist_transformer.errors import ConfigError
from dist_transformer.plan.planner import Measure, Plan, Planner
from dist_transformer.plan.speed import MicroStepSeconds

POLICIES = (
    ("none", "none"),
    ("selective", "none"),
    ("full", "none"),
    ("selective", "selective"),
    ("full", "full"),
)
"""Of encoder and decoder: the encoder's rows are longer."""
_LOOKED_AT = (16, 48)
"""Rows of the micro-batches that tell of all the others."""
_AS_FAST, _LESS = 1.015, 0.97
"""Times within this factor of the fastest are one; a slower layout is worth while with less memory than this share."""
_MARGIN = 1.1
"""What looks too large by less than this is run before it is thrown away: lines are not exact."""


def search(
    planner: Planner, config: Config, n_best: int = 8, say: Callable[[str], None] = lambda _: None
) -> list[Plan]:
    """The fastest layouts that fit, fastest first, without those that need more memory for next to no speed.

    Two micro-batches of each way to cut and recompute the model tell of all the others (memory and time are nearly
    straight lines); those that look best are then run themselves. More than two ranks share a layer only if nothing
    fits otherwise, or the configuration wants it: within a layer there is nothing that hides communication.

    Args:
        say: told what is being looked at.
    """
    rough: list[Plan] = []
    for tp_degree in _degrees(config, planner):
        is_more = tp_degree > max(2, config.parallel.tp_degree)
        if is_more and any(plan.memory.fits for plan in rough):
            break
        for encoder, decoder in POLICIES:
            cut = [
                f"parallel.tp_degree={tp_degree}", f"recompute.encoder={encoder}", f"recompute.decoder={decoder}"
            ]  # fmt: skip
            say(" ".join(cut))
            rough += [
                plan
                for plan in _sizes_and_stages(planner, config, cut)
                if plan.memory.total <= _MARGIN * plan.memory.available
            ]
    best: list[Plan] = []
    with contextlib.suppress(ConfigError):
        best += [plan for plan in [planner.plan(config)] if plan.memory.fits]
    for plan in sorted(_worth_it(rough), key=_seconds):
        if len(best) > n_best:
            break
        if plan.config != config:
            say(f"checking {layout_of(plan.config)}")
            best += [exact for exact in [planner.plan(plan.config)] if exact.memory.fits]
    return sorted(_worth_it(best), key=_seconds)[:n_best]


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


def _sizes_and_stages(planner: Planner, config: Config, cut: list[str]) -> Iterator[Plan]:
    """A plan for each micro-batch and stage that there can be, from two measured micro-batches."""
    low, high = _LOOKED_AT
    try:
        configs = [_variant(config, [*cut, *_one_update(rows)]) for rows in _LOOKED_AT]
    except ConfigError:
        return  # this way to cut or recompute does not go with the run
    less, more = (planner.measure(each) for each in configs)
    dp_size = planner.cluster.n_gpus // configs[0].parallel.tp_degree
    for n_rows in _divisors(config.train.global_batch_size):
        measured = _between(less, more, (n_rows - low) / (high - low))
        for stage in _stages(config, dp_size):
            overrides = [*cut, f"train.micro_batch_size={n_rows}", f"parallel.zero_stage={stage}"]
            with contextlib.suppress(ConfigError):
                yield planner.plan_from(_variant(config, overrides), measured)


def _stages(config: Config, dp_size: int) -> list[int]:
    """That change nothing but the layout: in bf16, stage 0 cannot add micro-steps up in fp32."""
    if config.parallel.offload != "none":
        return [config.parallel.zero_stage]
    adds_fp32 = config.train.precision == "bf16" and config.train.grad_accum_dtype == "fp32"
    stages = [1, 2, 3] if adds_fp32 else [0, 1, 2, 3]
    return stages[:1] if dp_size == 1 else stages  # a single replica has nobody to share with


def check_batch(planner: Planner, config: Config) -> None:
    """Some layout must be able to share the batch out.

    Raises:
        ConfigError: no number of replicas that these GPUs can hold divides it.
    """
    n_rows, n_gpus = config.train.global_batch_size, planner.cluster.n_gpus
    for tp_degree in _degrees(config, planner):
        with contextlib.suppress(ConfigError):
            _variant(config, [f"parallel.tp_degree={tp_degree}"])
            if n_rows % (n_gpus // tp_degree) == 0:
                return
    raise ConfigError(
        f"train.global_batch_size={n_rows} cannot be shared out over {n_gpus} GPUs: make it a multiple of {n_gpus}"
    )


def _variant(config: Config, overrides: Sequence[str]) -> Config:
    return build_config(config.model_dump(mode="json"), overrides=overrides)


def _one_update(n_rows: int) -> list[str]:
    """A batch of one micro-batch, so that any number of rows goes."""
    return [f"train.micro_batch_size={n_rows}", f"train.global_batch_size={n_rows}"]


def _divisors(n: int) -> list[int]:
    return [divisor for divisor in range(1, n + 1) if n % divisor == 0]


def _degrees(config: Config, planner: Planner) -> list[int]:
    """Tensor parallelism within a node, and what the run has."""
    return sorted({config.parallel.tp_degree, *_divisors(planner.cluster.gpus_per_node)})


def _worth_it(plans: Sequence[Plan]) -> list[Plan]:
    """The least memory of those as fast as the fastest, and then, of those that need less still, the same again."""
    kept: list[Plan] = []
    left = sorted(plans, key=_seconds)
    while left:
        as_fast = [plan for plan in left if plan.time.total <= _AS_FAST * left[0].time.total]
        kept.append(min(as_fast, key=lambda plan: plan.memory.total))
        left = [plan for plan in left if plan.memory.total < _LESS * kept[-1].memory.total]
    return kept


def _seconds(plan: Plan) -> float:
    return plan.time.total


def _between(low: Measure, high: Measure, at: float) -> Measure:
    """On the straight line through two measures: 0 gives the first, 1 the second; never less than nothing."""

    def line(x: float, y: float) -> float:
        return max(0.0, x + at * (y - x))

    seconds = (line(x, y) for x, y in zip(astuple(low.seconds), astuple(high.seconds), strict=True))
    return replace(
        low,
        forward_peak=line(low.forward_peak, high.forward_peak),
        backward_peak=line(low.backward_peak, high.backward_peak),
        seconds=MicroStepSeconds(*seconds),
    )
