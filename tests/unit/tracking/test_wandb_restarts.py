"""A run that is killed again and again is one dashboard run, whose curves never go back."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from dist_transformer.tracking import read_metrics
from dist_transformer.tracking.wandb_log import find_tail, history, is_uploaded, marker_of, wandb_files
from tests.tools.fake_wandb import FakeWandb
from tests.tools.wandb_log import run_record

pytestmark = pytest.mark.usefixtures("clean_wandb")

# Trains from one step to another and says so; the value of a step depends on nothing else, as in a real run.
_PROCESS = """
import sys, time
from pathlib import Path
from dist_transformer.config import TrackingConfig, WandbConfig
from dist_transformer.tracking import MetricsLog, build_sinks
run_dir, mode, resumed, last = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
pause = float(sys.argv[5])
sinks = build_sinks(TrackingConfig(wandb=WandbConfig(mode=mode)), run_dir, {"seed": 1}, resumed_step=resumed)
log = MetricsLog(run_dir, sinks)
if log.n_restarts:
    log.log("alert", resumed, {"alert/kind": "restart"})
for step in range(resumed + 1, last + 1):
    log.log("train", step, {"train/loss": 1 / step, "trainer/tokens_seen": step * 100})
    if step % 10 == 0:
        log.log("eval", step, {"eval/news/loss": 2 / step})
        log.log("checkpoint", step, {"checkpoint/save_s": 0.1})
    print(step, flush=True)
    time.sleep(pause)
log.close()
"""


def train(run_dir: Path, resumed: int, last: int, mode: str = "offline", kill_at: int | None = None) -> None:
    """A process that goes on after `resumed`; killed some time after it has done step `kill_at`."""
    command = [sys.executable, "-c", _PROCESS, str(run_dir), mode, str(resumed), str(last), "0.04"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == kill_at:
            process.send_signal(signal.SIGKILL)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (0 if kill_at is None else -signal.SIGKILL), errors


def check_curves(rows: Sequence[dict[str, object]], last: int) -> None:
    """Every step of both curves once, in order, on both axes."""
    train_rows = [row for row in rows if "train/loss" in row]
    assert [row["trainer/step"] for row in train_rows] == list(range(1, last + 1))
    assert [row["trainer/tokens_seen"] for row in train_rows] == [100 * n for n in range(1, last + 1)]
    assert [row["train/loss"] for row in train_rows] == [1 / n for n in range(1, last + 1)]
    evals = [row["trainer/step"] for row in rows if "eval/news/loss" in row]
    assert evals == list(range(10, last + 1, 10))
    steps = [int(str(row["_step"])) for row in rows]
    assert all(a < b for a, b in itertools.pairwise(steps))
    places = [int(str(row["trainer/step"])) for row in rows]
    assert all(a <= b for a, b in itertools.pairwise(places))
    assert sum(row.get("alert/kind") == "restart" for row in rows) == 3, rows


def test_three_kills_offline(tmp_path: Path) -> None:
    """The last kill comes right after a checkpoint: some rows that count had not reached wandb's file."""
    train(tmp_path, 0, 10**6, kill_at=37)
    train(
        tmp_path, 30, 10**6, kill_at=45
    )  # also its checkpoint of step 40 is lost, as if it had been damaged
    train(tmp_path, 30, 10**6, kill_at=60)
    train(tmp_path, 60, 80)
    files = wandb_files(tmp_path)
    assert len(files) == 4
    assert len({run_record(file).run_id for file in files if find_tail(file).n_records > 1}) == 1
    check_curves([row for file in files for row in history(file)], 80)
    # The truth has what was lost, too, and readers take the last.
    steps = [row["step"] for row in read_metrics(tmp_path) if row["event"] == "train"]
    assert len(steps) > 80
    kept = [row["step"] for row in read_metrics(tmp_path, last_wins=True) if row["event"] == "train"]
    assert kept == list(range(1, 81))


def test_killed_before_the_first_checkpoint(tmp_path: Path) -> None:
    train(tmp_path, 0, 10**6, kill_at=35)
    train(tmp_path, 0, 20)
    files = wandb_files(tmp_path)
    rows = [row["trainer/step"] for file in files for row in history(file) if "train/loss" in row]
    assert rows == list(range(1, 21))


@pytest.fixture
def server(clean_wandb: None) -> Iterator[FakeWandb]:
    fake = FakeWandb().start()
    os.environ.update(WANDB_BASE_URL=fake.url, WANDB_API_KEY="k" * 40)
    yield fake
    fake.stop()


def test_three_kills_online(server: FakeWandb, tmp_path: Path) -> None:
    """What the server has of lost steps stays, and equals what is trained again."""
    for resumed, kill_at in ((0, 37), (30, 45), (40, 60)):
        train(tmp_path, resumed, 10**6, "online", kill_at)
        time.sleep(1.0)  # wandb-core outlives its process for a moment
    train(tmp_path, 60, 80, "online")
    assert len(server.state.runs) == 1
    (run,) = server.state.runs.values()
    check_curves(run.history, 80)


def test_a_run_that_was_offline_goes_online(server: FakeWandb, tmp_path: Path) -> None:
    """The server gets everything, and the offline logs are marked, so that no sync doubles them."""
    for resumed, kill_at in ((0, 37), (30, 45), (40, 60)):
        train(tmp_path, resumed, 10**6, "offline", kill_at)
    train(tmp_path, 60, 80, "online")
    (run,) = server.state.runs.values()
    rows = [row for row in run.history if "train/loss" in row]
    assert [row["trainer/step"] for row in rows] == list(range(1, 81))
    assert json.loads((tmp_path / "tracking.json").read_text())["wandb"]["run_id"] in server.state.runs
    offline = [file for file in wandb_files(tmp_path) if file.parent.name.startswith("offline-")]
    assert len(offline) == 3 and all(marker_of(file).exists() and is_uploaded(file) for file in offline)
