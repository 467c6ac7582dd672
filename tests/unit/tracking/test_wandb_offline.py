"""W&B without a server: real offline runs of real processes, read back from their transaction logs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_transformer.config import TrackingConfig, WandbConfig
from dist_transformer.tracking import MetricsLog, build_sinks, check_tracking, read_metrics
from dist_transformer.tracking.wandb_log import find_tail, history, last_step, wandb_files
from dist_transformer.tracking.wandb_sink import core_pid
from tests.tools.wandb_log import axes, kinds, run_record

pytestmark = pytest.mark.usefixtures("clean_wandb")
OFFLINE = TrackingConfig(wandb=WandbConfig(mode="offline", project="unit", tags=("a",)))

_PROCESS = """
import sys, time
from pathlib import Path
from dist_transformer.config import TrackingConfig, WandbConfig
from dist_transformer.tracking import MetricsLog, build_sinks
run_dir, first, last, pause = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
tracking = TrackingConfig(wandb=WandbConfig(mode="offline"))
log = MetricsLog(run_dir, build_sinks(tracking, run_dir, {"model": {"d_model": 8}}))
for step in range(first, last):
    log.log("train", step, {"train/loss": 1 / (step + 1), "trainer/tokens_seen": step * 100})
    print(step, flush=True)
    time.sleep(pause)
log.close()
"""


def start(run_dir: Path, first: int, last: int, pause: float = 0.0) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", _PROCESS, str(run_dir), str(first), str(last), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_samples_are_a_table(tmp_path: Path) -> None:
    samples = [["A dog.", "Ein Hund.", "Ein Hund."], ["two\nlines", "", "zwei"]]
    log = MetricsLog(tmp_path, build_sinks(OFFLINE, tmp_path, {}))
    log.log("eval", 10, {"eval/news/loss": 2.0, "samples/news": samples})
    log.log("eval", 20, {"eval/news/loss": 1.0, "samples/news": samples[:1]})
    assert log.close()
    rows = [row for path in wandb_files(tmp_path) for row in history(path)]
    assert [row["eval/news/loss"] for row in rows] == [2.0, 1.0]
    assert [row["samples/news._type"] for row in rows] == ["table-file"] * 2
    assert [row["samples/news.nrows"] for row in rows] == [2, 1]
    [first, _] = sorted((tmp_path / "wandb").rglob("*.table.json"), key=lambda path: -path.stat().st_size)
    content = json.loads(first.read_text())
    assert content == {"columns": ["source", "output", "reference"], "data": samples}
    assert read_metrics(tmp_path)[0]["samples/news"] == samples


def test_every_row_is_read_back_with_its_axes_and_configuration(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "runs/first"
    log = MetricsLog(
        run_dir, build_sinks(OFFLINE, run_dir, {"model": {"d_model": 8, "tied": True}, "betas": [0.9, 0.98]})
    )
    for step in range(10, 310, 10):
        log.log(
            "train", step, {"train/loss": 3 / step, "trainer/tokens_seen": step * 64, "perf/mfu_pct": 41.5}
        )
        if step % 100 == 0:
            log.log("eval", step, {"eval/news/loss": 4 / step})
    log.log("train", 310, {"train/loss": float("nan"), "data/fingerprint": "f00d"})
    where = log.where()
    assert log.close(exit_code=0)

    (file,) = wandb_files(run_dir)
    rows, logged = history(file), read_metrics(run_dir)
    assert [row["_step"] for row in rows] == [row["row"] for row in logged] == list(range(34))
    for row, expected in zip(rows[:-1], logged[:-1], strict=True):
        for key in expected.keys() - {"event", "step", "row", "time"}:
            assert row[key] == expected[key], key
        assert row["trainer/step"] == expected["step"]
    # An evaluation without a token count is placed where training was.
    assert [row["trainer/tokens_seen"] for row in rows if "eval/news/loss" in row] == [6400, 12800, 19200]
    assert rows[-1]["data/fingerprint"] == "f00d" and rows[-1]["train/loss"] != rows[-1]["train/loss"]
    tokens, step_axis = "trainer/tokens_seen", "trainer/step"
    found = axes(file)
    assert found["train/*"] == found["eval/*"] == tokens
    assert found["perf/*"] == found["memory/*"] == found["time/*"] == step_axis
    run = run_record(file)
    assert (run.run_id, run.project, run.display_name, list(run.tags)) == (
        json.loads((run_dir / "tracking.json").read_text())["wandb"]["run_id"],
        "unit",
        "first",
        ["a"],
    )
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["model"] == {"d_model": 8, "tied": True} and config["betas"] == [0.9, 0.98]
    folder = file.parent.relative_to(tmp_path)
    assert where == [f"W&B offline run in {folder}; upload with: dist-transformer track sync runs/first"]
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""
    # Nothing outside the run directory.
    assert [path for path in Path(os.environ["HOME"]).rglob("*") if path.is_file()] == []


def test_a_killed_process_keeps_rows_and_its_successor_goes_on_with_the_same_run(tmp_path: Path) -> None:
    child = start(tmp_path, 0, 10**6, pause=0.05)
    assert child.stdout is not None
    until = time.monotonic() + 3.0
    times: dict[int, float] = {}
    while not times or time.monotonic() < until:
        step = int(child.stdout.readline())
        if not times:
            until = time.monotonic() + 3.0
        times[step] = time.monotonic()
    child.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    child.wait()
    (first,) = wandb_files(tmp_path)
    kept = [row["_step"] for row in history(first)]
    assert kept == list(range(len(kept)))
    must_have = [step for step, logged in times.items() if logged < killed - 1.5]
    assert len(must_have) > 15 and max(must_have) in kept
    on_disk = [row["step"] for row in read_metrics(tmp_path)]
    assert on_disk[: len(times)] == list(times)

    again = start(tmp_path, on_disk[-1] - 5, on_disk[-1] + 5)
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 0 and errors == ""
    _, second = wandb_files(tmp_path)
    assert run_record(first).run_id == run_record(second).run_id
    resumed = history(second)
    # Steps are replayed; W&B's own counter still only rises, so it keeps them all.
    assert [row["trainer/step"] for row in resumed] == list(range(on_disk[-1] - 5, on_disk[-1] + 5))
    assert [row["_step"] for row in resumed] == list(range(len(on_disk), len(on_disk) + 10))
    assert {row["trainer/restarts"] for row in resumed} == {1}
    assert find_tail(second).n_torn_bytes == 0 and find_tail(second).n_records > 10


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_when_the_helper_dies_or_hangs_the_run_goes_on(tmp_path: Path, how: signal.Signals) -> None:
    said: list[str] = []
    sinks = build_sinks(OFFLINE, tmp_path, {}, said.append)
    log = MetricsLog(tmp_path, sinks, report=said.append)
    log._feeds[0]._stall_s = 0.5  # Instead of a minute.
    log._feeds[0]._capacity = 200
    for step in range(50):
        log.log("train", step, {"train/loss": 1.0, "trainer/tokens_seen": step})
    time.sleep(1.5)
    helper = core_pid()
    assert helper is not None
    os.kill(helper, how)
    slowest, n_rows = 0.0, 50
    until = time.monotonic() + 15
    while time.monotonic() < until and not any("goes on" in text for text in said):
        started = time.perf_counter()
        log.log("train", n_rows, {"train/loss": 1.0, "trainer/tokens_seen": n_rows})
        slowest = max(slowest, time.perf_counter() - started)
        n_rows += 1
        time.sleep(0.002)
    assert any("lost its helper process" in text for text in said), said
    time.sleep(1.0)  # The queue, full while the helper hung, empties.
    log.log("train", n_rows, {"train/loss": 2.0})
    assert log.close(timeout=20), said
    assert slowest < 0.5
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(n_rows + 1))
    first, second = wandb_files(tmp_path)
    assert run_record(first).run_id == run_record(second).run_id
    steps = [row["trainer/step"] for file in (first, second) for row in history(file)]
    if (
        how == signal.SIGKILL
    ):  # A helper that died costs nothing; one that hangs costs what the queue cannot hold.
        assert steps == list(range(n_rows + 1))
    assert set(range(50)) <= set(steps) and n_rows in steps
    assert len(steps) == len(set(steps))


def test_a_helper_that_dies_of_the_signal_that_preempts_the_job_costs_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    log = MetricsLog(tmp_path, build_sinks(OFFLINE, tmp_path, {}, said.append), report=said.append)
    for step in range(300):
        log.log("train", step, {"train/loss": 1.0, "note": "x" * 1000})
    time.sleep(0.5)
    for how_many in (1, 2):
        helper = core_pid()
        assert helper is not None
        os.kill(helper, signal.SIGTERM)
        if how_many == 1:
            log.log("checkpoint", 300, {"checkpoint/save_s": 1.5})
            until = time.monotonic() + 10
            while not said and time.monotonic() < until:
                time.sleep(0.02)
    assert log.close(exit_code=143, timeout=20, preempted=True)
    # The second loss goes unnoticed where the helper has read everything before the signal ends it.
    assert 1 <= len(said) <= 2 and "lost its helper process" in said[0]
    files = wandb_files(tmp_path)
    assert [row["trainer/step"] for file in files for row in history(file)] == list(range(301))
    last = kinds(files[-1])
    assert [record.exit.exit_code for kind, record in last if kind == "exit"] == [143]
    assert any(kind == "preempting" for kind, _ in last)


_STUCK_AT_THE_END = """
import os, signal, sys, time
from pathlib import Path
from dist_transformer.config import TrackingConfig, WandbConfig
from dist_transformer.tracking import MetricsLog, build_sinks
from dist_transformer.tracking.wandb_sink import core_pid
run_dir = Path(sys.argv[1])
log = MetricsLog(run_dir, build_sinks(TrackingConfig(wandb=WandbConfig(mode="offline")), run_dir, {}))
log.log("train", 1, {"train/loss": 1.0})
time.sleep(0.5)
os.kill(core_pid(), signal.SIGSTOP)
started = time.monotonic()
print(log.close(timeout=1.0), time.monotonic() - started < 4, flush=True)
"""


def test_a_helper_that_hangs_at_the_end_cannot_keep_the_process_alive(tmp_path: Path) -> None:
    started = time.monotonic()
    command = [sys.executable, "-c", _STUCK_AT_THE_END, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "False True\n"), done.stderr
    assert "did not finish in time" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert time.monotonic() - started < 15


_KILLED_THEN_STOPPED = """
import os, signal, sys, time
from pathlib import Path
from dist_transformer.config import TrackingConfig, WandbConfig
from dist_transformer.tracking import MetricsLog, build_sinks
from dist_transformer.tracking.wandb_log import records, wandb_files
from dist_transformer.tracking.wandb_sink import core_pid
run_dir, said = Path(sys.argv[1]), []
sinks = build_sinks(TrackingConfig(wandb=WandbConfig(mode="offline")), run_dir, {}, said.append, resumed_step=0)
log = MetricsLog(run_dir, sinks, said.append, open_timeout=60)
for step in range(1, 101):
    log.log("train", step, {"train/loss": 1.0})
    if step == 30:
        until = time.monotonic() + 30  # for the first description of the run to be on disk
        while time.monotonic() < until and not any(
            record.WhichOneof("record_type") == "run" for file in wandb_files(run_dir) for record, _ in records(file)
        ):
            time.sleep(0.1)
        os.kill(core_pid(), signal.SIGKILL)
    if step == 60:
        until = time.monotonic() + 30
        while not said and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(2)  # what the new helper has flushes within a second
        os.kill(core_pid(), signal.SIGSTOP)
finished = log.close(timeout=3.0)
print(finished, len([text for text in said if "lost its helper process" in text]), flush=True)
"""


def test_a_helper_killed_and_its_successor_stopped(tmp_path: Path) -> None:
    """The run ends normally and in time, all rows are in JSONL, and the dashboard run was opened again."""
    command = [sys.executable, "-c", _KILLED_THEN_STOPPED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert (done.returncode, done.stdout) == (0, "False 1\n"), done.stderr
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 101))
    first, second = wandb_files(tmp_path)
    assert run_record(first).run_id == run_record(second).run_id
    steps = [row["trainer/step"] for file in (first, second) for row in history(file)]
    assert steps[:60] == list(range(1, 61)) and len(steps) == len(set(steps))


def test_no_dashboard_is_opened_where_it_is_switched_off(tmp_path: Path) -> None:
    assert build_sinks(TrackingConfig(wandb=WandbConfig(mode="disabled")), tmp_path, {}) == []
    os.environ["WANDB_MODE"] = "disabled"
    assert build_sinks(TrackingConfig(), tmp_path, {}) == []
    assert not (tmp_path / "tracking.json").exists()
    check_tracking(TrackingConfig())


@pytest.mark.parametrize("look_back", [1, 40_000, 10**9])
def test_the_last_step_is_found_however_the_log_was_cut(tmp_path: Path, look_back: int) -> None:
    log = MetricsLog(tmp_path, build_sinks(OFFLINE, tmp_path, {}))
    for step in range(40):
        log.log("train", step, {"note": "y" * 3000})  # Rows that cross blocks.
    assert log.close()
    (file,) = wandb_files(tmp_path)
    content = file.read_bytes()
    cut_log = tmp_path / "cut.wandb"
    for cut in [*range(len(content) - 60_000, len(content), 1500), len(content)]:
        cut_log.write_bytes(content[:cut])
        expected = max(row["_step"] for row in history(cut_log))
        found = last_step(cut_log, look_back)
        assert found == expected or (look_back < 60_000 and found is None), cut
    if look_back > 1:
        assert last_step(file, look_back) == 39
    assert last_step(tmp_path / "missing.wandb") is None
