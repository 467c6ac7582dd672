"""How runs end, and whether they start again."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from dist_transformer.tracking.exits import (
    EXITS_NAME,
    Reason,
    begin_attempt,
    close_lost_attempt,
    decide_restart,
    end_attempt,
    newest_step,
    read_exits,
    signal_reason,
)
from dist_transformer.tracking.heartbeats import clear_beats, write_beat


def set_checkpoint(run_dir: Path, step: int) -> None:
    (run_dir / "checkpoints").mkdir(exist_ok=True)
    (run_dir / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")


def run_once(run_dir: Path, reason: Reason, checkpoint_step: int) -> None:
    begin_attempt(run_dir, 0)
    if checkpoint_step:
        set_checkpoint(run_dir, checkpoint_step)
    assert end_attempt(run_dir, reason, checkpoint_step + 3, "why") is not None


def test_an_end_is_one_line_however_often_it_is_reported(tmp_path: Path) -> None:
    assert begin_attempt(tmp_path, 5) is None
    first = end_attempt(tmp_path, "done", 9, "all well")
    assert first is not None
    assert end_attempt(tmp_path, "crash", 9) is None
    assert [end.reason for end in read_exits(tmp_path)] == ["done"]
    assert read_exits(tmp_path)[0] == first
    assert first.started <= first.ended
    assert first.step == 9


def test_an_attempt_without_an_end_was_killed(tmp_path: Path) -> None:
    begin_attempt(tmp_path, 5)
    clear_beats(tmp_path)
    write_beat(tmp_path, 0, "training", 17, 0.0, "a")
    write_beat(tmp_path, 1, "training", 16, 0.0, "a")
    set_checkpoint(tmp_path, 10)
    lost = begin_attempt(tmp_path, 10)
    assert lost is not None
    assert (lost.reason, lost.step, lost.checkpoint_step) == ("killed", 17, 10)
    assert [end.reason for end in read_exits(tmp_path)] == ["killed"]
    assert close_lost_attempt(tmp_path) is not None, "the second attempt is open too"
    assert close_lost_attempt(tmp_path) is None


def _report(run_dir: Path, queue: "multiprocessing.Queue[bool]") -> None:
    queue.put(end_attempt(run_dir, "watchdog", 1, str(os.getpid())) is not None)


def test_of_many_ranks_that_report_one_is_heard(tmp_path: Path) -> None:
    begin_attempt(tmp_path, 0)
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[bool] = context.Queue()
    ranks = [context.Process(target=_report, args=(tmp_path, queue)) for _ in range(4)]
    for process in ranks:
        process.start()
    heard = [queue.get(timeout=30) for _ in ranks]
    for process in ranks:
        process.join()
    assert sum(heard) == 1
    assert len(read_exits(tmp_path)) == 1


def test_a_torn_line_does_not_hide_the_others(tmp_path: Path) -> None:
    run_once(tmp_path, "preempted", 4)
    with (tmp_path / EXITS_NAME).open("a") as file:
        file.write(json.dumps({"reason": "done"})[:9])
    assert [end.reason for end in read_exits(tmp_path)] == ["preempted"]


@pytest.mark.parametrize(
    "history, restart, why",
    [
        ([], True, "not ended"),
        ([("done", 9)], False, "all steps"),
        ([("stopped", 9)], False, "by hand"),
        ([("nonfinite", 9)], False, "same way again: why"),
        ([("error", 0)], False, "same way again"),
        ([("preempted", 4)], True, "saved at step 4"),
        ([("preempted", 4), ("preempted", 6)], True, "saved at step 6"),
        ([("preempted", 4), ("preempted", 4)], True, "saved at step 4"),
        ([("preempted", 3), ("preempted", 4), ("preempted", 4)], True, "saved at step 4"),
        ([("preempted", 4), ("preempted", 4), ("preempted", 4)], False, "asked to stop 3 times before"),
        ([("killed", 0)], True, "failure 1 of at most 2"),
        ([("killed", 4), ("crash", 4)], True, "failure 2 of at most 2"),
        (
            [("killed", 4), ("crash", 4), ("watchdog", 4)],
            False,
            "failed 3 times without getting beyond step 4",
        ),
        ([("killed", 4), ("crash", 4), ("watchdog", 5)], True, "failure 1 of at most 2"),
        ([("killed", 4), ("crash", 4), ("preempted", 4), ("watchdog", 4)], True, "failure 1 of"),
    ],
)
def test_restarts_end_where_they_do_not_help(
    tmp_path: Path, history: list[tuple[Reason, int]], restart: bool, why: str
) -> None:
    for reason, step in history:
        run_once(tmp_path, reason, step)
    decision = decide_restart(tmp_path, limit=2)
    assert decision.restart == restart
    assert why in decision.why


def test_newest_step_is_that_of_latest(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == 0
    set_checkpoint(tmp_path, 123)
    assert newest_step(tmp_path) == 123


def test_why_a_signal_came(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)
    assert signal_reason("SIGTERM") == "signal"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert signal_reason("SIGUSR1") == "preempted"
    assert signal_reason("SIGINT") == "signal"
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000000000")
    assert signal_reason("SIGUSR1") == "time_limit"
