"""The `faults` section: what counts as a hang, and how often a failed run starts again."""

from pydantic import NonNegativeInt, PositiveFloat

from dist_transformer.config.base import Section


class FaultsConfig(Section):
    """Hangs and restarts."""

    step_limit_s: PositiveFloat = 1800.0
    """Longest time in seconds that a step, its collectives or its data may take before the watchdog ends the run."""
    start_limit_s: PositiveFloat = 3600.0
    """The same for everything before the first step: building, loading, compiling."""
    side_limit_s: PositiveFloat = 7200.0
    """The same for one evaluation or one checkpoint."""
    heartbeat_s: PositiveFloat = 10.0
    """Seconds between the signs of life that each rank writes to `RUN_DIR/heartbeats`."""
    preflight: bool = True
    """Look at every node before the first step: devices, versions, clock, disk, a shard, an all-reduce."""
    max_restarts: NonNegativeInt = 3
    """Failures in a row without a new checkpoint after which batch scripts do not start the run again."""
