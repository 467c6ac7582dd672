"""Counters, `metrics.jsonl`, dashboards, the progress on the screen, and pictures of runs.

`metrics.jsonl` is the truth; everything else is fed from it and can be lost without loss. Nothing here
knows ranks: use it on rank 0.
"""

from dist_transformer.tracking.console import Console
from dist_transformer.tracking.feed import Report, Sink
from dist_transformer.tracking.ids import TrackingIds, load_or_create_ids
from dist_transformer.tracking.metrics import MetricsLog, read_metrics
from dist_transformer.tracking.report import draw_run
from dist_transformer.tracking.sinks import build_sinks, check_tracking

__all__ = [
    "Console",
    "MetricsLog",
    "Report",
    "Sink",
    "TrackingIds",
    "build_sinks",
    "check_tracking",
    "draw_run",
    "load_or_create_ids",
    "read_metrics",
]
