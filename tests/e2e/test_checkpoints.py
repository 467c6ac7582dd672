"""Checkpoints through the public command: another layout, kills at any instant, a disk that takes no more."""

import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_transformer.checkpoints.folder import latest_checkpoint
from dist_transformer.tracking import read_metrics
from tests.e2e.conftest import LIMIT_S, command, environment, launch, steps_of
from tests.e2e.test_bad_input import contents

WriteConfig = Callable[..., Path]
N_KILLS = 5
RELATIVE = 1e-4


def test_another_number_of_ranks_and_another_stage(
    tmp_path: Path, pair_shards: Path, write_config: WriteConfig
) -> None:
    """Two ranks with ZeRO 3, then one process with ZeRO 1: same data, same losses; said in one line."""
    config = write_config(
        pair_shards,
        model={"dropout": 0.0},
        data={"fingerprint": True},
        train={"steps": 14},
        evaluate={"every": 100},
    )
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    done = launch(config, "--nproc", 2, f"run.dir={whole}", "parallel.zero_stage=3")
    assert done.returncode == 0, done.stdout + done.stderr
    first = launch(config, "--nproc", 2, f"run.dir={moved}", "parallel.zero_stage=3", "train.steps=4")
    assert first.returncode == 0, first.stdout + first.stderr
    second = command("train", config, f"run.dir={moved}", "parallel.zero_stage=1")
    assert second.returncode == 0, second.stdout + second.stderr
    assert (
        "step-00000004 was saved with dp 2 x tp 1, ZeRO 3, fp32; this run has dp 1 x tp 1, ZeRO 1, fp32: "
        "dropout is seeded anew" in " ".join(second.stdout.split())
    )
    expected, actual = steps_of(read_metrics(whole)), steps_of(read_metrics(moved))
    assert sorted(actual) == sorted(expected) == list(range(1, 15))
    for step, row in expected.items():
        assert actual[step]["data/fingerprint"] == row["data/fingerprint"]
        assert actual[step]["train/loss"] == pytest.approx(row["train/loss"], rel=RELATIVE), step
        assert actual[step]["trainer/tokens_seen"] == row["trainer/tokens_seen"]


def test_killed_while_saving(tmp_path: Path, pair_shards: Path, write_config: WriteConfig) -> None:
    """SIGKILL at random instants of a run that always saves: `latest` verifies, and the next start goes on from it."""
    config = write_config(
        pair_shards, train={"steps": 100_000}, checkpoint={"every": 1}, evaluate={"every": 100_000}
    )
    run_dir, generator, steps = tmp_path / "run", random.Random(11), [0]
    for _ in range(N_KILLS):
        process = subprocess.Popen(
            [sys.executable, "-m", "dist_transformer", "train", str(config)],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        wait_for_newer(run_dir, steps[-1], process)
        time.sleep(generator.uniform(0.0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        verified = command("checkpoint", "verify", run_dir)
        assert verified.returncode == 0, verified.stdout + verified.stderr
        steps.append(latest_step(run_dir))
    assert steps == sorted(set(steps))
    done = command("train", config, f"train.steps={steps[-1] + 2}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resuming after step {steps[-1]:,}" in done.stdout


def latest_step(run_dir: Path) -> int:
    path = latest_checkpoint(run_dir)
    return 0 if path is None else int(path.name.removeprefix("step-"))


def wait_for_newer(run_dir: Path, step: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + LIMIT_S
    while latest_step(run_dir) <= step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.02)


def test_a_disk_that_takes_no_more(tmp_path: Path, pair_shards: Path, write_config: WriteConfig) -> None:
    """Every rank goes on training, says so at each save, and ends with 1 after the last; the first checkpoint stays."""
    config = write_config(pair_shards, train={"steps": 4}, checkpoint={"every": 2}, evaluate={"every": 100})
    run_dir = tmp_path / "run"
    done = command("train", config, "train.steps=1")
    assert done.returncode == 0, done.stderr
    n_bytes = (run_dir / "checkpoints" / "step-00000001" / "rank-00000.safetensors").stat().st_size
    limit = n_bytes // 2
    failed = subprocess.run(
        [sys.executable, "-m", "dist_transformer", "train", str(config)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert "Traceback" not in failed.stderr
    [sentence] = [line for line in failed.stderr.splitlines() if "was not saved" in line]
    assert "the checkpoint of step 4 was not saved" in sentence
    assert "File too large" in sentence
    assert "step-00000001 is still whole" in sentence
    rows = read_metrics(run_dir)
    assert sorted(steps_of(rows)) == [1, 2, 3, 4]
    alerts = [str(row["alert/text"]) for row in rows if row.get("alert/kind") == "checkpoint"]
    assert len(alerts) == 2
    assert "the checkpoint of step 2 was not saved" in alerts[0]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["latest", "step-00000001"]
    again = command("train", config)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resuming after step 1 " in again.stdout
    assert latest_step(run_dir) == 4


def test_a_disk_that_takes_no_more_ends_the_run_where_wanted(
    tmp_path: Path, pair_shards: Path, write_config: WriteConfig
) -> None:
    """With two ranks: both end at the failed save, one sentence, the checkpoint before stays whole."""
    config = write_config(
        pair_shards,
        train={"steps": 9},
        checkpoint={"every": 2, "on_failed_save": "end", "asynchronous": False},
        evaluate={"every": 100},
    )
    run_dir = tmp_path / "run"
    done = launch(config, "--nproc", 2, "train.steps=1")
    assert done.returncode == 0, done.stdout + done.stderr
    n_bytes = (run_dir / "checkpoints" / "step-00000001" / "rank-00001.safetensors").stat().st_size
    failed = launch(config, "--nproc", 2, max_file_bytes=n_bytes // 2)
    said = failed.stdout + failed.stderr
    assert failed.returncode == 1, said
    assert "Traceback" not in said
    assert said.count("the same command goes on from there") == 1
    assert "the checkpoint of step 2 was not saved: rank 0" in said
    assert sorted(steps_of(read_metrics(run_dir))) == [1, 2]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["latest", "step-00000001"]


@pytest.mark.parametrize(
    ("n_ranks", "override", "sentence"),
    [
        (2, "data.workers=3", "2 ranks x 3 workers need a multiple of 6 lanes"),
        (2, "parallel.tp_degree=4", "does not divide the encoder's n_heads=2"),
        (3, "parallel.tp_degree=2", "does not divide the 3 ranks of this run"),
        (3, "parallel.zero_stage=1", "make train.global_batch_size a multiple of 3"),
    ],
    ids=["lanes", "heads", "ranks", "batch"],
)
def test_a_checkpoint_whose_layout_cannot_be_met(
    tmp_path: Path, pair_shards: Path, write_config: WriteConfig, n_ranks: int, override: str, sentence: str
) -> None:
    """Each rank ends, one speaks, and the checkpoint is as it was."""
    config = write_config(pair_shards, train={"steps": 2})
    done = command("train", config)
    assert done.returncode == 0, done.stderr
    before = contents(tmp_path / "run" / "checkpoints")
    refused = launch(config, "--nproc", n_ranks, override, "train.steps=4")
    said = refused.stdout + refused.stderr
    assert refused.returncode in (1, 2), said
    assert said.count(sentence) == 1, said
    assert "Traceback" not in said
    assert contents(tmp_path / "run" / "checkpoints") == before


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, pair_shards: Path, write_config: WriteConfig
) -> None:
    """Found before the first step, on every rank, and said once."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file in the way")
    done = launch(write_config(pair_shards), "--nproc", 2)
    assert done.returncode == 1, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert said.count("checkpoints: File exists") == 1
    assert "Traceback" not in said
    assert "step 1/" not in said
