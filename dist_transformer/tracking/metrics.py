"""The run's log of events: `metrics.jsonl` first, dashboards after it."""

import contextlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from dist_transformer.errors import UserError
from dist_transformer.tracking.feed import Feed, Report, Sink
from dist_transformer.tracking.jsonl import FILE_NAME, LineFile, Row, decode, encode, to_plain

Event = Literal["train", "eval", "checkpoint", "alert"]
Value = float | int | str | list[list[str]]
"""A table of texts is decoded samples: source, output, reference."""

_RESERVED = frozenset({"event", "step", "row", "time", "trainer/restarts"})


class MetricsLog:
    """Writes every event to `metrics.jsonl` and offers it to the sinks. For rank 0 only.

    `log` neither blocks on a sink nor raises: a full disk is reported once and counted (`rows_lost`), and
    reported again when writing works again. Row numbers go on where the file ends, so they never fall,
    however often the run restarts; `trainer/restarts` counts how often it did.
    """

    def __init__(
        self,
        run_dir: Path,
        sinks: Sequence[Sink] = (),
        report: Report | None = None,
        announce: Report = lambda where: None,
        open_timeout: float = 10.0,
    ) -> None:
        """Open the log of `run_dir` and start the sinks, which connect in the background.

        Args:
            report: gets sentences for the person who watches, from several threads; by default they go to the
                `dist_transformer.tracking` logger as warnings.
            announce: gets a line for each sink, once it is connected, that tells where to look; from their threads.
            open_timeout: seconds to wait, at most, until the sinks are connected.
        """
        self.path = run_dir / FILE_NAME
        self.rows_lost = 0
        self._report = report or logging.getLogger("dist_transformer.tracking").warning
        self._outage_rows, self._written_since = 0, 0
        self._closed = False
        self._file: LineFile | None = None
        self._lock = (
            threading.RLock()
        )  # A watchdog's thread logs alerts; a signal handler may log inside `log`.
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._file = LineFile(self.path)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror or error}") from error
        last = self._file.last_row or {"row": -1, "trainer/restarts": -1}
        # A torn row may have reached a dashboard: its number is not given out twice.
        self._next_row = int(last.get("row", -1)) + 1 + self._file.was_torn
        self._restarts = int(last.get("trainer/restarts", 0)) + 1
        self._feeds = [Feed(sink, self._report, announce) for sink in sinks]
        deadline = time.monotonic() + open_timeout
        for feed in self._feeds:
            feed.wait_opened(max(0.0, deadline - time.monotonic()))

    def log(self, event: Event, step: int, values: Mapping[str, Value]) -> None:
        """Record one event. One row an event and step: all evaluation sets of a step go into one row."""
        plain = {str(key): to_plain(value) for key, value in values.items() if key not in _RESERVED}
        with self._lock:
            row: Row = {
                "event": event,
                "step": int(step),
                "row": self._next_row,
                "time": round(time.time(), 3),
                "trainer/restarts": self._restarts,
                **plain,
            }
            self._next_row += 1
            self._keep(row)
            for feed in self._feeds:
                feed.offer(row)

    def where(self) -> list[str]:
        """Lines that tell a person where to look at the run."""
        return [line for feed in self._feeds if (line := feed.sink.where())]

    @property
    def n_restarts(self) -> int:
        """How often the run was started before."""
        return self._restarts

    @property
    def stop_requested(self) -> bool:
        """Whether somebody pressed a dashboard's stop button."""
        return any(feed.sink.stop_requested for feed in self._feeds)

    def counters(self) -> dict[str, int]:
        """Rows that did not arrive: `tracking/rows_lost` on disk, `tracking/<sink>_dropped` and `_failed`."""
        counts = {"tracking/rows_lost": self.rows_lost}
        for feed in self._feeds:
            counts[f"tracking/{feed.sink.name}_dropped"] = feed.n_dropped
            counts[f"tracking/{feed.sink.name}_failed"] = feed.n_failed
        return counts

    def close(self, exit_code: int = 0, timeout: float = 60.0, preempted: bool = False) -> bool:
        """Flush the sinks and close the file, in `timeout` seconds or a few more; whether all sinks finished.

        `preempted` tells dashboards that the run will come back.
        """
        if self._closed:
            return True
        self._closed = True
        deadline = time.monotonic() + timeout
        for feed in self._feeds:
            feed.close(exit_code, preempted)
        finished = [feed.join(deadline) for feed in self._feeds]
        if self._file is not None:
            with contextlib.suppress(OSError):  # Said when writing failed; there is nothing left to do here.
                self._file.close()
        return all(finished)

    def _keep(self, row: Row) -> None:
        """Write the row to disk; what fails is counted, and said once an outage."""
        try:
            if self._closed or self._file is None:
                raise OSError("the log is closed")
            self._file.append(encode(row))
        except OSError as error:
            self.rows_lost += 1
            self._outage_rows += 1
            self._written_since = 0
            if self._outage_rows == 1:
                self._say(
                    f"{self.path} cannot be written ({error.strerror or error}): the run goes on without"
                )
            return
        if self._outage_rows:
            # On a disk that is almost full, a short row fits now and then: that is no end of the outage.
            self._written_since += 1
            if self._written_since >= 10:
                self._say(f"{self.path} is written again; {self._outage_rows} rows are missing there")
                self._outage_rows = 0

    def _say(self, text: str) -> None:
        with contextlib.suppress(Exception):  # A broken terminal is no reason to stop training.
            self._report(text)


def read_metrics(run_dir: Path, last_wins: bool = False) -> list[Row]:
    """All rows of a run, in the order they were written; also of one that is running, or that crashed.

    `last_wins`: a step that was trained or evaluated again after a restart counts once, with its newest
    rows, and rows come in the order of steps. Lines that are no rows (a torn last line) are left out.
    """
    path = run_dir / FILE_NAME
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: is {run_dir} a run directory?") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    rows = [row for line in lines if (row := decode(line)) is not None]
    return newest_rows(rows) if last_wins else rows


def newest_rows(rows: Sequence[Row]) -> list[Row]:
    """Of rows with the same event and step, those of the last process that wrote such a row."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        group = groups.setdefault((row["event"], row["step"]), [])
        if group and group[-1].get("trainer/restarts") != row.get("trainer/restarts"):
            group.clear()
        group.append(row)
    kept = [row for group in groups.values() for row in group]
    return sorted(kept, key=lambda row: (row["step"], row.get("row", 0)))
