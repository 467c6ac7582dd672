"""A run that is killed and comes back is the run that was never killed, bit for bit."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dist_transformer.checkpoints.folder import latest_checkpoint
from dist_transformer.checkpoints.reader import load_weights
from dist_transformer.launcher.batch import begin_job
from dist_transformer.tracking import read_metrics
from dist_transformer.tracking.exits import read_exits
from dist_transformer.tracking.heartbeats import read_beats
from tests.e2e.conftest import ROOT, command, environment, launch, steps_of

WriteConfig = Callable[..., Path]
COMPARED = ("train/loss", "train/grad_norm", "train/lr", "trainer/tokens_seen", "data/fingerprint")


def losses(run_dir: Path) -> dict[int, tuple[object, ...]]:
    steps = steps_of(read_metrics(run_dir))
    return {step: tuple(row.get(key) for key in COMPARED) for step, row in steps.items()}


def wait_for(condition: Callable[[], bool], limit_s: float = 200) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.05)


def last_step(run_dir: Path) -> int:
    return max(losses(run_dir), default=0) if (run_dir / "metrics.jsonl").exists() else 0


def start(*arguments: str | Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [str(ROOT / "launch" / "local.sh"), *map(str, arguments)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


@pytest.mark.parametrize("stage", [2, 3])
def test_killed_and_resumed_equals_uninterrupted(
    stage: int, tmp_path: Path, pair_shards: Path, write_config: WriteConfig
) -> None:
    config = write_config(
        pair_shards, parallel={"zero_stage": stage}, data={"fingerprint": True}, checkpoint={"every": 10}
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = launch(config, "--nproc", 2, f"run.dir={whole}")
    assert done.returncode == 0, done.stdout + done.stderr

    process = start(config, "--nproc", 2, f"run.dir={broken}")
    # Saving goes on while training does: some steps after its step.
    wait_for(lambda: last_step(broken) >= 14 and latest_checkpoint(broken) is not None)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # torchrun's ranks have sessions of their own; a killed machine would take them too.
    subprocess.run(["pkill", "-KILL", "-f", f"run.dir={broken}"], check=False)
    latest = latest_checkpoint(broken)
    assert latest is not None
    saved = int(latest.name.removeprefix("step-"))
    assert saved in {10, 20, 30}
    again = launch(config, "--nproc", 2, f"run.dir={broken}")
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"resuming after step {saved}" in again.stdout

    expected, actual = losses(whole), losses(broken)
    assert sorted(expected) == list(range(1, 41))
    assert actual == expected
    first, second = (load_weights(run / "checkpoints" / "step-00000040") for run in (whole, broken))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sorted(path.name for path in (broken / "checkpoints").iterdir()) == [
        "latest",
        "step-00000030",
        "step-00000040",
    ]


def test_a_signal_saves_and_the_same_command_goes_on(
    tmp_path: Path, pair_shards: Path, write_config: WriteConfig
) -> None:
    evaluate = {"every": 1, "batches": 1}
    config = write_config(pair_shards, train={"steps": 4000}, checkpoint={"every": 3900}, evaluate=evaluate)
    run_dir = tmp_path / "run"
    process = start(config, "--nproc", 2)
    wait_for(lambda: last_step(run_dir) >= 3)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=100) == 0
    checkpoint = latest_checkpoint(run_dir)
    assert checkpoint is not None
    stopped_at = int(checkpoint.name.removeprefix("step-"))
    assert 3 <= stopped_at < 3900
    done = launch(config, "--nproc", 2, f"train.steps={stopped_at + 5}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(losses(run_dir)) == list(range(1, stopped_at + 6))
    # The stop did not wait for an evaluation; the next start made up for it.
    evaluated = [row["step"] for row in read_metrics(run_dir) if row["event"] == "eval"]
    assert evaluated == list(range(1, stopped_at + 6))


def test_a_stop_does_not_wait_for_an_evaluation(
    tmp_path: Path, pair_shards: Path, write_config: WriteConfig
) -> None:
    """At the start, in the middle, after the last step: saved at once, and evaluated by the next start.

    By a signal, and by the file STOP, for which every rank looks while texts are decoded.
    """
    config = write_config(
        pair_shards,
        train={"steps": 6},
        checkpoint={"every": 100, "best_metric": "eval/shards/loss"},
        evaluate={
            "every": 3, "at_start": True, "batches": 2, "metrics": ["bleu"], "sentences": 24, "samples": 2,
        },
        generate={"beam_size": 4, "max_len": 40, "batch_tokens": 1},  # a sentence at a time: some seconds
        faults={"heartbeat_s": 0.2},
        tracking={"every": 2, "wandb": {"mode": "disabled"}},
    )  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = launch(config, "--nproc", 2, f"run.dir={whole}")
    assert done.returncode == 0, done.stdout + done.stderr

    def evaluations(run_dir: Path) -> dict[int, object]:
        rows = [row for row in read_metrics(run_dir) if row["event"] == "eval"]
        assert len({row["step"] for row in rows}) == len(rows)
        return {row["step"]: (row["eval/shards/loss"], row["eval/shards/bleu"]) for row in rows}

    def evaluates(step: int) -> bool:
        beats = read_beats(broken)
        return len(beats) == 2 and all((beat.phase, beat.step) == ("evaluating", step) for beat in beats)

    for at, by_file, known in ((0, False, []), (3, True, [0]), (6, False, [0, 3])):
        process = start(config, "--nproc", 2, f"run.dir={broken}")
        wait_for(lambda at=at: evaluates(at))  # type: ignore[misc]
        if by_file:
            (broken / "STOP").touch()
        else:
            process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=100) == 0
        latest = latest_checkpoint(broken)
        assert (latest.name if latest else "") == (f"step-{at:08d}" if at else "")
        assert sorted(evaluations(broken) if at else []) == known
        assert read_exits(broken)[-1].reason == ("stopped" if by_file else "signal")
        assert begin_job(str(config), [f"run.dir={broken}"]).finished == ""
    for _ in range(2):
        done = launch(config, "--nproc", 2, f"run.dir={broken}")
        assert done.returncode == 0, done.stdout + done.stderr
        assert read_exits(broken)[-1].reason == "done"
    assert evaluations(broken) == evaluations(whole) and sorted(evaluations(whole)) == [0, 3, 6]
    # Every step is in some row, also those before a stop that no row was due for.
    assert max(steps_of(read_metrics(broken))) == 6 and 3 in steps_of(read_metrics(broken))
    bests = [(run / "checkpoints" / "best").read_text() for run in (whole, broken)]
    assert bests[0] == bests[1]


def test_done_early_by_an_evaluation_that_a_stop_had_left_out(
    tmp_path: Path, pair_shards: Path, write_config: WriteConfig
) -> None:
    """It is saved that the run is done, and which weights are the best: the same command ends at once."""
    early = {"metric": "eval/shards/loss", "min_delta": 50, "patience": 2}
    config = write_config(
        pair_shards,
        train={"steps": 3, "early_stopping": early},
        checkpoint={"every": 1, "best_metric": "eval/shards/loss"},
        evaluate={"every": 1, "batches": 1},
    )
    run_dir = tmp_path / "run"
    assert command("train", config, "train.steps=2").returncode == 0
    # As if the second step's evaluation had not been.
    description = run_dir / "checkpoints" / "step-00000002" / "trainer.json"
    tree = json.loads(description.read_text())
    first = {"metric": "eval/shards/loss", "value": 9.0, "step": 1}
    tree["state"] |= {"evaluated_step": 1, "best": first}
    description.write_text(json.dumps(tree, indent=1).ljust(description.stat().st_size))
    for _ in range(2):
        done = command("train", config)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "stopped early after step 2" in done.stdout + done.stderr
        assert read_exits(run_dir)[-1].reason == "early_stopped"
    evaluated = [row["step"] for row in read_metrics(run_dir) if row["event"] == "eval"]
    assert evaluated == [1, 2, 2]
    assert (run_dir / "checkpoints" / "best").read_text().strip() == "step-00000002"


def test_one_process_is_enough(pair_shards: Path, write_config: WriteConfig, tmp_path: Path) -> None:
    """No torchrun: `dist-transformer train` by itself; then fine-tuning from its weights."""
    config = write_config(pair_shards, train={"steps": 3})
    done = command("train", config)
    assert done.returncode == 0, done.stderr
    assert "done: 3 steps" in done.stdout
    # A start that is refused changes nothing.
    before_refusal = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}
    refused = command("train", config, "train.steps=6", "run.seed=77")
    assert refused.returncode == 1 and "the order of data changed" in refused.stderr
    for name in ("config.yaml", "tokenizer.json"):
        assert (tmp_path / "run" / name).read_bytes() == before_refusal[tmp_path / "run" / name]
    tuned = command(
        "train",
        config,
        f"run.dir={tmp_path / 'tuned'}",
        f"train.init_from={tmp_path / 'run'}",
        "train.steps=1",
    )
    assert tuned.returncode == 0, tuned.stderr
    before = read_metrics(tmp_path / "run")
    after = read_metrics(tmp_path / "tuned")
    assert steps_of(after)[1]["train/loss"] < steps_of(before)[1]["train/loss"]
