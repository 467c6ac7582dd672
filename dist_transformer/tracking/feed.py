"""Rows on their way to one sink: a bounded queue and a daemon thread, so no dashboard can hurt the run."""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from dist_transformer.tracking.jsonl import Row

Report = Callable[[str], None]
"""Takes one sentence for the person who watches the run."""


class Sink(Protocol):
    """Where rows go besides `metrics.jsonl`. `open`, `write` and `close` are called in the feed's thread."""

    name: str
    """Short and unique, for messages and counters."""

    def open(self) -> None:
        """Connect. May take seconds; an error turns the sink off."""

    def write(self, row: Row) -> None:
        """Take one row. May block or raise: the run does not notice."""

    def close(self, exit_code: int, preempted: bool) -> None:
        """Flush and say goodbye."""

    def interrupt(self) -> None:
        """Make a call that blocks in the feed's thread fail soon. For another thread; never blocks."""

    def abandon(self) -> None:
        """As `interrupt`, for good: the run ends and nothing is begun again."""

    def where(self) -> str:
        """One line that tells a person where to look; empty while there is nothing to see."""

    @property
    def stop_requested(self) -> bool:
        """Whether somebody pressed the dashboard's stop button."""


class Feed:
    """Hands rows to a sink in a thread of its own.

    `offer` never waits and never raises: when the queue is full the row is dropped and counted. A sink that
    raises is reported once and keeps getting rows; after `max_failures` failures in a row it is turned off.
    One that has blocked for `stall_s` seconds with a full queue is interrupted.

    Args:
        announce: told where to look, once the sink is connected.
    """

    def __init__(
        self,
        sink: Sink,
        report: Report,
        announce: Report = lambda where: None,
        capacity: int = 4096,
        max_failures: int = 20,
        stall_s: float = 60.0,
    ) -> None:
        self.sink = sink
        self.n_dropped = 0
        self.n_failed = 0
        self._report, self._announce = report, announce
        self._capacity = capacity
        self._max_failures = max_failures
        self._stall_s = stall_s
        self._rows: deque[Row] = deque()
        self._changed = threading.Condition()
        self._closing: tuple[int, bool] | None = None
        self._busy_since: float | None = None
        self._opened = threading.Event()
        self._given_up = False
        self._thread = threading.Thread(target=self._work, name=f"sink-{sink.name}", daemon=True)
        self._thread.start()

    def offer(self, row: Row) -> None:
        """Queue a row for the sink, or drop and count it."""
        with self._changed:
            if self._thread.is_alive() and len(self._rows) < self._capacity:
                self._rows.append(row)
                self._changed.notify()
                return
            self.n_dropped += 1
            first, busy_since = self.n_dropped == 1, self._busy_since
        if not self._thread.is_alive():
            return  # Turned off, and said so then.
        if first:
            self._say(f"{self.sink.name} does not keep up: rows are dropped there; all are in metrics.jsonl")
        if busy_since is not None and time.monotonic() - busy_since > self._stall_s:
            self._busy_since = None
            self._say(f"{self.sink.name} has blocked for {self._stall_s:.0f} s: interrupting it")
            self._guarded(self.sink.interrupt)

    def wait_opened(self, timeout: float) -> bool:
        """Wait until the sink is connected or has failed to; whether that happened in time."""
        return self._opened.wait(timeout)

    def close(self, exit_code: int, preempted: bool) -> None:
        """Ask the thread to hand over what is queued and to close the sink; returns at once."""
        with self._changed:
            if self._closing is None:
                self._closing = (exit_code, preempted)
                self._changed.notify()

    def join(self, deadline: float) -> bool:
        """Wait for the thread until `deadline` (monotonic), then give it up; whether it ended by itself."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if not self._thread.is_alive():
            return True
        self._given_up = True
        with self._changed:
            n_left = len(self._rows)
            self.n_dropped += n_left
            self._rows.clear()
        self._say(f"{self.sink.name} did not finish in time: {n_left} rows are only in metrics.jsonl")
        self._guarded(self.sink.abandon)
        self._thread.join(2.0)
        return False

    def _work(self) -> None:
        # BaseException: a sink may end in SystemExit too (wandb's teardown does); nothing may get out.
        try:
            self.sink.open()
        except BaseException as error:
            self._say(f"{self.sink.name} could not start and is off for this run: {_sentence(error)}")
            return
        finally:
            self._opened.set()
        if where := self.sink.where():
            self._guarded(lambda: self._announce(where))
        working = self._pump()
        if not working:
            self._guarded(self.sink.abandon)
        try:
            self.sink.close(*(self._closing or (1, False)))
        except BaseException as error:
            if working and not self._given_up:
                self._say(f"{self.sink.name} ended with an error: {_sentence(error)}")

    def _pump(self) -> bool:
        """Hand over rows until asked to close or the sink failed too often; whether it still works."""
        failures = 0
        while (row := self._take()) is not None:
            self._busy_since = time.monotonic()
            try:
                self.sink.write(row)
                failures = 0
            except BaseException as error:
                self.n_failed += 1
                failures += 1
                if failures == 1 and not self._given_up:
                    self._say(f"{self.sink.name} refused row {row.get('row')}: {_sentence(error)}")
                if failures >= self._max_failures:
                    self._say(f"{self.sink.name} is off for this run after {failures} failures in a row")
                    return False
            finally:
                self._busy_since = None
        return True

    def _take(self) -> Row | None:
        with self._changed:
            while not self._rows and self._closing is None:
                self._changed.wait()
            return self._rows.popleft() if self._rows else None

    def _say(self, text: str) -> None:
        self._guarded(lambda: self._report(text))

    @staticmethod
    def _guarded(call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:  # Neither a broken terminal nor a sink's clean-up is a reason to stop training.
            return


def _sentence(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
