"""Two ranks, killed three times: one dashboard run, every step once, and accounts that add up to the wall time."""

import itertools
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_transformer.tracking import read_metrics
from dist_transformer.tracking.wandb_log import find_tail, history, wandb_files
from tests.e2e.conftest import launch
from tests.e2e.test_resume import start, wait_for
from tests.tools.wandb_log import run_record

# Four starts in one fixture: on a busy machine more than the usual limit.
pytestmark = pytest.mark.timeout(900)
N_STEPS = 70
ACCOUNTS = ("compute", "communication", "input", "checkpoint", "evaluation", "other")


def descendants(pid: int) -> Iterator[int]:
    """The processes that a process started, and theirs."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            child, parent = int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if parent == pid:
            yield child
            yield from descendants(child)


def kill(process: "subprocess.Popen[bytes]", run_dir: Path, n_restarts: int) -> None:
    """As a node that dies: everything at once, as soon as this process has logged some steps."""

    def has_trained() -> bool:
        path = run_dir / "metrics.jsonl"
        rows = read_metrics(run_dir) if path.exists() else []
        own = [row for row in rows if row["event"] == "train" and row["trainer/restarts"] == n_restarts]
        return len(own) >= 8

    wait_for(has_trained, limit_s=400)
    for pid in [*descendants(process.pid), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def run_dir(
    tmp_path_factory: pytest.TempPathFactory, pair_shards: Path, module_config: Callable[..., Path]
) -> Path:
    run_dir = tmp_path_factory.mktemp("killed") / "run"
    config = module_config(
        pair_shards,
        run={"dir": str(run_dir)},
        train={"steps": N_STEPS},
        checkpoint={"every": 5, "keep": 2, "asynchronous": False},
        evaluate={"every": 20, "batches": 1, "samples": 2},
        generate={"beam_size": 1, "max_len": 8},
        tracking={"every": 1, "wandb": {"mode": "offline"}},
    )
    for n_restarts in range(3):
        kill(start(config, "--nproc", 2), run_dir, n_restarts)
    started = time.time()
    done = launch(config, "--nproc", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    (run_dir / "last_start.txt").write_text(str(started))
    return run_dir


def test_one_dashboard_run_with_every_step_once(run_dir: Path) -> None:
    files = wandb_files(run_dir)
    assert len(files) == 4
    # wandb's own process writes behind ours: what is killed early may leave a log with nothing but its first record.
    run_ids = {run_record(file).run_id for file in files if find_tail(file).n_records > 1}
    assert run_ids == {json.loads((run_dir / "tracking.json").read_text())["wandb"]["run_id"]}
    rows = [row for file in files for row in history(file)]
    plotted = [row for row in rows if "train/loss" in row]
    assert [row["trainer/step"] for row in plotted] == list(range(1, N_STEPS + 1))
    tokens = [row["trainer/tokens_seen"] for row in plotted]
    assert all(a < b for a, b in itertools.pairwise(tokens))
    truth = [row for row in read_metrics(run_dir, last_wins=True) if row["event"] == "train"]
    assert [row["train/loss"] for row in plotted] == [row["train/loss"] for row in truth]
    evals = [row["trainer/step"] for row in rows if any(key.startswith("eval/") for key in row)]
    assert evals == [20, 40, 60, N_STEPS]
    assert sum(row.get("alert/kind") == "restart" for row in rows) == 3


def test_accounts_add_up_to_the_wall_time(run_dir: Path) -> None:
    """Measured from outside: from the rows' own times, within 3 % (and what cannot be seen of starting Python)."""
    rows = [row for row in read_metrics(run_dir) if row["event"] == "train" and row["trainer/restarts"] == 3]
    started = float((run_dir / "last_start.txt").read_text())
    last = rows[-1]
    total = sum(last[f"time/{name}_s"] for name in ACCOUNTS)
    assert total == pytest.approx(last["time/wall_s"])
    for first in (rows[0], rows[1]):
        accounted = sum(last[f"time/{name}_s"] - first[f"time/{name}_s"] for name in ACCOUNTS)
        assert accounted == pytest.approx(last["time"] - first["time"], rel=0.03, abs=0.02)
    # The ranks' own launcher starts first; it is a small part.
    assert total <= last["time"] - started + 0.1
    assert all(last[f"time/{name}_s"] > 0 for name in ACCOUNTS)
    # Steps are measured a second time, one by one; the accounts of steps are those seconds.
    steps = sum(row["perf/step_time_s"] for row in rows)
    assert sum(last[f"time/{name}_s"] for name in ACCOUNTS[:3]) == pytest.approx(steps, rel=0.03)


def test_goodput_counts_restarts(run_dir: Path) -> None:
    rows = [row for row in read_metrics(run_dir) if row["event"] == "train"]
    newest = [row for row in read_metrics(run_dir, last_wins=True) if row["event"] == "train"]
    whole_s = rows[-1]["time"] - rows[0]["time"] + rows[0]["time/wall_s"]
    trained_s = sum(row["perf/step_time_s"] for row in newest)
    assert rows[-1]["perf/goodput_pct"] == pytest.approx(100 * trained_s / whole_s, rel=0.05)
    assert 0 < rows[-1]["perf/goodput_pct"] < 100
    alerts = [
        row for row in read_metrics(run_dir) if row["event"] == "alert" and row["alert/kind"] == "restart"
    ]
    steps = [row["step"] for row in alerts]
    assert len(steps) == 3 and steps == sorted(steps) and all(step and step % 5 == 0 for step in steps)
    assert f"goes on after step {steps[-1]}" in alerts[-1]["alert/text"]


def test_figures_of_a_step(run_dir: Path) -> None:
    rows = [row for row in read_metrics(run_dir) if row["event"] == "train"]
    for row in rows:
        assert 0 < row["perf/mfu_pct"] < row["perf/hfu_pct"] < 200
        both = row["perf/source_tokens_per_sec"] + row["perf/target_tokens_per_sec"]
        assert both == pytest.approx(row["perf/tokens_per_sec"])
        low, high = sorted((row["perf/source_padding_pct"], row["perf/target_padding_pct"]))
        assert 0 <= low <= row["perf/padding_pct"] + 1e-9 <= high + 1e-9 < 100
        assert row["perf/straggler_rank"] in (0, 1)
        assert row["perf/work_time_mean_rank_s"] <= row["perf/work_time_max_rank_s"]
        assert 0 < row["perf/communication_pct"] < 100 and 0 <= row["perf/data_time_pct"] < 100
