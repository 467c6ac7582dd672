"""When a run asks to be looked at, and when it does not."""

import math
import random
import threading
from pathlib import Path

from dist_transformer.config import AlertConfig
from dist_transformer.tracking.alerts import AlertMonitor, StallWatch

GIB = 2**30


def monitor(config: AlertConfig | None = None, free_gib: float = 100.0) -> AlertMonitor:
    return AlertMonitor(config or AlertConfig(), Path("run"), lambda _: int(free_gib * GIB))


def kinds_at(watch: AlertMonitor, key: str, values: list[float]) -> list[tuple[int, str]]:
    """(row, kind) of each alert."""
    return [(n, alert.kind) for n, value in enumerate(values) for alert in watch.check({key: value})]


def test_a_loss_that_learns_raises_nothing() -> None:
    noise = random.Random(1)
    values = [2 + 8 * math.exp(-n / 60) + noise.gauss(0, 0.08) for n in range(2000)]
    assert kinds_at(monitor(), "train/loss", values) == []


def test_a_loss_above_its_band_is_told_once() -> None:
    noise = random.Random(2)
    calm = [3 + noise.gauss(0, 0.05) for _ in range(100)]
    diverged = [4.0 + n / 10 for n in range(30)]
    assert kinds_at(monitor(), "train/loss", calm + diverged) == [(102, "divergence")]
    # One spike, or two rows, are no divergence; NaN is told by the step itself.
    assert kinds_at(monitor(), "train/loss", [*calm, 9.0, 3.0, 9.0, 9.0, 3.0, math.nan, math.inf]) == []
    # It comes back, and leaves again: told again.
    found = kinds_at(monitor(), "train/loss", calm + diverged[:5] + calm + diverged[:5])
    assert [row for row, _ in found] == [102, 207]
    assert kinds_at(monitor(AlertConfig(loss_band=0)), "train/loss", calm + diverged) == []


def test_a_loss_without_any_noise_has_a_band_too() -> None:
    assert kinds_at(monitor(), "train/loss", [1.0] * 50 + [1.001] * 20) == []


def test_a_speed_that_drops() -> None:
    fast = [1000.0 + n % 7 for n in range(50)]
    watch = monitor()
    assert kinds_at(watch, "perf/tokens_per_sec", fast + [500.0] * 5) == [(52, "throughput")]
    (alert,) = [a for value in [*fast, 100, 100, 100] for a in monitor_step(watch, value)]
    assert "below the usual" in alert
    assert kinds_at(monitor(), "perf/tokens_per_sec", fast + [700.0] * 20) == []
    off = AlertConfig(throughput_drop_pct=0)
    assert kinds_at(monitor(off), "perf/tokens_per_sec", fast + [1.0] * 20) == []
    one_row = AlertConfig(patience=1, throughput_drop_pct=10)
    assert kinds_at(monitor(one_row), "perf/tokens_per_sec", [*fast, 850.0]) == [(50, "throughput")]


def monitor_step(watch: AlertMonitor, speed: float) -> list[str]:
    return [alert.text for alert in watch.check({"perf/tokens_per_sec": float(speed)})]


def test_a_disk_that_fills() -> None:
    assert kinds_at(monitor(), "health/disk_free_gib", [9.0, 6.0, 4.9, 3.0, 8.0, 4.0]) == [
        (2, "disk"),
        (5, "disk"),
    ]
    assert monitor(free_gib=12.5).disk_free_gib() == 12.5

    def no_answer(_: Path) -> int:
        raise OSError("stale file handle")

    assert AlertMonitor(AlertConfig(), Path("run"), no_answer).disk_free_gib() is None


def test_a_stall_is_told_once_and_again_after_the_next_step() -> None:
    told: list[int] = []
    heard = threading.Event()

    def on_stall(step: int, seconds: float) -> None:
        assert seconds > 0.05
        told.append(step)
        heard.set()

    watch = StallWatch(0.05, on_stall)
    watch.beat(7)
    assert heard.wait(10)
    heard.clear()
    assert not heard.wait(0.3), "once a stall"
    watch.beat(8)
    assert heard.wait(10)
    watch.close()
    assert [step for step in told if step] == [7, 8]
    assert not StallWatch(0, on_stall)._thread.is_alive()
