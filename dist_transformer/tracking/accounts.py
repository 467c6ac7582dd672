"""Where a run's wall time goes: exclusive accounts of one process, and goodput over all its restarts."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dist_transformer.tracking.jsonl import Row

ACCOUNTS = ("compute", "communication", "input", "checkpoint", "evaluation", "other")
"""Steps' computing, their waiting for other ranks, waiting for data; saving; evaluating; starting, logging, rest."""

PRODUCTIVE = ("compute", "communication", "input")
"""The accounts that steps are made of."""


class TimeAccounts:
    """Every moment of this process belongs to one account: the innermost one entered, else `other`.

    Time before the object was made (starting Python, imports) is `other` too. Entering and leaving may happen on
    several threads as long as they wait for each other, as autograd's threads and the main thread do.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, age_s: float | None = None) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._then = clock()
        self._stack: list[tuple[object, str]] = []
        self._seconds = dict.fromkeys(ACCOUNTS, 0.0)
        self._seconds["other"] = process_age_s() if age_s is None else age_s

    @property
    def current(self) -> str:
        """The account that time goes to now."""
        with self._lock:
            return self._top()

    @contextlib.contextmanager
    def spend(self, account: str, only_in: str | None = None) -> Iterator[None]:
        """Put the time of a block on `account`; with `only_in`, only where that account is the current one."""
        token = object()
        with self._lock:
            entered = only_in is None or self._top() == only_in
            if entered:
                self._settle()
                self._stack.append((token, account))
        try:
            yield
        finally:
            if entered:
                with self._lock:
                    self._settle()
                    self._stack = [entry for entry in self._stack if entry[0] is not token]

    def totals(self) -> dict[str, float]:
        """Seconds of each account up to now."""
        with self._lock:
            self._settle()
            return dict(self._seconds)

    def _top(self) -> str:
        return self._stack[-1][1] if self._stack else "other"

    def _settle(self) -> None:
        now = self._clock()
        self._seconds[self._top()] += now - self._then
        self._then = now


class Goodput:
    """The share of a run's wall time, from its first start on, that trained steps which still count.

    Steps that a crash threw away, the time between two processes, saving, evaluating and starting are what is
    missing to 100 %. Everything comes from the rows that are kept anyway, so that no second file can disagree.

    Args:
        rows: of the processes before, in the order they were written.
        resumed_step: the step after which this process goes on.
        started: when this process started (seconds since 1970).
    """

    def __init__(self, rows: Sequence[Row], resumed_step: int, started: float) -> None:
        self._first_start: float = min(
            [started, *(row["time"] - row["time/wall_s"] for row in rows if _is_number(row, "time/wall_s"))]
        )
        self._before_s = 0.0
        self.n_lost_steps = max((row["step"] for row in rows), default=resumed_step) - resumed_step
        for row in rows:
            if row["step"] <= resumed_step and _is_number(row, "time/productive_s"):
                self._before_s = float(row["time/productive_s"])

    def productive_s(self, totals: dict[str, float]) -> float:
        """Seconds that trained the steps up to now, in this process and in what counts of those before it."""
        return self._before_s + sum(totals[name] for name in PRODUCTIVE)

    def pct(self, totals: dict[str, float], now: float) -> float:
        """Goodput in percent at `now` (seconds since 1970)."""
        return 100.0 * min(1.0, self.productive_s(totals) / max(1e-9, now - self._first_start))


def process_age_s() -> float:
    """Seconds since this process was started; 0 where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(0.0, uptime - ticks / float(os.sysconf("SC_CLK_TCK")))


def _is_number(row: Row, key: str) -> bool:
    return isinstance(row.get(key), int | float)
