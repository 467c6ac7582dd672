"""Which dashboards a run feeds."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_transformer.config import TrackingConfig
from dist_transformer.tracking.feed import Report, Sink
from dist_transformer.tracking.ids import load_or_create_ids
from dist_transformer.tracking.tensorboard_sink import TensorBoardSink, check_tensorboard
from dist_transformer.tracking.wandb_sink import WandbSink


def check_tracking(tracking: TrackingConfig) -> None:
    """Refuse what cannot work here, before any rank has begun. Costs nothing: call it on every rank."""
    if tracking.tensorboard:
        check_tensorboard()


def build_sinks(
    tracking: TrackingConfig, run_dir: Path, config_dict: Mapping[str, Any], report: Report | None = None
) -> list[Sink]:
    """The sinks that the configuration asks for. `MetricsLog` opens them, in threads of their own.

    `config_dict` is the resolved configuration as plain values: dashboards show it beside the curves.
    """
    check_tracking(tracking)
    report = report or logging.getLogger("dist_transformer.tracking").warning
    sinks: list[Sink] = []
    if tracking.wandb.mode != "disabled" and not _switched_off(tracking):
        ids = load_or_create_ids(run_dir, tracking.wandb.project, report)
        sinks.append(WandbSink(tracking.wandb, ids, run_dir, config_dict, report))
    if tracking.tensorboard:
        sinks.append(TensorBoardSink(run_dir))
    return sinks


def _switched_off(tracking: TrackingConfig) -> bool:
    """Whether the environment says no; `auto` listens to it, an explicit mode does not."""
    return tracking.wandb.mode == "auto" and os.environ.get("WANDB_MODE") == "disabled"
