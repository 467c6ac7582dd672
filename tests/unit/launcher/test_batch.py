"""What batch scripts ask: the answers before ranks start and after they have ended."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dist_transformer.checkpoints.folder import FORMAT
from dist_transformer.errors import ConfigError, LaunchError
from dist_transformer.launcher import batch
from dist_transformer.launcher.batch import as_shell, begin_job, end_job
from dist_transformer.tracking.exits import Reason, begin_attempt, end_attempt, read_exits
from dist_transformer.tracking.heartbeats import clear_beats, write_beat


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration of 20 steps; no job around it."""
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    tree = {
        "run": {"dir": str(tmp_path / "run dir")},
        "data": {"train": "shards", "eval": "shards"},
        "train": {"steps": 20, "global_batch_size": 8, "micro_batch_size": 2},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    run_dir = tmp_path / "run dir"
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(tree))
    return path


def run_of(config: Path) -> Path:
    return config.parent / "run dir"


def save(run_dir: Path, step: int) -> None:
    (run_dir / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")


def run_once(run_dir: Path, reason: Reason, step: int, message: str = "") -> None:
    begin_attempt(run_dir, 0)
    if step:
        save(run_dir, step)
    end_attempt(run_dir, reason, step, message)


def test_a_run_is_finished_when_its_steps_are_done(config: Path) -> None:
    assert begin_job(str(config), []).finished == ""
    run_once(run_of(config), "done", 20)
    assert begin_job(str(config), []).finished == "step-00000020 of 20 steps"
    assert begin_job(str(config), ["train.steps=30"]).finished == ""
    assert end_job(run_of(config), 3, 0).verdict == "finished"


@pytest.mark.parametrize("evaluated, is_finished", [(0, False), (10, False), (20, True), (None, True)])
def test_without_its_last_evaluation_a_run_is_not_finished(
    config: Path, evaluated: int | None, is_finished: bool
) -> None:
    """It was stopped in the evaluation after its last step; an older checkpoint does not say."""
    run_once(run_of(config), "time_limit", 20)
    checkpoint = run_of(config) / "checkpoints" / "step-00000020"
    checkpoint.mkdir()
    state = {"step": 20, "evaluated_step": evaluated}
    (checkpoint / "trainer.json").write_text(json.dumps({"format": FORMAT, "state": state}))
    assert bool(begin_job(str(config), []).finished) == is_finished
    assert end_job(run_of(config), 3, 0).verdict == "restart"
    if not is_finished:
        assert begin_job(str(config), ["data.eval=null"]).finished == "step-00000020 of 20 steps"


def test_a_run_that_stopped_early_is_finished_until_somebody_asks_for_more(config: Path) -> None:
    run_once(run_of(config), "early_stopped", 12, "no better for 4 evaluations")
    assert begin_job(str(config), []).finished == "no better for 4 evaluations"
    assert begin_job(str(config), ["train.steps=30"]).finished == ""
    more = ["train.early_stopping.metric=eval/shards/loss", "train.early_stopping.patience=9"]
    assert begin_job(str(config), more).finished == ""
    verdict = end_job(run_of(config), 3, 0)
    assert (verdict.verdict, verdict.why) == ("finished", "no better for 4 evaluations")


@pytest.mark.parametrize(
    "reason, n_ends, verdict",
    [
        ("crash", 0, "restart"),
        ("preempted", 0, "restart"),
        ("error", 0, "stop"),
        ("stopped", 0, "stop"),
        ("crash", 1, "not_begun"),
    ],
)
def test_the_verdict(config: Path, reason: Reason, n_ends: int, verdict: str) -> None:
    run_once(run_of(config), reason, 4)
    assert end_job(run_of(config), 3, n_ends).verdict == verdict


def test_a_run_that_is_alive_is_never_recorded_as_killed(config: Path) -> None:
    run_dir = run_of(config)
    begin_attempt(run_dir, 0)  # by this very process
    for ask in (lambda: begin_job(str(config), []), lambda: end_job(run_dir, 3, 0)):
        with pytest.raises(LaunchError, match=f"is being trained by process {os.getpid()} on .*cancel"):
            ask()
    assert read_exits(run_dir) == []
    assert end_attempt(run_dir, "done", 20) is not None, "its own end is still recorded"


def test_ranks_elsewhere_are_alive_while_they_give_signs(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = run_of(config)
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    begin_attempt(run_dir, 0)
    clear_beats(run_dir)
    write_beat(run_dir, 0, "training", 3, 0.0, "a")
    monkeypatch.undo()
    with pytest.raises(LaunchError, match="on elsewhere"):
        end_job(run_dir, 3, 0)
    now = time.time
    monkeypatch.setattr("time.time", lambda: now() + 100)
    assert end_job(run_dir, 3, 0).verdict == "restart"
    assert [end.reason for end in read_exits(run_dir)] == ["killed"]


def test_a_job_closes_what_it_left_open_itself(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    begin_attempt(run_of(config), 0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    began = begin_job(str(config), [])
    assert (began.n_ends, read_exits(run_of(config))[0].reason) == (1, "killed")


@pytest.mark.parametrize(
    "states, alive",
    [
        (["RUNNING"], True),
        (["COMPLETING", "COMPLETING", "CANCELLED"], False),
        (["FAILED"], False),
        ([""], False),
    ],
)
def test_another_job_is_asked_for(
    config: Path, monkeypatch: pytest.MonkeyPatch, states: list[str], alive: bool
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    begin_attempt(run_of(config), 0)
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    answers = iter(states)
    monkeypatch.setattr(batch, "has_slurm", lambda: True)
    monkeypatch.setattr(batch, "job_fields", lambda job: {"JobState": next(answers)} if job == "12" else {})
    monkeypatch.setattr("time.sleep", lambda _: None)
    if alive:
        with pytest.raises(LaunchError, match="is being trained by job 12"):
            begin_job(str(config), [])
    else:
        assert begin_job(str(config), []).n_ends == 1


def test_an_array_has_a_folder_for_each_seed(config: Path) -> None:
    assert begin_job(str(config), [], array_task=3).run_dir == config.parent / "run dir-seed3"
    with pytest.raises(ConfigError, match=r"train\.stepps"):
        begin_job(str(config), ["train.stepps=3"])


def test_a_shell_reads_the_answer(config: Path) -> None:
    run_once(run_of(config), "crash", 4)
    answer = as_shell(begin_job(str(config), []))
    done = subprocess.run(
        ["bash", "-c", 'eval "$1"; echo "$run_dir|$max_restarts|$n_ends|$checkpoint|$finished"', "_", answer],
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{run_of(config)}|3|1|step-00000004|\n"


def test_the_commands_import_no_torch(config: Path) -> None:
    code = (
        "import sys; from dist_transformer.cli import main; "
        "assert main(sys.argv[1:]) == 0; assert 'torch' not in sys.modules, 'torch'"
    )
    run_once(run_of(config), "crash", 4)
    for arguments in (("begin", str(config)), ("end", str(run_of(config)))):
        done = subprocess.run([sys.executable, "-c", code, "job", *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
