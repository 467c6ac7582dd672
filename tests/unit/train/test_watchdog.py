"""The watchdog leaves alone what is in time, and names what is not."""

import threading
import time
from pathlib import Path

import pytest

from dist_transformer.config import FaultsConfig
from dist_transformer.tracking.heartbeats import clear_beats, read_beats, write_beat
from dist_transformer.train.watchdog import EXIT_CODE, Watchdog


def limits(step_s: float) -> FaultsConfig:
    return FaultsConfig(step_limit_s=step_s, start_limit_s=60, side_limit_s=60, heartbeat_s=0.05)


def test_a_hang_ends_the_process_with_stacks_and_a_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    clear_beats(tmp_path)
    write_beat(tmp_path, 1, "waiting for data", 4, 0.0, "a")  # and never again
    sentences: list[str] = []
    left: list[int] = []
    done = threading.Event()

    def leave(code: int) -> None:
        left.append(code)
        done.set()

    dog = Watchdog(tmp_path, 0, "a", limits(0.5), sentences.append, leave)
    dog.enter("training", 4)
    assert done.wait(timeout=30)
    assert left == [EXIT_CODE]
    assert "rank 0 on " in sentences[0]
    assert "training (step 4) for more than 0.5 s" in sentences[0]
    assert "rank 1 on " in sentences[0]
    assert "no sign of life" in sentences[0]
    stacks = (tmp_path / "heartbeats" / "rank-00000.stacks.txt").read_text()
    assert "test_a_hang_ends_the_process" in stacks, "the main thread's Python stack"
    assert sentences[0] in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_report_that_fails_ends_the_process_too(tmp_path: Path) -> None:
    """The disk may be full, or what hangs."""
    left: list[int] = []
    done = threading.Event()

    def leave(code: int) -> None:
        left.append(code)
        done.set()

    def fail(_: str) -> None:
        raise OSError(28, "No space left on device")

    dog = Watchdog(tmp_path / "gone", 0, "a", limits(0.2), fail, leave)
    dog.enter("training", 4)
    assert done.wait(timeout=30)
    assert left == [EXIT_CODE]


def test_a_short_limit_after_long_work_is_no_hang(tmp_path: Path) -> None:
    """Read at any instant, new limit and old beginning never stand together."""
    dog = Watchdog(tmp_path, 0, "a", limits(60), lambda _: None, lambda _: None)
    seen: list[tuple[float, float]] = []

    class Watched(Watchdog):
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value)
            seen.append((self._limit_s, self._entered))

    dog.close()
    dog.__class__ = Watched
    dog.enter("evaluating", 1, limit_s=1000)
    began = dog._entered
    seen.clear()
    dog.enter("training", 1)
    assert seen[-1][0] == 60
    assert all(entered > began for limit, entered in seen if limit == 60)


def test_work_in_time_is_left_alone(tmp_path: Path) -> None:
    clear_beats(tmp_path)
    left: list[int] = []
    dog = Watchdog(tmp_path, 0, "a", limits(10), lambda _: None, left.append)
    for step in range(1, 4):
        dog.enter("training", step)
        time.sleep(0.1)
    with dog.side_work("evaluating", 3):
        time.sleep(0.1)
        assert read_beats(tmp_path)[0].phase in ("training", "evaluating")
    dog.close()
    assert not left
    assert read_beats(tmp_path, "a")[0].step == 3
