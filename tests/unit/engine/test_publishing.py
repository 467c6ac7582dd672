"""A crash at any instant of saving leaves `latest` naming a complete checkpoint; left-overs go at the next save.

The engine's part is played by a few parameters and an optimizer of torch's; what is saved of them is the step's number.
"""

import functools
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from dist_transformer.checkpoints import folder as folder_module
from dist_transformer.checkpoints.folder import (
    TrainerState,
    checkpoints_dir,
    damages,
    latest_checkpoint,
    list_checkpoints,
    read_trainer_state,
)
from dist_transformer.checkpoints.reader import load_weights
from dist_transformer.config import build_config
from dist_transformer.engine.average import MovingAverage
from dist_transformer.engine.checkpoint import check_checkpoint
from dist_transformer.engine.engine import Engine
from dist_transformer.engine.saving import Saver, save_checkpoint
from dist_transformer.errors import CheckpointError
from dist_transformer.parallel.mesh import Mesh

N_KILLS = 20


class Crash(BaseException):
    """Nothing that anybody catches."""


def fake_engine(run_dir: Path, ema_decay: float | None = None, **checkpoint: Any) -> Engine:
    mesh = SimpleNamespace(
        rank=0, world_size=1, is_rank_zero=True, dp_size=1, dp_rank=0, tp_size=1, tp_rank=0, device=torch.device("cpu")
    )  # fmt: skip
    config = build_config(
        {
            "run": {"dir": str(run_dir)},
            "data": {"train": "x"},
            "train": {"steps": 9, "precision": "fp32"},
            "model": {"vocab_size": 64},
            "parallel": {"zero_stage": 0},
            "checkpoint": {"keep": 2, **checkpoint},
        }
    )
    model = nn.Linear(24, 10)
    optimizer = torch.optim.AdamW(model.parameters())
    engine = cast(
        "Engine", SimpleNamespace(config=config, mesh=mesh, model=model, optimizer=optimizer, average=None)
    )
    if ema_decay is not None:
        engine.average = MovingAverage(engine, ema_decay)
    return engine


def write_step(engine: Engine, step: int) -> TrainerState:
    """Weights and moments that tell which step they are of."""
    for number, parameter in enumerate(engine.model.parameters()):
        parameter.data.fill_(step + number)
        engine.optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            "exp_avg": torch.full_like(parameter, 2.0 * step, requires_grad=False),
            "exp_avg_sq": torch.full_like(parameter, 3.0 * step, requires_grad=False),
        }
    return TrainerState(step=step, tokens_seen=10 * step)


def save(engine: Engine, step: int) -> Path:
    return save_checkpoint(engine, write_step(engine, step))


def verify(engine: Engine) -> int:
    """`latest` names a checkpoint that is whole; returns its step, 0 where there is none yet."""
    path = latest_checkpoint(Path(engine.config.run.dir))
    if path is None:
        return 0
    check_checkpoint(path, engine.config, engine.mesh)
    assert list(damages(path, checksums=True)) == []
    state = read_trainer_state(path)
    assert state.step == int(path.name.split("-")[1])
    assert state.tokens_seen == 10 * state.step
    weights = load_weights(path)
    assert torch.equal(weights["weight"], torch.full((10, 24), float(state.step)))
    assert torch.equal(weights["bias"], torch.full((10,), state.step + 1.0))
    assert path in list_checkpoints(Path(engine.config.run.dir))
    return state.step


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in checkpoints_dir(run_dir).iterdir())


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


def count_calls(monkeypatch: pytest.MonkeyPatch, crash_at: int, save_once: Callable[[], object]) -> int:
    """How many calls that change the disk one save makes; raises Crash before call number `crash_at`."""
    n_calls = 0

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            nonlocal n_calls
            n_calls += 1
            if n_calls == crash_at:
                raise Crash
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    for name in ("rename", "replace", "unlink", "mkdir", "fsync", "open", "rmdir"):
        watch(os, name)
    watch(Path, "write_text")
    watch(Path, "open")
    # A thread would keep the crash to itself.
    monkeypatch.setattr(threading.Thread, "start", lambda thread: thread.run())
    monkeypatch.setattr(threading.Thread, "join", lambda thread: None)
    monkeypatch.setattr(threading.Thread, "is_alive", lambda thread: False)
    try:
        save_once()
    except Crash:
        pass
    finally:
        monkeypatch.undo()
    return n_calls


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


def damaged(path: Path, engine: Engine) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(path, engine.config, engine.mesh)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_damaged_files_are_found(tmp_path: Path) -> None:
    engine = fake_engine(tmp_path, keep=9)
    for step in range(1, 6):
        save(engine, step)
    first, second, third, fourth, fifth = list_checkpoints(tmp_path)
    tensors = "rank-00000.safetensors"
    (first / tensors).write_bytes((first / tensors).read_bytes()[:-1])
    assert f"{tensors} has" in damaged(first, engine)
    assert "to one of step-00000002, step-00000003" in damaged(first, engine)
    (second / tensors).unlink()
    assert f"{tensors} is missing: the checkpoint is damaged" in damaged(second, engine)
    (third / "files.json").write_text("{")
    assert "files.json: cannot be read" in damaged(third, engine)
    (fourth / "index.json").unlink()
    assert "index.json is missing" in damaged(fourth, engine)
    content = bytearray((fifth / tensors).read_bytes())
    content[-7] ^= 1
    (fifth / tensors).write_bytes(content)
    check_checkpoint(fifth, engine.config, engine.mesh)
    [found] = damages(fifth, checksums=True)
    assert f"{tensors} is not what was written: its sha256 differs" in found
    assert f"{tensors} is not what was written" in damaged(fifth, fake_engine(tmp_path, verify="sha256"))


def test_a_pointer_to_nothing(tmp_path: Path) -> None:
    engine = fake_engine(tmp_path)
    save(engine, 1)
    pointer = checkpoints_dir(tmp_path) / "latest"
    pointer.write_text("step-00000009\n")
    with pytest.raises(
        CheckpointError, match="names 'step-00000009', which is not there: write one of step-00000001"
    ):
        latest_checkpoint(tmp_path)
    shutil.rmtree(checkpoints_dir(tmp_path) / "step-00000001")
    with pytest.raises(CheckpointError, match="remove it to start from step 0"):
        latest_checkpoint(tmp_path)
    pointer.write_text("")
    with pytest.raises(CheckpointError, match="remove it to start from step 0"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("section", "fields", "says"),
    [
        ("model", {"d_ff": 96}, "model.d_ff is 2048 there and 96 in this configuration"),
        ("model", {"n_decoder_layers": 3}, "model.n_decoder_layers is 6 there and 3"),
        ("model", {"vocab_size": 128}, "model.vocab_size is 64 there and 128"),
        ("model", {"decoder": {"n_heads": 4}}, "model.decoder.n_heads is 8 there and 4"),
        ("model", {"encoder": {"n_kv_heads": 2}}, "model.encoder.n_kv_heads is 8 there and 2"),
    ],
)  # fmt: skip
def test_another_model(tmp_path: Path, section: str, fields: dict[str, Any], says: str) -> None:
    engine = fake_engine(tmp_path)
    path = save(engine, 1)
    tree = engine.config.model_dump(mode="json")
    tree[section].update(fields)
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(path, build_config(tree), engine.mesh)
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"dropout": 0.3},
        {"attention_dropout": 0.2},
        {"encoder": {"dropout": 0.0}},
        {"init": "t5"},
        {"head_dim": 64, "n_kv_heads": 8},
    ],
)
def test_what_is_no_part_of_the_weights_may_change(tmp_path: Path, fields: dict[str, Any]) -> None:
    engine = fake_engine(tmp_path)
    path = save(engine, 1)
    tree = engine.config.model_dump(mode="json")
    tree["model"].update(fields)
    check_checkpoint(path, build_config(tree), engine.mesh)


@pytest.mark.parametrize(
    ("section", "fields"), [("parallel", {"zero_stage": 3}), ("train", {"precision": "bf16"})]
)
def test_another_layout_is_welcome(tmp_path: Path, section: str, fields: dict[str, Any]) -> None:
    engine = fake_engine(tmp_path)
    path = save(engine, 1)
    tree = engine.config.model_dump(mode="json")
    tree[section].update(fields)
    mesh = cast("Mesh", SimpleNamespace(dp_size=4, tp_size=2, rank=0, world_size=1))
    check_checkpoint(path, build_config(tree), mesh)


def test_the_state_survives_as_it_was(tmp_path: Path) -> None:
    engine = fake_engine(tmp_path)
    state = TrainerState(
        step=3, tokens_seen=12345678901234, n_bad_steps=2, data={"cursors": {"0": [1, 2, 3, 4]}}
    )
    assert read_trainer_state(save_checkpoint(engine, state)) == state


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fake_engine(tmp_path)
    path = save(engine, 1)
    monkeypatch.setattr(folder_module, "FORMAT", 99)
    with pytest.raises(
        CheckpointError, match=r"written in checkpoint format 2 by .* reads format 99: go on with"
    ):
        read_trainer_state(path)
    (path / "trainer.json").write_text(json.dumps([1]))
    with pytest.raises(CheckpointError):
        read_trainer_state(path)


@pytest.mark.parametrize("state", [{"step": 3, "unheard_of": 1}, [], None])
def test_a_state_of_another_version_is_one_sentence(tmp_path: Path, state: object) -> None:
    description = {"format": 2, "versions": {"dist_transformer": "0.0.9"}, "state": state}
    (tmp_path / "trainer.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=r"trainer\.json: its state is another version's \(0\.0\.9"):
        read_trainer_state(tmp_path)


def test_some_checkpoints_stay_for_ever(tmp_path: Path) -> None:
    engine = fake_engine(tmp_path, keep=2, keep_every=20)
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
