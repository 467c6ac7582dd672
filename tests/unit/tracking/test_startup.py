"""The parts of a start add up, those of the scripts before this process too."""

import time
from pathlib import Path

import pytest

from dist_transformer.tracking.startup import (
    STARTUP_NAME,
    StartClock,
    describe_start,
    last_start,
    record_start,
)


def test_phases_follow_each_other_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    # This process, which runs many tests, began long before.
    monkeypatch.setattr("dist_transformer.tracking.startup.process_age_s", lambda: 10.0)
    now = time.time()
    stamps = f"queue={now - 100:.0f} batch_script={now - 60} torchrun={now - 50:.1f} broken srun="
    clock = StartClock({"DIST_TRANSFORMER_CLOCK": stamps})
    assert clock.phase == "imports"
    clock.begin("model")
    time.sleep(0.05)
    clock.begin("first step")
    assert not clock.is_over
    seconds, cpu_seconds = clock.finish()
    assert clock.is_over
    assert list(seconds) == ["queue", "batch script", "torchrun", "imports", "model", "first step"]
    assert sum(seconds.values()) == pytest.approx(time.time() - now + 100, abs=1.0)
    assert seconds["queue"] == pytest.approx(40, abs=1.0)
    assert seconds["model"] >= 0.05
    assert list(cpu_seconds) == ["imports", "model", "first step"]
    assert all(cpu >= 0 for cpu in cpu_seconds.values())


def test_what_torchrun_starts_again_does_not_count_from_sbatch() -> None:
    stamps = {"DIST_TRANSFORMER_CLOCK": "batch_script=5 torchrun=6", "TORCHELASTIC_RESTART_COUNT": "1"}
    assert list(StartClock(stamps).finish()[0]) == ["imports"]


def test_a_start_is_a_line(tmp_path: Path) -> None:
    assert last_start(tmp_path) == {}
    record_start(tmp_path, 1, {"imports": 9.0}, {"imports": 2.0})
    record_start(tmp_path, 41, {"imports": 3.04, "model": 0.02, "first step": 1.0}, {"imports": 2.5})
    assert len((tmp_path / STARTUP_NAME).read_text().splitlines()) == 2
    assert describe_start(last_start(tmp_path)) == "first step after 4.1 s: imports 3.0, first step 1.0"
    assert (
        describe_start({"imports": 3.0}, {"imports": 2.5}) == "first step after 3.0 s: imports 3.0 (2.5 CPU)"
    )
    record_start(tmp_path / "nowhere", 1, {}, {})
