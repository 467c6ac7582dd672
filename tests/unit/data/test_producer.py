"""A process that produces ahead: its values in order, its errors as they are, and no waiting for a dead one."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_transformer.data.producer import Producer
from dist_transformer.errors import DataError


def numbers(n: int) -> Iterator[int]:
    yield from range(n)
    raise DataError("there are no more")


def a_bug() -> Iterator[int]:
    yield 1
    raise KeyError("nobody thought of this")


def unpicklable() -> Iterator[Any]:
    yield 1
    yield threading.Lock()


def killed_in_the_middle_of_a_message() -> Iterator[bytes]:
    yield b""
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
    yield bytes(100_000_000)  # more than the pipe holds: its reader waits meanwhile
    time.sleep(60)


def test_values_in_order_then_the_error() -> None:
    producer = Producer(numbers, 50, ahead=3)
    assert [producer.next() for _ in range(50)] == list(range(50))
    with pytest.raises(DataError, match=r"^there are no more$"):
        producer.next()
    producer.close()
    producer.close()


def test_a_bug_keeps_its_traceback() -> None:
    producer = Producer(a_bug, ahead=1)
    assert producer.next() == 1
    with pytest.raises(RuntimeError, match="in a loader worker:") as found:
        producer.next()
    assert "in a_bug" in str(found.value) and "nobody thought of this" in str(found.value)
    producer.close()


def test_what_cannot_be_sent_is_an_error_not_a_hang() -> None:
    producer = Producer(unpicklable, ahead=1)
    assert producer.next() == 1
    with pytest.raises(DataError, match=r"a loader worker died \(exit code 1\)"):
        producer.next()
    producer.close()


def test_death_in_the_middle_of_a_message() -> None:
    """Another process is alive: it must not hold the pipe's other end."""
    other, producer = Producer(numbers, 5, ahead=1), Producer(killed_in_the_middle_of_a_message, ahead=1)
    assert producer.next() == b""
    time.sleep(2)
    with pytest.raises(DataError, match=r"a loader worker died \(killed by SIGKILL\)"):
        producer.next()
    assert other.next() == 0
    producer.close()
    other.close()


def test_closed_while_it_waits_to_send() -> None:
    producer = Producer(numbers, 1000, ahead=1)
    assert producer.next() == 0
    started = time.monotonic()
    producer.close()
    assert time.monotonic() - started < 5
    with pytest.raises(DataError, match="a loader worker died"):
        producer.next()


def test_a_worker_does_without_torch(tmp_path: Path) -> None:
    """It would cost each rank's fork server seconds, and memory for good. The main script has imported it."""
    script = tmp_path / "main.py"
    script.write_text(_LOOKS_FOR_TORCH)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout == "False\n"


def test_signals_of_schedulers_do_not_reach_workers() -> None:
    """Nor the server they come from: it would take its workers with it."""
    done = subprocess.run(
        [sys.executable, "-c", _SHOWS_MASK], capture_output=True, text=True, timeout=100, check=True
    )
    blocked = int(done.stdout, 16)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        assert blocked >> (number - 1) & 1, number.name


_SHOWS_MASK = """
from multiprocessing import forkserver
from pathlib import Path
from dist_transformer.data.fork_server import start_fork_server

start_fork_server()
status = Path(f"/proc/{forkserver._forkserver._forkserver_pid}/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk")))
"""
_LOOKS_FOR_TORCH = """
import sys
from dist_transformer.data import loader
from dist_transformer.data.producer import Producer

def has_torch():
    yield "torch" in sys.modules

if __name__ == "__main__":
    import torch
    print(Producer(has_torch, ahead=1).next())
"""
