"""Dashboards of other packages, by entry point."""

import types
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from dist_transformer.config import TrackingConfig, WandbConfig
from dist_transformer.errors import ConfigError
from dist_transformer.tracking import MetricsLog, Report, build_sinks, check_tracking, sinks
from dist_transformer.tracking.jsonl import Row

QUIET = WandbConfig(mode="disabled")


class Collector:
    """A sink as somebody else would write it."""

    name = "collector"
    stop_requested = False

    def __init__(self, run_dir: Path, config: Mapping[str, Any], report: Report) -> None:
        self.run_dir, self.config, self.rows, self.ended = run_dir, config, list[Row](), False

    def open(self) -> None: ...

    def write(self, row: Row) -> None:
        self.rows.append(row)

    def close(self, exit_code: int, preempted: bool) -> None:
        self.ended = True

    def interrupt(self) -> None: ...

    def abandon(self) -> None: ...

    def where(self) -> str:
        return "collected"


@pytest.fixture(autouse=True)
def offered(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("collector", f"{__name__}:Collector", sinks.GROUP),
        EntryPoint("broken", "no_such_package.at_all:Sink", sinks.GROUP),
    ]
    monkeypatch.setattr(sinks, "entry_points", lambda group: points if group == sinks.GROUP else [])


def test_another_packages_sink_gets_every_row(tmp_path: Path) -> None:
    tracking = TrackingConfig(wandb=QUIET, sinks=("collector",))
    check_tracking(tracking)
    (sink,) = build_sinks(tracking, tmp_path, {"seed": 1})
    assert isinstance(sink, Collector) and sink.config == {"seed": 1} and sink.run_dir == tmp_path
    log = MetricsLog(tmp_path, [sink])
    for step in range(5):
        log.log("train", step, {"train/loss": 1.0})
    assert log.where() == ["collected"]
    assert log.close() and sink.ended
    assert [row["step"] for row in sink.rows] == list(range(5))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("absent", r"tracking\.sinks=absent: no installed package offers it \(offered: broken, collector\)"),
        ("broken", r"tracking\.sinks=broken: no_such_package\.at_all:Sink cannot be imported"),
    ],
)
def test_a_sink_that_is_not_there_is_refused_before_the_run(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_tracking(TrackingConfig(wandb=QUIET, sinks=(name,)))


def test_the_group_is_what_the_documentation_says() -> None:
    assert isinstance(sinks, types.ModuleType) and sinks.GROUP == "dist_transformer.sinks"
