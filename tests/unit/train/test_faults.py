"""Signals ask once and interrupt the second time; bad updates in a row end the run."""

import signal
import subprocess
import sys

import pytest

from dist_transformer.errors import UserError
from dist_transformer.train.faults import BadSteps, StopSignals

PROGRAM = """
import os, signal, sys
from dist_transformer.train.faults import StopSignals
stop = StopSignals()
assert stop.received is None
try:
    for name in sys.argv[1:]:
        os.kill(os.getpid(), getattr(signal, name))
        print(stop.received, flush=True)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_what_another_rank_received() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        stop = StopSignals()
        stop.learn([None, None])
        assert stop.received is None
        stop.learn([None, "SIGTERM", "SIGUSR1"])
        assert stop.received == "SIGTERM"
        stop.learn(["SIGUSR1"])
        assert stop.received == "SIGTERM"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("signals", "printed"),
    [
        (["SIGTERM"], ["SIGTERM"]),
        (["SIGUSR1"], ["SIGUSR1"]),
        (["SIGINT"], ["SIGINT"]),
        (["SIGTERM", "SIGTERM", "SIGUSR1"], ["SIGTERM", "SIGTERM", "SIGUSR1"]),
        (["SIGINT", "SIGINT"], ["SIGINT", "interrupted"]),
        # A scheduler's request does not make a person's first Ctrl-C the second one.
        (["SIGTERM", "SIGINT", "SIGINT"], ["SIGTERM", "SIGINT", "interrupted"]),
    ],
)
def test_signals(signals: list[str], printed: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *signals], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == printed


def test_a_signal_ends_a_process_that_does_not_listen() -> None:
    """What the handlers are for."""
    code = "import os, signal; os.kill(os.getpid(), signal.SIGUSR1)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -signal.SIGUSR1


def test_bad_steps_in_a_row() -> None:
    bad = BadSteps(limit=3, n_before=5)
    for step, applied in enumerate([True, False, False, True, False, False], start=1):
        bad.record(applied)
        bad.check(step)
    assert (bad.total, bad.in_a_row) == (9, 2)
    bad.record(False)
    with pytest.raises(UserError) as caught:
        bad.check(7)
    sentence = str(caught.value)
    assert "step 7: loss or gradient was not finite in 3 updates in a row" in sentence
    assert "lower optimizer.lr" in sentence
    assert "\n" not in sentence
    assert bad.total == 10


def test_the_first_bad_step_can_be_the_last() -> None:
    bad = BadSteps(limit=1)
    bad.record(True)
    bad.check(1)
    bad.record(False)
    with pytest.raises(UserError):
        bad.check(2)
