"""What tests look up in W&B's transaction logs beside the rows."""

from pathlib import Path
from typing import Any

from dist_transformer.tracking.wandb_log import records


def kinds(path: Path) -> list[tuple[str, Any]]:
    """Each record with its type."""
    return [(record.WhichOneof("record_type"), record) for record, _ in records(path)]


def run_record(path: Path) -> Any:
    """The first description of the run: id, project, configuration."""
    return next(record.run for kind, record in kinds(path) if kind == "run")


def axes(path: Path) -> dict[str, str]:
    """`define_metric`: pattern or name, and the metric over which it is drawn."""
    found = [record.metric for kind, record in kinds(path) if kind == "metric"]
    return {metric.glob_name or metric.name: metric.step_metric for metric in found if metric.step_metric}
