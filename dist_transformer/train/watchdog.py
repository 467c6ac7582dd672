"""The watchdog: a step, a collective or a loader that takes too long is named, with stacks, and the process ends.

A hung collective hangs on every rank at once, and none of them can say so: their main threads wait in C++. A thread of
each process does. It writes the rank's sign of life, measures how long the main thread has been at the same thing, and
past the limit writes the Python stacks of all threads, names the ranks that keep the others waiting, and ends the
process, so that whatever started it can start it again.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_transformer.config import FaultsConfig
from dist_transformer.tracking.heartbeats import Beat, name_suspects, node_name, read_beats, write_beat

EXIT_CODE = 86
"""Of a process that its watchdog ended."""
_LAST_WORDS_S = 5.0
"""Time that the log and the dashboard get for the alert."""
_REPORT_S = 30.0
"""Time to write down what hangs: more than the last words, and than the other ranks wait for them."""


class Watchdog:
    """Watches the main thread of this rank; a daemon thread.

    Args:
        attempt: Which start of the run this is; the same on all ranks.
        on_hang: Called once with a sentence before the process ends, on this thread; it may take seconds.
    """

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        attempt: str,
        limits: FaultsConfig,
        on_hang: Callable[[str], None],
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        self.run_dir, self.rank, self.attempt, self.limits = run_dir, rank, attempt, limits
        self._on_hang, self._leave = on_hang, leave
        self._phase, self._step = "starting", 0
        self._since = time.time()
        self._entered = time.monotonic()
        self._limit_s = limits.start_limit_s
        self._closed = threading.Event()
        # The watchdog itself touches no file: the file system may be what hangs.
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for work, name in ((self._watch, "watchdog"), (self._beat, "heartbeat"))
        ]
        for thread in self._threads:
            thread.start()

    def enter(self, phase: str, step: int, limit_s: float | None = None) -> None:
        """The main thread begins something: `training`, `evaluating`, ...

        Args:
            step: The step it belongs to.
            limit_s: How long it may take; None: `faults.step_limit_s`.
        """
        # Read by the other thread one by one. The beginning goes first: with a new limit, the old one would be a hang.
        self._entered = time.monotonic()
        self._phase, self._step, self._since = phase, step, time.time()
        self._limit_s = self.limits.step_limit_s if limit_s is None else limit_s

    @contextmanager
    def side_work(self, phase: str, step: int) -> Iterator[None]:
        """Evaluation, saving: longer than a step may take, and back to the step after."""
        before = self._phase
        self.enter(phase, step, self.limits.side_limit_s)
        yield
        self.enter(before, step)

    def close(self) -> None:
        """Stop watching: the run is at its end."""
        self._closed.set()
        for thread in self._threads:
            thread.join(timeout=5)

    def _beat(self) -> None:
        while True:
            write_beat(self.run_dir, self.rank, self._phase, self._step, self._since, self.attempt)
            if self._closed.wait(self.limits.heartbeat_s):
                return

    def _watch(self) -> None:
        while (left := self._limit_s - (time.monotonic() - self._entered)) > 0:
            if self._closed.wait(min(self.limits.heartbeat_s, max(left, 0.01))):
                return
        # Whatever becomes of the report, the process ends.
        reporter = threading.Thread(target=self._report, daemon=True)
        reporter.start()
        reporter.join(timeout=_REPORT_S)
        self._leave(EXIT_CODE)

    def _report(self) -> None:
        stacks = self._write_stacks()
        # Stopped ranks look alive until their last beat is old enough.
        silent_after_s = 2.5 * self.limits.heartbeat_s
        beats = read_beats(self.run_dir, self.attempt)
        suspects, how = name_suspects(beats, silent_after_s, time.time())
        sentence = (
            f"watchdog: rank {self.rank} on {node_name()} has been {self._phase} (step {self._step}) for more than "
            f"{self._limit_s:g} s; {describe_suspects(suspects, how)}; stacks of all threads: {stacks}"
        )
        print(sentence, file=sys.stderr, flush=True)
        self._on_hang(sentence)

    def _write_stacks(self) -> Path:
        path = self.run_dir / "heartbeats" / f"rank-{self.rank:05d}.stacks.txt"
        try:
            with path.open("w", encoding="utf-8") as file:
                file.write(f"rank {self.rank} on {node_name()}, {self._phase}, step {self._step}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        return path


def describe_suspects(suspects: list[Beat], how: str) -> str:
    """The finding in words: at most five ranks by name."""
    if not suspects:
        return how
    named = ", ".join(f"rank {beat.rank} on {beat.host}" for beat in suspects[:5])
    more = f" and {len(suspects) - 5} more" if len(suspects) > 5 else ""
    return f"{named}{more}: {how}"


def give_last_words(flush: Callable[[], None]) -> None:
    """Let the log and the dashboard out, for a few seconds at most: they may hang too."""
    helper = threading.Thread(target=flush, daemon=True)
    helper.start()
    helper.join(timeout=_LAST_WORDS_S)
