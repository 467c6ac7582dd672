"""`metrics.jsonl`: whole after any crash, strict, numbered, and never in the way of the loop."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_transformer.errors import UserError
from dist_transformer.tracking import MetricsLog, read_metrics


def strict_rows(path: Path) -> list[dict[str, Any]]:
    """Parse as the strictest readers do: every line an object, no NaN or Infinity literals."""

    def refuse(literal: str) -> None:
        raise AssertionError(f"{literal} is not JSON")

    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


class ListSink:
    """Keeps what it gets; a subclass misbehaves."""

    stop_requested = False

    def __init__(self, name: str = "list") -> None:
        self.name = name
        self.rows: list[dict[str, Any]] = []
        self.closed: tuple[int, bool] | None = None
        self.interrupted = threading.Event()

    def open(self) -> None:
        pass

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def close(self, exit_code: int, preempted: bool) -> None:
        self.closed = (exit_code, preempted)

    def interrupt(self) -> None:
        self.interrupted.set()

    def abandon(self) -> None:
        self.interrupted.set()

    def where(self) -> str:
        return f"see {self.name}"


def test_rows_come_back_as_logged_and_strict_parsers_accept_them(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.log("train", 1, {"train/loss": 2.5, "data/fingerprint": "ab\ud800c\n\u2028", "n": 3})
    log.log("train", 2, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/lr": -math.inf})
    log.log(
        "eval",
        2,
        {"eval/news/loss": np.float32(1.5), "eval/news/bleu": torch.tensor(21.25), "flag": np.bool_(True)},
    )
    log.log("alert", 3, {"step": 99, "row": 99, "what": torch.ones(2)})  # type: ignore[dict-item]
    assert log.close()

    raw = strict_rows(tmp_path / "metrics.jsonl")
    assert raw[1]["train/loss"] is None
    assert raw[1]["nonfinite"] == {"train/loss": "nan", "train/grad_norm": "inf", "train/lr": "-inf"}
    rows = read_metrics(tmp_path)
    assert [row["event"] for row in rows] == ["train", "train", "eval", "alert"]
    assert rows[0]["data/fingerprint"] == "ab\ud800c\n\u2028"
    assert math.isnan(rows[1]["train/loss"]) and rows[1]["train/grad_norm"] == math.inf
    assert rows[1]["train/lr"] == -math.inf and "nonfinite" not in rows[1]
    assert (rows[2]["eval/news/loss"], rows[2]["eval/news/bleu"], rows[2]["flag"]) == (1.5, 21.25, True)
    assert (rows[3]["step"], rows[3]["row"]) == (3, 3) and rows[3]["what"].startswith("tensor(")
    assert all(abs(row["time"] - time.time()) < 60 for row in rows)


def test_a_restart_appends_and_goes_on_numbering(tmp_path: Path) -> None:
    for _process in range(3):
        log = MetricsLog(tmp_path)
        for step in range(4):
            log.log("train", step, {"train/loss": 1.0})
        log.close()
    rows = read_metrics(tmp_path)
    assert [row["row"] for row in rows] == list(range(12))
    assert [row["trainer/restarts"] for row in rows] == [0] * 4 + [1] * 4 + [2] * 4


def test_a_torn_last_line_is_mended_wherever_it_was_cut(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "whole")
    for step in range(3):
        log.log("train", step, {"train/loss": 0.125 * step, "note": "}\u00e9{"})
    log.close()
    whole = (tmp_path / "whole/metrics.jsonl").read_bytes()
    last_line = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(last_line, len(whole) + 1):
        run_dir = tmp_path / f"cut{cut}"
        run_dir.mkdir()
        (run_dir / "metrics.jsonl").write_bytes(whole[:cut])
        before = read_metrics(run_dir)
        log = MetricsLog(run_dir)
        log.log("train", 7, {"train/loss": 9.0})
        log.close()
        rows = strict_rows(run_dir / "metrics.jsonl")
        kept = 3 if cut >= len(whole) - 1 else 2
        assert [row["step"] for row in rows] == [*range(kept), 7], cut
        assert [row["step"] for row in before] == list(range(kept)), cut
        # The number of a lost row may be on a dashboard already: it is not used again.
        numbers = [row["row"] for row in rows]
        assert numbers == sorted(set(numbers)) and (kept == 3 or cut == last_line or numbers[-1] > 2), cut


def test_a_zero_filled_tail_as_after_a_power_cut_is_mended(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.log("train", 1, {"note": "x" * 100_000})  # Longer than one look back.
    log.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"event": "tr' + bytes(200_000))
    log = MetricsLog(tmp_path)
    log.log("train", 2, {})
    log.close()
    assert [row["step"] for row in strict_rows(tmp_path / "metrics.jsonl")] == [1, 2]


def test_replayed_steps_count_once_on_request(tmp_path: Path) -> None:
    def write(steps: range, loss: float) -> None:
        log = MetricsLog(tmp_path)
        for step in steps:
            log.log("train", step, {"train/loss": loss})
            if step == 4:
                log.log("eval", step, {"eval/a/loss": loss})
                log.log("eval", step, {"eval/b/loss": loss})
        log.close()

    write(range(6), 1.0)
    write(range(3, 8), 2.0)
    assert len(read_metrics(tmp_path)) == 15
    rows = read_metrics(tmp_path, last_wins=True)
    train = [(row["step"], row["train/loss"]) for row in rows if row["event"] == "train"]
    assert train == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0), (6, 2.0), (7, 2.0)]
    # Both rows that the same process wrote for one step stay.
    assert [row for row in rows if row["event"] == "eval"] == [
        row for row in read_metrics(tmp_path)[8:] if row["event"] == "eval"
    ]


def test_missing_files_and_places_that_cannot_be_written_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics.jsonl does not exist: is .* a run directory"):
        read_metrics(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.metrics.jsonl cannot be written: "):
        MetricsLog(tmp_path / "file")


_DISK_FULL = """
import resource, sys
from pathlib import Path
from dist_transformer.tracking import MetricsLog
said = []
log = MetricsLog(Path(sys.argv[1]), report=said.append)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
for step in range(100):
    log.log("train", step, {"train/loss": 1.0 / (step + 1)})
lost = log.rows_lost
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for step in range(100, 120):
    log.log("train", step, {"train/loss": 1.0 / (step + 1)})
log.close()
assert log.rows_lost == lost
print(lost, len(said), *said, sep="\\n")
"""


def test_a_full_disk_is_said_once_counted_and_leaves_whole_lines(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _DISK_FULL, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lost, n_said, first, second = done.stdout.splitlines()
    rows = strict_rows(tmp_path / "metrics.jsonl")
    assert 0 < int(lost) < 100 and len(rows) == 120 - int(lost)
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)) and steps[-20:] == list(range(100, 120))
    assert int(n_said) == 2 and "File too large" in first and f"{lost} rows are missing" in second


_KILLED = """
import sys
from pathlib import Path
from dist_transformer.tracking import MetricsLog
log = MetricsLog(Path(sys.argv[1]))
for step in range(10**6):
    log.log("train", step, {"train/loss": 1.0})
    print(step, flush=True)
"""


def test_a_killed_process_loses_no_row_that_was_logged(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    seen = [int(child.stdout.readline()) for _ in range(500)]
    child.send_signal(signal.SIGKILL)
    seen += [int(line) for line in child.stdout.read().split()]
    child.wait()
    steps = [row["step"] for row in strict_rows(tmp_path / "metrics.jsonl")]
    assert steps == list(range(len(steps))) and seen[-1] in steps


def test_a_stuck_sink_never_blocks_the_loop_and_close_is_bounded(tmp_path: Path) -> None:
    class Stuck(ListSink):
        def write(self, row: dict[str, Any]) -> None:
            self.interrupted.wait(60)
            raise ConnectionError("interrupted")

    said: list[str] = []
    stuck, good = Stuck("stuck"), ListSink("good")
    log = MetricsLog(tmp_path, [stuck, good], report=said.append)
    slowest = 0.0
    for step in range(6000):
        started = time.perf_counter()
        log.log("train", step, {"train/loss": 1.0})
        slowest = max(slowest, time.perf_counter() - started)
    assert slowest < 0.5
    started = time.perf_counter()
    assert not log.close(timeout=1.0)
    assert time.perf_counter() - started < 3
    counts = log.counters()
    assert counts["tracking/stuck_dropped"] >= 6000 - 1 - counts["tracking/stuck_failed"]
    assert stuck.interrupted.is_set()
    assert len(good.rows) + counts["tracking/good_dropped"] == 6000 and good.closed == (0, False)
    assert len(strict_rows(tmp_path / "metrics.jsonl")) == 6000 and counts["tracking/rows_lost"] == 0
    assert any("stuck does not keep up" in text for text in said) and any(
        "did not finish" in text for text in said
    )


def test_a_sink_blocked_for_long_is_interrupted_while_the_run_goes_on() -> None:
    from dist_transformer.tracking.feed import Feed

    class StuckOnce(ListSink):
        def write(self, row: dict[str, Any]) -> None:
            if not self.interrupted.is_set():
                self.interrupted.wait(30)
                raise ConnectionError("interrupted")
            super().write(row)

    sink, said = StuckOnce(), list[str]()
    feed = Feed(sink, said.append, capacity=10, stall_s=0.2)
    deadline = time.monotonic() + 10
    number = 0
    while not sink.rows and time.monotonic() < deadline:
        feed.offer({"row": number})
        number += 1
        time.sleep(0.01)
    feed.close(3, True)
    assert feed.join(time.monotonic() + 5) and sink.closed == (3, True)
    assert sink.rows and feed.n_failed == 1 and feed.n_dropped > 0
    assert len(sink.rows) + feed.n_failed + feed.n_dropped == number


@pytest.mark.parametrize("error", [ValueError("broken"), SystemExit(3), KeyboardInterrupt()])
def test_a_raising_sink_is_said_once_and_turned_off(tmp_path: Path, error: BaseException) -> None:
    class Raising(ListSink):
        def write(self, row: dict[str, Any]) -> None:
            raise error

    said: list[str] = []
    bad, good = Raising("bad"), ListSink("good")
    log = MetricsLog(tmp_path, [bad, good], report=said.append)
    for step in range(200):
        log.log("train", step, {"train/loss": 1.0})
    log.close(exit_code=143, preempted=True)
    assert [row["step"] for row in good.rows] == list(range(200)) and good.closed == (143, True)
    assert (
        len(said) == 2 and "bad refused row 0" in said[0] and "off for this run after 20 failures" in said[1]
    )
    assert log.counters()["tracking/bad_failed"] == 20 and bad.interrupted.is_set() and bad.closed


def test_a_sink_that_cannot_open_and_a_report_that_fails_do_not_matter(tmp_path: Path) -> None:
    class Unopened(ListSink):
        def open(self) -> None:
            raise OSError("no such server")

    def broken_report(text: str) -> None:
        raise BrokenPipeError(text)

    slow_to_open = ListSink("slow")
    slow_to_open.open = lambda: time.sleep(1.5)  # type: ignore[method-assign]
    started = time.monotonic()
    log = MetricsLog(tmp_path, [Unopened(), slow_to_open], report=broken_report, open_timeout=0.2)
    assert time.monotonic() - started < 1
    log.log("train", 1, {"train/loss": 1.0})
    assert log.close(timeout=10)
    assert len(slow_to_open.rows) == 1 and len(read_metrics(tmp_path)) == 1
    log.log("train", 2, {})  # After closing: counted, no error.
    assert log.rows_lost == 1


def test_threads_may_log_at_the_same_time(tmp_path: Path) -> None:
    sink = ListSink()
    log = MetricsLog(tmp_path, [sink])
    threads = [
        threading.Thread(target=lambda: [log.log("alert", step, {"pid": os.getpid()}) for step in range(300)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert [row["row"] for row in strict_rows(tmp_path / "metrics.jsonl")] == list(range(1200))
    assert [row["row"] for row in sink.rows] == list(range(1200))
