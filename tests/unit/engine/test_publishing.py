"""A crash at any instant of saving leaves `latest` naming a complete checkpoint; left-overs go at the next save.

DeepSpeed's part is played by a file of random content: publishing, retention and recovery are ours alone.
"""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from dist_transformer.config import build_config
from dist_transformer.engine import checkpoint
from dist_transformer.engine.checkpoint import (
    TrainerState,
    check_checkpoint,
    checkpoints_dir,
    latest_checkpoint,
    list_checkpoints,
    read_trainer_state,
    save_checkpoint,
)
from dist_transformer.engine.engine import Engine
from dist_transformer.errors import CheckpointError
from dist_transformer.parallel.mesh import Mesh

N_KILLS = 20


class Crash(BaseException):
    """Nothing that anybody catches."""


def fake_engine(run_dir: Path) -> Engine:
    mesh = SimpleNamespace(
        rank=0, world_size=1, is_rank_zero=True, dp_size=1, tp_size=1, device=torch.device("cpu")
    )
    config = build_config(
        {
            "run": {"dir": str(run_dir)},
            "data": {"train": "x"},
            "train": {"steps": 9},
            "model": {"vocab_size": 64},
        }
    )

    def save(root: str, tag: str, save_latest: bool) -> None:
        assert not save_latest
        step = int(tag.split("-")[1].split(".")[0])
        torch.save({"step": step, "weights": torch.full((500,), step)}, Path(root) / tag / "model.pt")
        (Path(root) / "zero_to_fp32.py").write_text("# left by DeepSpeed")

    return cast(
        "Engine",
        SimpleNamespace(
            config=config,
            mesh=mesh,
            optimizer=None,
            deepspeed=SimpleNamespace(save_checkpoint=save, module=None),
        ),
    )


def save(engine: Engine, step: int, keep: int = 2) -> Path:
    return save_checkpoint(engine, TrainerState(step=step, tokens_seen=10 * step), keep)


def verify(engine: Engine) -> int:
    """`latest` names a checkpoint that is whole; returns its step, 0 where there is none yet."""
    path = latest_checkpoint(Path(engine.config.run.dir))
    if path is None:
        return 0
    check_checkpoint(path, engine.config, engine.mesh)
    state = read_trainer_state(path)
    loaded = torch.load(path / "model.pt")
    assert loaded["step"] == state.step == int(path.name.split("-")[1])
    assert torch.equal(loaded["weights"], torch.full((500,), state.step))
    assert state.tokens_seen == 10 * state.step
    assert (path / "rng-00000.pt").exists()
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
    save(engine, 25, keep=1)
    assert names(tmp_path) == ["latest", "step-00000025"]


def test_a_run_that_goes_on_from_an_older_checkpoint(tmp_path: Path) -> None:
    """`latest` set back by hand, as the error for a damaged checkpoint says: later ones are replaced in turn."""
    engine = fake_engine(tmp_path)
    for step in (5, 10, 15):
        save(engine, step, keep=9)
    (checkpoints_dir(tmp_path) / "latest").write_text("step-00000005\n")
    assert verify(engine) == 5
    save(engine, 8, keep=2)
    assert verify(engine) == 8
    save(engine, 10, keep=2)
    assert verify(engine) == 10


def count_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_at: int) -> int:
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
    watch(torch, "save")
    try:
        save(fake_engine(tmp_path), 30, keep=2)
    except Crash:
        pass
    finally:
        monkeypatch.undo()
    return n_calls


@pytest.mark.parametrize("before", [[], [20], [10, 20], [30, 10, 20]])
def test_a_crash_before_any_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: list[int]) -> None:
    """`before`: what was saved in which order; 30 is saved (again) and crashes."""

    def prepare(folder: Path) -> Engine:
        engine = fake_engine(folder)
        for step in before:
            save(engine, step, keep=3)
        return engine

    engine = prepare(tmp_path / "whole")
    n_calls = count_calls(tmp_path / "whole", monkeypatch, crash_at=0)
    assert n_calls > 10
    assert verify(engine) == 30
    for crash_at in range(1, n_calls + 1):
        folder = tmp_path / f"crash-{crash_at}"
        engine = prepare(folder)
        count_calls(folder, monkeypatch, crash_at)
        found = verify(engine)
        assert found in {30, before[-1] if before else 0}
        # Whatever is listed is whole too: an error's hint names these.
        for path in list_checkpoints(folder):
            check_checkpoint(path, engine.config, engine.mesh)
        save(engine, 40, keep=1)
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
    engine = fake_engine(tmp_path)
    for step in (1, 2, 3, 4):
        save(engine, step, keep=9)
    first, second, third, fourth = list_checkpoints(tmp_path)
    (first / "model.pt").write_bytes((first / "model.pt").read_bytes()[:-1])
    assert "model.pt has" in damaged(first, engine)
    assert "point " in damaged(first, engine)
    (second / "rng-00000.pt").unlink()
    assert "rng-00000.pt is missing: the checkpoint is damaged" in damaged(second, engine)
    (third / "files.json").write_text("{")
    assert "files.json: cannot be read" in damaged(third, engine)
    (fourth / "trainer.json").unlink()
    assert "trainer.json is missing" in damaged(fourth, engine)


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
        ("parallel", {"zero_stage": 1}, "zero_stage=2 and this run has zero_stage=1: resume with zero_stage=2"),
        ("train", {"precision": "fp32"}, "saved with precision=bf16 and this run has precision=fp32"),
    ],
)  # fmt: skip
def test_another_model_or_layout(tmp_path: Path, section: str, fields: dict[str, Any], says: str) -> None:
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


def test_other_ranks_are_another_layout(tmp_path: Path) -> None:
    engine = fake_engine(tmp_path)
    path = save(engine, 1)
    mesh = cast("Mesh", SimpleNamespace(dp_size=4, tp_size=1))
    with pytest.raises(CheckpointError, match="saved with dp_size=1 and this run has dp_size=4"):
        check_checkpoint(path, engine.config, mesh)


def test_the_state_survives_as_it_was(tmp_path: Path) -> None:
    engine = fake_engine(tmp_path)
    state = TrainerState(
        step=3, tokens_seen=12345678901234, n_bad_steps=2, data={"cursors": {"0": [1, 2, 3, 4]}}
    )
    assert read_trainer_state(save_checkpoint(engine, state, 1)) == state


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fake_engine(tmp_path)
    path = save(engine, 1)
    monkeypatch.setattr(checkpoint, "_FORMAT", 99)
    with pytest.raises(CheckpointError, match="written in checkpoint format 1, this is 99"):
        read_trainer_state(path)
    (path / "trainer.json").write_text(json.dumps([1]))
    with pytest.raises(CheckpointError):
        read_trainer_state(path)


@pytest.mark.parametrize("state", [{"step": 3, "unheard_of": 1}, [], None])
def test_a_state_of_another_version_is_one_sentence(tmp_path: Path, state: object) -> None:
    description = {"format": 1, "versions": {"dist_transformer": "0.0.9"}, "state": state}
    (tmp_path / "trainer.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=r"trainer\.json: its state is another version's \(0\.0\.9"):
        read_trainer_state(tmp_path)
