"""Checkpoints: written beside, synced, made visible by renaming; `latest` always names a complete one.

RUN_DIR/checkpoints/step-00000100/    DeepSpeed's files, one `rng-*.pt` a rank, `trainer.json`, `files.json`
RUN_DIR/checkpoints/latest            text: the name of the newest complete one
"""

import json
import os
import pickle
import platform
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import deepspeed
import numpy as np
import torch
from torch import Tensor

import dist_transformer
from dist_transformer.config import Config, ModelConfig
from dist_transformer.config.model import Side
from dist_transformer.engine.engine import Engine
from dist_transformer.engine.saved_weights import names_of_masters, read_weights
from dist_transformer.errors import CheckpointError, UserError
from dist_transformer.parallel.collectives import barrier, raise_together
from dist_transformer.parallel.mesh import Mesh

_FORMAT = 1
_PARTIAL = ".partial"
# What reading a damaged file of torch's may raise.
_DAMAGE = (RuntimeError, OSError, EOFError, KeyError, pickle.UnpicklingError)


@dataclass
class TrainerState:
    """What the loop must remember besides weights, optimizer and random generators. Plain JSON."""

    step: int = 0
    """Updates done."""
    tokens_seen: int = 0
    """Source and target tokens, without padding, over all ranks."""
    n_bad_steps: int = 0
    """Updates skipped for a non-finite loss or gradient, in the whole run."""
    n_truncated: int = 0
    """Samples cut to a row's length, in the whole run."""
    n_dropped: int = 0
    """Samples left out for their length, in the whole run."""
    data: dict[str, Any] | None = None
    """Lane cursors of all ranks (`data.stream.merge_states`)."""


def checkpoints_dir(run_dir: Path) -> Path:
    """Where a run's checkpoints lie."""
    return run_dir / "checkpoints"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(
        path
        for path in checkpoints_dir(run_dir).glob("step-*")
        if path.suffix != _PARTIAL and (path / "files.json").exists()
    )


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint, or None where there is none yet.

    Raises:
        CheckpointError: if `latest` names a checkpoint that is not there.
    """
    pointer = checkpoints_dir(run_dir) / "latest"
    if not pointer.exists():
        return None
    name = pointer.read_text(encoding="utf-8").strip()
    path = checkpoints_dir(run_dir) / name
    if not name or not path.is_dir():
        others = [other.name for other in list_checkpoints(run_dir)]
        hint = f"write one of {', '.join(others)} into it" if others else "remove it to start from step 0"
        raise CheckpointError(f"{pointer} names '{name}', which is not there: {hint}")
    return path


def save_checkpoint(engine: Engine, state: TrainerState, keep: int) -> Path:
    """Write a checkpoint of this step, make it the latest, remove the oldest beyond `keep`. A collective."""
    config, mesh = engine.config, engine.mesh
    root = checkpoints_dir(Path(config.run.dir))
    final = root / f"step-{state.step:08d}"
    partial = final.with_name(final.name + _PARTIAL)
    if mesh.is_rank_zero:
        for stale in root.glob(f"*{_PARTIAL}"):
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier(mesh)
    engine.deepspeed.save_checkpoint(str(root), tag=partial.name, save_latest=False)
    torch.save(_rng_state(mesh), partial / f"rng-{mesh.rank:05d}.pt")
    barrier(mesh)
    if mesh.is_rank_zero:
        for script in root.glob("*.py"):
            script.unlink()  # DeepSpeed leaves its conversion scripts beside the checkpoints; `load_weights` serves
        _write_json(
            partial / "trainer.json",
            {
                "format": _FORMAT,
                "state": asdict(state),
                **_description(config, mesh),
                "master_names": names_of_masters(engine.optimizer, engine.deepspeed.module),
            },
        )
        _publish(partial, final, keep)
    barrier(mesh)
    return final


def read_trainer_state(path: Path) -> TrainerState:
    """The loop's state in a checkpoint.

    Raises:
        CheckpointError: if it cannot be read.
    """
    description = _read_description(path)
    try:
        return TrainerState(**description["state"])
    except (KeyError, TypeError):
        version = description.get("versions", {}).get("dist_transformer", "unknown")
        raise CheckpointError(
            f"{path / 'trainer.json'}: its state is another version's ({version}, this is "
            f"{dist_transformer.__version__}): resume with the code that wrote it, or start a new run from its "
            f"weights with train.init_from"
        ) from None


def check_checkpoint(path: Path, config: Config, mesh: Mesh) -> None:
    """Refuse a checkpoint that is damaged, of another model, or of a layout that cannot be resumed.

    Raises:
        CheckpointError: one sentence that names the first difference and the fix.
    """
    _check_files(path)
    check_model(path, config.model, "set it back, or start a new run with another run.dir")
    layout = _layout(config, mesh)
    for name, was in _read_description(path)["layout"].items():
        if was != layout[name]:
            raise CheckpointError(
                f"{path} was saved with {name}={was} and this run has {name}={layout[name]}: "
                f"resume with {name}={was} (resuming in another layout is not built yet)"
            )


def check_model(path: Path, model: ModelConfig, fix: str) -> None:
    """Refuse a checkpoint whose weights are another model's.

    Raises:
        CheckpointError: one sentence that names the first difference, and `fix`.
    """
    try:
        saved = ModelConfig.model_validate(_read_description(path)["model"])
    except ValueError as error:
        problem = str(error).splitlines()[0]
        raise CheckpointError(f"{path / 'trainer.json'}: no model of this version: {problem}") from None
    for name, was, now in _differences(saved, model):
        raise CheckpointError(
            f"{path} is a checkpoint of another model: model.{name} is {was} there "
            f"and {now} in this configuration; {fix}"
        )


def _differences(saved: ModelConfig, now: ModelConfig) -> Iterator[tuple[str, object, object]]:
    """Fields that decide what weights mean, where they differ: each stack's own, with overrides applied."""
    for name in ModelConfig.model_fields:
        if name not in _NOT_SHAPE and name not in _OF_STACKS and getattr(saved, name) != getattr(now, name):
            yield name, getattr(saved, name), getattr(now, name)
    for side in get_args(Side):
        for name in _OF_STACKS:
            values = [getattr(model.stack(side), name) for model in (saved, now)]
            if values[0] != values[1]:
                overridden = any(getattr(getattr(model, side), name) is not None for model in (saved, now))
                yield f"{side}.{name}" if overridden else name, values[0], values[1]


def load_checkpoint(engine: Engine, path: Path) -> TrainerState:
    """Weights, optimizer and random generators from a checkpoint that `check_checkpoint` accepts. A collective."""
    mesh = engine.mesh
    error: UserError | None = None
    try:
        loaded, _ = engine.deepspeed.load_checkpoint(
            str(path.parent), tag=path.name, load_lr_scheduler_states=False, load_module_strict=True
        )
        if loaded is None:
            error = CheckpointError(f"{path}: DeepSpeed found no model in it")
        _set_rng_state(torch.load(path / f"rng-{mesh.rank:05d}.pt", weights_only=False))
    except _DAMAGE as damage:
        error = CheckpointError(f"{path}: cannot be loaded: {str(damage).splitlines()[0]}")
    raise_together(error, mesh)
    return read_trainer_state(path)


def load_weights(path: Path) -> dict[str, Tensor]:
    """All of a checkpoint's weights in float32, by the model's own names, on one process without an engine.

    Raises:
        CheckpointError: if they cannot be read.
    """
    _check_files(path)
    master_names = _read_description(path).get("master_names", [])
    try:
        weights = read_weights(path, master_names)
    except (*_DAMAGE, ValueError) as damage:
        raise CheckpointError(f"{path}: weights cannot be read: {str(damage).splitlines()[0]}") from None
    return {name.removeprefix("model."): weight.float() for name, weight in weights.items()}


# Fields of the model that may change between runs of the same weights.
_NOT_SHAPE = {
    "preset",
    "dropout",
    "attention_dropout",
    "ffn_dropout",
    "init",
    "encoder",
    "decoder",
    "pad_vocab_to",
}
# Fields that each stack may override.
_OF_STACKS = ("d_model", "d_ff", "n_heads", "n_kv_heads", "head_dim")


def _layout(config: Config, mesh: Mesh) -> dict[str, Any]:
    return {
        "dp_size": mesh.dp_size,
        "tp_size": mesh.tp_size,
        "zero_stage": config.parallel.zero_stage,
        "precision": config.train.precision,
    }


def _description(config: Config, mesh: Mesh) -> dict[str, Any]:
    return {
        "model": config.model.model_dump(mode="json"),
        "layout": _layout(config, mesh),
        "versions": {
            "dist_transformer": dist_transformer.__version__,
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "python": platform.python_version(),
        },
    }


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads((path / "trainer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / 'trainer.json'}: cannot be read: {error}") from None
    found = description.get("format") if isinstance(description, dict) else None
    if found != _FORMAT:
        raise CheckpointError(f"{path}: written in checkpoint format {found}, this is {_FORMAT}")
    assert isinstance(description, dict)
    return description


def _check_files(path: Path) -> None:
    """Every file is there with the size it was written with."""
    try:
        sizes = json.loads((path / "files.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / 'files.json'}: cannot be read: {error}") from None
    for name, size in sizes.items():
        file = path / name
        actual = file.stat().st_size if file.exists() else None
        if actual != size:
            found = "is missing" if actual is None else f"has {actual:,} bytes instead of {size:,}"
            raise CheckpointError(
                f"{file} {found}: the checkpoint is damaged; point {path.parent / 'latest'} to another"
            )


def _publish(partial: Path, final: Path, keep: int) -> None:
    """Sync, rename, point `latest` to it, prune. A crash between any two lines leaves a complete checkpoint."""
    files = [file for file in partial.rglob("*") if file.is_file()]
    _write_json(
        partial / "files.json", {str(f.relative_to(partial)): f.stat().st_size for f in sorted(files)}
    )
    for file in [*files, partial / "files.json"]:
        _sync(file)
    _sync(partial)
    if final.exists():
        # The same step again, after a resume from an older one: the new one replaces it.
        _discard(final)
    partial.rename(final)
    pointer = final.parent / "latest"
    beside = pointer.with_name("latest.partial-pointer")
    beside.write_text(final.name + "\n", encoding="utf-8")
    _sync(beside)
    beside.replace(pointer)
    _sync(final.parent)
    complete = list_checkpoints(final.parent.parent)
    for old in complete[:-keep]:
        if old != final:
            _discard(old)


def _discard(path: Path) -> None:
    """Out of sight in one step, then removed: a crash leaves what the next save removes, never half of it."""
    gone = path.with_name(f"{path.name}.old{_PARTIAL}")
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _rng_state(mesh: Mesh) -> dict[str, Any]:
    state = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    if mesh.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(mesh.device)
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
