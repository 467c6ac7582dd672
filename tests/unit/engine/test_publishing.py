"""A crash at any instant of saving leaves `latest` naming a complete checkpoint; left-overs go at the next save."""

import functools
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dist_transformer.checkpoints.average import newest_of
from dist_transformer.checkpoints.folder import (
    TrainerState,
    checkpoints_dir,
    latest_checkpoint,
    list_checkpoints,
    read_trainer_state,
)
from dist_transformer.engine.checkpoint import check_checkpoint
from dist_transformer.engine.engine import Engine
from dist_transformer.engine.saving import Saver, save_checkpoint
from dist_transformer.errors import CheckpointError
from tests.unit.engine.published import count_calls, fake_engine, names, save, verify, write_step

N_KILLS = 20


def test_retention(tmp_path: Path) -> None:
    engine = fake_engine(tmp_path)
    assert latest_checkpoint(tmp_path) is None
    assert list_checkpoints(tmp_path) == []
    for step in (5, 10, 15, 20):
        assert save(engine, step).name == f"step-{step:08d}"
        assert verify(engine) == step
    assert names(tmp_path) == ["latest", "step-00000015", "step-00000020"]
    save(fake_engine(tmp_path, keep=1), 25)
    assert names(tmp_path) == ["latest", "step-00000025"]


def test_a_run_that_goes_on_from_an_older_checkpoint(tmp_path: Path) -> None:
    """`latest` set back by hand, as the error for a damaged checkpoint says: later ones are replaced in turn."""
    for step in (5, 10, 15):
        save(fake_engine(tmp_path, keep=9), step)
    engine = fake_engine(tmp_path)
    (checkpoints_dir(tmp_path) / "latest").write_text("step-00000005\n")
    assert verify(engine) == 5
    save(engine, 8)
    assert verify(engine) == 8
    save(engine, 10)
    assert verify(engine) == 10


def test_retention_after_going_back(tmp_path: Path) -> None:
    """What was given up stays until it is replaced, and takes no place of the course that goes on."""
    for step in (10, 20, 30):
        save(fake_engine(tmp_path, keep=9), step)
    (checkpoints_dir(tmp_path) / "latest").write_text("step-00000010\n")
    engine = fake_engine(tmp_path, keep=2)
    for step in (15, 17, 19):
        save(engine, step)
    kept = [17, 19, 20, 30]
    assert names(tmp_path) == ["latest", *(f"step-{step:08d}" for step in kept)]
    assert [path.name for path in newest_of(tmp_path, 2)] == ["step-00000017", "step-00000019"]
    with pytest.raises(CheckpointError, match="has 2 checkpoints, not 3"):
        newest_of(tmp_path, 3)
    save(engine, 20)
    assert names(tmp_path) == ["latest", "step-00000019", "step-00000020", "step-00000030"]


def test_copies_with_other_names_are_left_alone(tmp_path: Path) -> None:
    engine = fake_engine(tmp_path, keep=1)
    shutil.copytree(save(engine, 3), checkpoints_dir(tmp_path) / "step-00000003-good")
    averaging = checkpoints_dir(tmp_path) / "average-00000001.partial"
    averaging.mkdir()
    save(engine, 6)
    assert names(tmp_path) == [averaging.name, "latest", "step-00000003-good", "step-00000006"]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000006"]


@pytest.mark.parametrize("before", [[], [20], [10, 20], [30, 10, 20]])
def test_a_crash_before_any_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: list[int]) -> None:
    """`before`: what was saved in which order; 30 is saved (again) and crashes."""

    def prepare(folder: Path) -> Engine:
        for step in before:
            save(fake_engine(folder, keep=3), step)
        return fake_engine(folder)

    engine = prepare(tmp_path / "whole")
    n_calls = count_calls(monkeypatch, 0, lambda: save(fake_engine(tmp_path / "whole"), 30))
    assert n_calls > 10
    assert verify(engine) == 30
    for crash_at in range(1, n_calls + 1):
        folder = tmp_path / f"crash-{crash_at}"
        engine = prepare(folder)
        count_calls(monkeypatch, crash_at, functools.partial(save, fake_engine(folder), 30))
        found = verify(engine)
        assert found in {30, before[-1] if before else 0}
        # Whatever is listed is whole too: an error's hint names these.
        for path in list_checkpoints(folder):
            check_checkpoint(path, engine.config, engine.mesh)
        save(fake_engine(folder, keep=1), 40)
        assert verify(engine) == 40
        assert names(folder) == ["latest", "step-00000040"]


def test_killed_at_random_instants(tmp_path: Path) -> None:
    engine = fake_engine(tmp_path)
    began = time.perf_counter()
    save(engine, 1)
    duration = time.perf_counter() - began
    generator, steps = random.Random(7), [1]
    for _ in range(N_KILLS):
        begins, tells = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(tells, b"x")
                for step in range(steps[-1] + 1, 10_000):
                    save(engine, step)
            finally:
                os._exit(1)
        os.read(begins, 1)
        time.sleep(generator.uniform(0.0, 4 * duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(begins)
        os.close(tells)
        steps.append(verify(engine))
    assert steps == sorted(steps)
    final = save(engine, steps[-1] + 1)
    assert names(tmp_path)[-1] == final.name
    assert len(names(tmp_path)) <= 3


def test_left_overs_go_at_the_next_save(tmp_path: Path) -> None:
    engine = fake_engine(tmp_path)
    left = checkpoints_dir(tmp_path) / "step-00000003.partial"
    (left / "deep").mkdir(parents=True)
    (left / "deep" / "file").write_text("half")
    assert latest_checkpoint(tmp_path) is None
    assert list_checkpoints(tmp_path) == []
    save(engine, 4)
    assert names(tmp_path) == ["latest", "step-00000004"]


def test_the_state_survives_as_it_was(tmp_path: Path) -> None:
    engine = fake_engine(tmp_path)
    state = TrainerState(
        step=3, tokens_seen=12345678901234, n_bad_steps=2, data={"cursors": {"0": [1, 2, 3, 4]}}
    )
    assert read_trainer_state(save_checkpoint(engine, state)) == state


def test_some_checkpoints_stay_for_ever(tmp_path: Path) -> None:
    engine = fake_engine(tmp_path, every=10, keep=2, keep_every=20)
    for step in range(10, 80, 10):
        save(engine, step)
    kept = ["step-00000020", "step-00000040", "step-00000060", "step-00000070"]
    assert names(tmp_path) == ["latest", *kept]


def test_training_goes_on_while_files_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved is the step at which saving began, whatever happens to the weights meanwhile."""
    engine = fake_engine(tmp_path)
    may_sync = threading.Event()
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (may_sync.wait(30), real(descriptor))[1])
    saver = Saver(engine)
    assert saver.begin(write_step(engine, 5)) == []
    write_step(engine, 6)
    assert saver.poll() == []
    assert verify(engine) == 0
    may_sync.set()
    [outcome] = saver.finish()
    assert (outcome.step, outcome.error) == (5, None)
    assert outcome.path is not None
    assert outcome.n_bytes == (outcome.path / "rank-00000.safetensors").stat().st_size
    assert verify(engine) == 5


def test_the_next_save_waits_for_the_last(tmp_path: Path) -> None:
    engine = fake_engine(tmp_path)
    saver = Saver(engine)
    ended = [saver.begin(write_step(engine, step)) for step in (1, 2, 3)]
    assert [[outcome.step for outcome in outcomes] for outcomes in ended] == [[], [1], [2]]
    deadline = time.monotonic() + 30
    while not (last := saver.poll()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [outcome.step for outcome in last] == [3]
    assert saver.poll() == saver.finish() == []
    assert verify(engine) == 3


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_that_fails_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    engine = fake_engine(tmp_path, asynchronous=asynchronous)
    save(engine, 1)
    with monkeypatch.context() as patch:

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device", "rank-00000.safetensors")

        patch.setattr(os, "fsync", full)
        saver = Saver(engine)
        [outcome] = [*saver.begin(write_step(engine, 2)), *saver.finish()]
    assert outcome.path is None
    assert outcome.error == (
        "the checkpoint of step 2 was not saved: rank-00000.safetensors: No space left on device; "
        "step-00000001 is still whole"
    )
    assert verify(engine) == 1
    assert names(tmp_path) == ["latest", "step-00000001"]
    [again] = [*saver.begin(write_step(engine, 3)), *saver.finish()]
    assert again.error is None
    assert verify(engine) == 3


def test_too_little_disk_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fake_engine(tmp_path)
    save(engine, 1)
    saver = Saver(engine)
    saver.check_space()
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=100, f_frsize=512))
    [outcome] = saver.begin(write_step(engine, 2))
    assert outcome.error is not None
    assert "checkpoints has 0.0 MiB free and a checkpoint needs 0.1 MiB: free some space" in outcome.error
    with pytest.raises(CheckpointError, match="a checkpoint needs") as caught:
        Saver(engine).check_space()
    assert caught.value.on_every_rank
    assert verify(engine) == 1
    assert names(tmp_path) == ["latest", "step-00000001"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    engine = fake_engine(tmp_path / "file")
    with pytest.raises(CheckpointError, match="Not a directory") as caught:
        save(engine, 1)
    assert "there is no earlier one" in str(caught.value)
