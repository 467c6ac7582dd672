"""Which dashboards a run feeds."""

import logging
import os
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from dist_transformer.config import TrackingConfig
from dist_transformer.errors import ConfigError
from dist_transformer.tracking.feed import Report, Sink
from dist_transformer.tracking.ids import load_or_create_ids
from dist_transformer.tracking.tensorboard_sink import TensorBoardSink, check_tensorboard
from dist_transformer.tracking.wandb_sink import WandbSink

GROUP = "dist_transformer.sinks"
"""Entry points of further sinks: each a callable of (run directory, configuration, report) that gives a `Sink`."""


def check_tracking(tracking: TrackingConfig) -> None:
    """Refuse what cannot work here, before any rank has begun. Costs nothing: call it on every rank."""
    if tracking.tensorboard:
        check_tensorboard()
    for name in tracking.sinks:
        _load(name)


def build_sinks(
    tracking: TrackingConfig,
    run_dir: Path,
    config_dict: Mapping[str, Any],
    report: Report | None = None,
    resumed_step: int | None = None,
) -> list[Sink]:
    """The sinks that the configuration asks for. `MetricsLog` opens them, in threads of their own.

    Call it before `MetricsLog` opens the file of the run.

    Args:
        config_dict: the resolved configuration as plain values: dashboards show it beside the curves.
        resumed_step: the step after which the run goes on, 0 if from the beginning; None: unknown.
    """
    check_tracking(tracking)
    report = report or logging.getLogger("dist_transformer.tracking").warning
    sinks: list[Sink] = []
    if tracking.wandb.mode != "disabled" and not _switched_off(tracking):
        ids = load_or_create_ids(run_dir, tracking.wandb.project, report)
        sinks.append(WandbSink(tracking.wandb, ids, run_dir, config_dict, report, resumed_step))
    if tracking.tensorboard:
        sinks.append(TensorBoardSink(run_dir))
    sinks += [_load(name)(run_dir, config_dict, report) for name in tracking.sinks]
    return sinks


def _load(name: str) -> Callable[[Path, Mapping[str, Any], Report], Sink]:
    """The factory of a sink that another package offers."""
    found = {point.name: point for point in entry_points(group=GROUP)}
    if name not in found:
        offered = ", ".join(sorted(found)) or "none"
        raise ConfigError(f"tracking.sinks={name}: no installed package offers it (offered: {offered})")
    try:
        factory: Callable[[Path, Mapping[str, Any], Report], Sink] = found[name].load()
    except Exception as error:
        raise ConfigError(
            f"tracking.sinks={name}: {found[name].value} cannot be imported: {error}"
        ) from error
    return factory


def _switched_off(tracking: TrackingConfig) -> bool:
    """Whether the environment says no; `auto` listens to it, an explicit mode does not."""
    return tracking.wandb.mode == "auto" and os.environ.get("WANDB_MODE") == "disabled"
