"""What a person reads: plain lines without a terminal, one live line on a real (pseudo-)terminal."""

import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest

from dist_transformer.tracking.console import Console, human_count, human_time, train_fields

VALUES = {
    "train/loss": 4.3214,
    "train/lr": 1e-3,
    "train/grad_norm": 0.871,
    "perf/tokens_per_sec": 12345.0,
    "perf/step_time_s": 0.25,
}


def test_plain_lines_without_a_terminal() -> None:
    stream = io.StringIO()
    console = Console(1000, stream=stream)
    console.train(120, VALUES)
    console.evaluation(
        120, {"eval/news/loss": 2.31449, "eval/news/bleu": 21.5, "eval/sentences": 1500, "step": 120}
    )
    console.message("saved checkpoints/step-00000120")
    console.train(130, {"train/loss": float("nan")})
    console.close()
    assert stream.getvalue().splitlines() == [
        "step 120/1,000  loss 4.321  lr 1.0e-03  gnorm 0.87  12.3k tok/s  eta 3m 40s",
        "eval at step 120  news loss 2.314  news bleu 21.500  sentences 1,500",
        "saved checkpoints/step-00000120",
        "step 130/1,000  loss nan  eta 3m 38s",
    ]


def test_time_left_leaves_out_pauses() -> None:
    now = [0.0]
    stream = io.StringIO()
    console = Console(1100, start_step=100, stream=stream, clock=lambda: now[0])
    for step in range(110, 200, 10):
        now[0] += 20.0  # 2 s a step.
        console.train(step, {})
        if step == 150:
            now[0] += 5000.0
            console.evaluation(step, {"eval/loss": 1.0})
        if step == 170:
            console.pause()
            now[0] += 5000.0
    lines = [line for line in stream.getvalue().splitlines() if line.startswith("step")]
    assert lines[0] == "step 110/1,100"  # Start-up is no measure of a step.
    assert lines[-1] == f"step 190/1,100  eta {human_time(910 * 2.0)}"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7.4, "7"),
        (999.4, "999"),
        (999.6, "1.00k"),
        (12345, "12.3k"),
        (99_960, "100k"),
        (999_600, "1.00M"),
        (1.5e9, "1.50G"),
        (2.5e16, "25000T"),
        (float("nan"), "nan"),
        (-2500, "-2.50k"),
    ],
)
def test_counts_have_three_digits(number: float, text: str) -> None:
    assert human_count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (59.6, "1m 00s"),
        (200, "3m 20s"),
        (3600, "1h 00m"),
        (93_784, "1d 2h"),
        (float("inf"), "?"),
    ],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert human_time(seconds) == text


def test_missing_and_strange_values_are_left_out() -> None:
    assert train_fields({}, None) == {}
    assert train_fields({"train/loss": "broken", "train/lr": None}, None) == {}


def test_a_broken_pipe_or_a_closed_stream_silences_it() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        console = Console(10, stream=stream)
        console.train(1, VALUES)
        console.message("nobody reads this")
        console.close()
        # What could not be written is still in the stream's buffer: let its end find no broken pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)
    closed = io.StringIO()
    closed.close()
    Console(10, stream=closed).train(1, VALUES)


_CHILD = """
import sys, time
from dist_transformer.tracking import Console
console = Console(1000, start_step=100)
for step in range(110, 400, 10):
    console.train(step, {"train/loss": 1000 / step, "train/lr": 1e-3, "train/grad_norm": 0.5,
                         "perf/tokens_per_sec": 98765.0, "perf/step_time_s": 0.1})
    if step == 200:
        console.evaluation(step, {"eval/news/loss": 2.5})
        console.message("a [bold]literal[/bold] line " + "x" * 150)
        print("from elsewhere", file=sys.stderr)
        sys.stdin.readline()
    time.sleep(0.05)
console.close()
print("after")
"""

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_terminal(columns: list[int]) -> tuple[str, int]:
    """Run the child on a pseudo-terminal that is resized midway; its output and where that was."""
    master, slave = pty.openpty()

    def resize(width: int) -> None:
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))

    resize(columns[0])
    environment = {
        key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")
    }
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**environment, "TERM": "xterm-256color"},
        start_new_session=True,
    )
    os.close(slave)
    output, resized_at = b"", 0
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:
        if not select.select([master], [], [], 0.5)[0]:
            continue
        try:
            chunk = os.read(master, 65536)
        except OSError:  # The child has gone, and its terminal with it.
            break
        output += chunk
        if not resized_at and b"from elsewhere" in output:
            resize(columns[1])
            child.send_signal(signal.SIGWINCH)
            time.sleep(0.4)
            output += os.read(master, 65536)
            resized_at = len(output.decode(errors="replace"))
            os.write(master, b"\n")
    os.close(master)
    assert child.wait(timeout=10) == 0, output
    return output.decode(), resized_at


def test_a_live_line_on_a_terminal_survives_resizing() -> None:
    output, resized_at = on_terminal([120, 46])
    plain = _ESCAPE.sub("", output)
    assert "eval at step 200  news loss 2.500" in plain
    assert "a [bold]literal[/bold] line " + "x" * 150 in plain.replace("\r\n", "")
    assert "from elsewhere" in plain and plain.rstrip().endswith("after")
    wide = [line for line in re.split(r"[\r\n]+", _ESCAPE.sub("", output[:resized_at])) if "step 1" in line]
    assert any(
        "loss" in line and "gnorm 0.50" in line and "98.8k tok/s" in line and "eta" in line for line in wide
    )
    assert any("━" in line for line in wide)
    narrow = [line for line in re.split(r"[\r\n]+", _ESCAPE.sub("", output[resized_at:])) if "step 3" in line]
    assert narrow and all(len(line) <= 46 for line in narrow)
    assert all("loss" in line and "gnorm" not in line for line in narrow)
    assert "step 390/1,000" in narrow[-1]
    # The terminal is given back with its cursor.
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")


def test_a_tiny_terminal_still_shows_the_step() -> None:
    output, _ = on_terminal([18, 12])
    lines = [line for line in re.split(r"[\r\n]+", _ESCAPE.sub("", output)) if line.startswith("step ")]
    assert lines and all(len(line) <= 18 for line in lines)
