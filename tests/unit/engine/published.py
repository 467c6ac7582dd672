"""An engine that is nothing but what a checkpoint is made of, saved and looked at by tests of checkpoints.

The engine's part is played by a few parameters and an optimizer of torch's; what is saved of them is the step's number.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

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
from dist_transformer.engine.saving import save_checkpoint


class Crash(BaseException):
    """Nothing that anybody catches."""


def fake_engine(run_dir: Path, ema_decay: float | None = None, **checkpoint: Any) -> Engine:
    """One process's engine as far as a checkpoint knows it; `checkpoint`: fields of that section."""
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
    """The checkpoint of a step."""
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
    """Everything in the folder of checkpoints, whole or not."""
    return sorted(path.name for path in checkpoints_dir(run_dir).iterdir())


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
