"""What somebody should look at: a loss above its band, a speed that drops, a disk that fills, a run that stalls."""

import contextlib
import math
import shutil
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_transformer.config import AlertConfig

_WINDOW = 50
_MIN_ROWS = 10
# A calm loss has next to no spread: the band is never narrower than this share of the loss.
_LEAST_SPREAD = 0.01


@dataclass(frozen=True)
class Alert:
    """One sentence, and what it is about in a word that tools can filter by."""

    kind: str
    text: str


@dataclass
class _Latch:
    """Says once that something is wrong, after `patience` rows in a row, and again only after it was right."""

    patience: int
    n_bad: int = 0
    is_on: bool = False

    def update(self, is_bad: bool) -> bool:
        """Take one row's verdict; whether to raise the alert now."""
        self.n_bad = self.n_bad + 1 if is_bad else 0
        if not is_bad:
            self.is_on = False
        elif self.n_bad >= self.patience and not self.is_on:
            self.is_on = True
            return True
        return False


@dataclass
class AlertMonitor:
    """Looks at every training row. The band of the loss and the usual speed come from the last 50 rows."""

    config: AlertConfig
    run_dir: Path
    free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free
    _losses: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    _speeds: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))

    def __post_init__(self) -> None:
        self._diverging, self._slow = _Latch(self.config.patience), _Latch(self.config.patience)
        self._full = _Latch(1)

    def check(self, values: Mapping[str, Any]) -> list[Alert]:
        """The alerts that this row gives rise to."""
        found = [
            self._check_loss(values.get("train/loss")),
            self._check_speed(values.get("perf/tokens_per_sec")),
            self._check_disk(values.get("health/disk_free_gib")),
        ]
        return [alert for alert in found if alert is not None]

    def disk_free_gib(self) -> float | None:
        """Free space where the run directory is; None where the system does not tell."""
        with contextlib.suppress(OSError):
            return self.free_bytes(self.run_dir) / 2**30
        return None

    def _check_loss(self, loss: Any) -> Alert | None:
        if not _is_finite(loss) or not self.config.loss_band:
            return None  # A loss that is not finite is told by the step that skips its update.
        alert = None
        if len(self._losses) >= _MIN_ROWS:
            usual = statistics.median(self._losses)
            spread = 1.4826 * statistics.median(abs(value - usual) for value in self._losses)
            limit = usual + self.config.loss_band * max(spread, _LEAST_SPREAD * abs(usual))
            if self._diverging.update(loss > limit):
                alert = Alert(
                    "divergence",
                    f"loss {loss:.4g} is above {limit:.4g} for {self.config.patience} rows (usual: {usual:.4g})",
                )
        self._losses.append(loss)
        return alert

    def _check_speed(self, speed: Any) -> Alert | None:
        if not _is_finite(speed) or not self.config.throughput_drop_pct:
            return None
        alert = None
        if len(self._speeds) >= _MIN_ROWS:
            usual = statistics.median(self._speeds)
            limit = usual * (1 - self.config.throughput_drop_pct / 100)
            if self._slow.update(speed < limit):
                alert = Alert(
                    "throughput",
                    f"{speed:,.0f} tokens/s, {100 * (1 - speed / usual):.0f} % below the usual {usual:,.0f}",
                )
        self._speeds.append(speed)
        return alert

    def _check_disk(self, free_gib: Any) -> Alert | None:
        if not _is_finite(free_gib) or not self._full.update(free_gib < self.config.disk_free_gib):
            return None
        return Alert("disk", f"{free_gib:.1f} GiB are free in {self.run_dir}: checkpoints may not fit")


class StallWatch:
    """Calls back, from a thread of its own, when no step has ended for `limit_s` seconds; once a stall.

    Args:
        on_stall: gets the last step and the seconds since its end.
    """

    def __init__(self, limit_s: float, on_stall: Callable[[int, float], None], step: int = 0) -> None:
        self._limit_s, self._on_stall = limit_s, on_stall
        self._beat = (step, time.monotonic())
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stall-watch", daemon=True)
        if limit_s:
            self._thread.start()

    def beat(self, step: int) -> None:
        """A step has ended."""
        self._beat = (step, time.monotonic())

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        told: tuple[int, float] | None = None
        while not self._closed.wait(min(5.0, self._limit_s / 4)):
            beat = self._beat
            waited = time.monotonic() - beat[1]
            if waited > self._limit_s and beat != told:
                told = beat
                with contextlib.suppress(Exception):  # A log that is being closed.
                    self._on_stall(beat[0], waited)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
