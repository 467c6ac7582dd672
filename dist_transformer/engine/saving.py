"""Saving while training goes on: a copy in CPU memory, written by a thread, made visible when every rank has written.

Ranks agree on the main thread only, by a small all-reduce after each step while a save is under way; the threads touch
files and nothing else. That a rank cannot write is therefore known to all of them at the same step: the folder is
removed, the previous checkpoint stays the latest, and no rank waits for another.
"""

import json
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

import dist_transformer
from dist_transformer.checkpoints.folder import (
    FORMAT,
    FileRecord,
    Layout,
    TrainerState,
    checkpoints_dir,
    latest_checkpoint,
    size_in_words,
)
from dist_transformer.checkpoints.publish import partial_folder, publish, remove_left_overs
from dist_transformer.checkpoints.reader import Kind
from dist_transformer.checkpoints.safe_files import Entry, read_metadata, write_safetensors
from dist_transformer.config import Config
from dist_transformer.engine.engine import Engine
from dist_transformer.engine.masters import adam_steps, kinds_of, live_pieces, tensor_of
from dist_transformer.engine.random_state import random_metadata, random_tensors
from dist_transformer.errors import CheckpointError, UserError
from dist_transformer.parallel.collectives import gather_objects, raise_together, sum_over_ranks
from dist_transformer.parallel.mesh import Mesh

_BYTES_OF_ELEMENT = 4
# What a checkpoint needs besides its elements, for each rank: headers, indices, random generators.
_MARGIN = 2**17


def file_of_rank(rank: int) -> str:
    """The file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def layout_of(config: Config, mesh: Mesh) -> Layout:
    """How this run shares the model."""
    return Layout(
        dp_size=mesh.dp_size,
        tp_size=mesh.tp_size,
        zero_stage=config.parallel.zero_stage,
        precision=config.train.precision,
        offload=config.parallel.offload,
        sequence_parallel=mesh.tp_size > 1 and config.parallel.sequence_parallel,
        device=mesh.device.type,
    )


@dataclass(frozen=True)
class SaveOutcome:
    """How a save ended; the same on every rank, but for the seconds."""

    step: int
    path: Path | None
    """The checkpoint; None: it was not saved."""
    error: str | None
    """Why not, in one sentence."""
    n_bytes: int
    blocked_s: float
    """Seconds that training stood still for it."""
    total_s: float
    """Seconds from its beginning until `latest` named it."""


class _Work(threading.Thread):
    """A function in a thread: what it returns, or the sentence that it failed with."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._function = function
        self.result: Any = None
        self.error: str | None = None
        self.start()

    def run(self) -> None:
        """Called by the thread."""
        try:
            self.result = self._function()
        except Exception as error:
            # Whatever it is, every rank must learn of it: it would be waited for otherwise.
            self.error = _sentence(error)


@dataclass
class _Save:
    """A save under way."""

    step: int
    folder: Path
    description: dict[str, Any]
    work: _Work | None = None
    """This rank's thread; None: the others work."""
    is_publishing: bool = False
    """Every rank has written; rank zero makes it visible."""
    n_bytes: int = 0
    began: float = field(default_factory=time.perf_counter)
    blocked_s: float = 0.0


class Saver:
    """A run's saves, one at a time. Its methods are collectives: all ranks call the same one at the same step."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.mesh, self.config = engine, engine.mesh, engine.config
        self._root = checkpoints_dir(Path(self.config.run.dir))
        self._pieces = [share for live in live_pieces(engine) if (share := live.share()).piece.length]
        self._n_elements = sum(live.piece.length for live in self._pieces)
        total = torch.tensor([self._n_elements], dtype=torch.int64, device=self.mesh.device)
        n_elements = int(sum_over_ranks(total, self.mesh))
        self._needed = n_elements * _BYTES_OF_ELEMENT * len(kinds_of(engine)) + _MARGIN * self.mesh.world_size
        self._buffers: dict[Kind, Tensor] = {}
        self._save: _Save | None = None

    def check_space(self) -> None:
        """Refuse to train where a checkpoint cannot be written.

        Raises:
            CheckpointError: on every rank.
        """
        sentence = self._on_rank_zero(self._check_folder)
        raise_together(CheckpointError(sentence) if sentence else None, self.mesh)

    def begin(self, state: TrainerState) -> list[SaveOutcome]:
        """Start to save, once the save before is over; how that one ended, and this one where it cannot start."""
        ended, start = self.finish(), time.perf_counter()
        save = _Save(state.step, partial_folder(self._root, state.step), self._describe(state))
        self._save = save
        failed = self._on_rank_zero(lambda: self._make_folder(save.folder))
        if found := self._first_error(failed):
            return [*ended, self._end(save, None, found)]
        entries, metadata = self._entries(), self._metadata()
        file = save.folder / file_of_rank(self.mesh.rank)
        save.work = _Work(lambda: write_safetensors(file, entries, metadata))
        save.blocked_s = time.perf_counter() - start
        return ended

    def poll(self) -> list[SaveOutcome]:
        """See how far a save is, without waiting for files; called after every step."""
        if self._save is None:
            return []
        is_over = self._save.work is None or not self._save.work.is_alive()
        n_over = sum_over_ranks(torch.tensor([int(is_over)], device=self.mesh.device), self.mesh)
        return self._go_on() if int(n_over) == self.mesh.world_size else []

    def finish(self) -> list[SaveOutcome]:
        """Wait until a save under way is over."""
        ended: list[SaveOutcome] = []
        while self._save is not None:
            start = time.perf_counter()
            if self._save.work is not None:
                self._save.work.join()
            self._save.blocked_s += time.perf_counter() - start
            ended += self._go_on()
        return ended

    def _go_on(self) -> list[SaveOutcome]:
        """Every rank's work of this phase is over: the next phase, or the end."""
        save = self._save
        assert save is not None
        error = save.work.error if save.work is not None else None
        if found := self._first_error(error):
            return [self._end(save, None, found)]
        if save.is_publishing:
            path = save.folder.with_name(save.folder.name.removesuffix(save.folder.suffix))
            return [self._end(save, path, None)]
        assert save.work is not None
        written: FileRecord = save.work.result
        records = gather_objects(written, self.mesh)
        save.is_publishing, save.work = True, None
        save.n_bytes = sum(record.size for record in records)
        if self.mesh.is_rank_zero:
            files = {file_of_rank(rank): record for rank, record in enumerate(records)}
            save.work = _Work(lambda: self._publish(save, files))
        return []

    def _publish(self, save: _Save, files: dict[str, FileRecord]) -> None:
        index = {name: json.loads(read_metadata(save.folder / name)["pieces"]) for name in files}
        keep = self.config.checkpoint
        publish(save.folder, files, save.description, index, keep=keep.keep, keep_every=keep.keep_every)

    def _end(self, save: _Save, path: Path | None, error: str | None) -> SaveOutcome:
        """Nothing is under way any more; what a failed save has written goes."""
        self._save = None
        if error is not None:
            if self.mesh.is_rank_zero:
                shutil.rmtree(save.folder, ignore_errors=True)
            error = f"the checkpoint of step {save.step:,} was not saved: {error}; {self._what_is_there()}"
        total = time.perf_counter() - save.began
        return SaveOutcome(save.step, path, error, save.n_bytes, save.blocked_s, total)

    def _what_is_there(self) -> str:
        try:
            latest = latest_checkpoint(self._root.parent)
        except (OSError, CheckpointError):
            latest = None
        return f"{latest.name} is still whole" if latest is not None else "there is no earlier one"

    def _on_rank_zero(self, action: Callable[[], None]) -> str | None:
        """The sentence that an action of rank zero failed with."""
        if not self.mesh.is_rank_zero:
            return None
        try:
            action()
        except (OSError, CheckpointError) as error:
            return _sentence(error)
        return None

    def _first_error(self, error: str | None) -> str | None:
        """What the first failing rank failed with, on every rank."""
        for rank, found in enumerate(gather_objects(error, self.mesh)):
            if found is not None:
                return f"rank {rank}: {found}" if self.mesh.world_size > 1 else found
        return None

    def _make_folder(self, folder: Path) -> None:
        remove_left_overs(self._root)
        self._check_folder()
        folder.mkdir()

    def _check_folder(self) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        if not os.access(self._root, os.W_OK | os.X_OK):
            raise CheckpointError(
                f"{self._root} cannot be written: change its permissions, or give another run.dir"
            )
        space = os.statvfs(self._root)
        free = space.f_bavail * space.f_frsize
        if free < self._needed:
            raise CheckpointError(
                f"{self._root} has {size_in_words(free)} free and a checkpoint needs "
                f"{size_in_words(self._needed)}: free some space"
            )

    def _entries(self) -> list[Entry]:
        """What goes into this rank's file: as copies where training goes on while they are written."""
        entries = []
        for kind in kinds_of(self.engine):
            parts = [tensor_of(self.engine, live, kind) for live in self._pieces]
            present = [part for part in parts if part is not None]
            if len(present) == len(parts):
                if self.config.checkpoint.asynchronous:
                    present = [self._copy(kind, present)]
                entries.append(Entry(kind, torch.float32, (self._n_elements,), present))
        entries += [
            Entry(name, state.dtype, tuple(state.shape), [state])
            for name, state in random_tensors(self.mesh).items()
        ]
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)
        return entries

    def _copy(self, kind: Kind, parts: list[Tensor]) -> Tensor:
        """The parts, one behind the other, in CPU memory that every save uses again."""
        if kind not in self._buffers:
            is_cuda = self.mesh.device.type == "cuda"
            self._buffers[kind] = torch.empty(self._n_elements, dtype=torch.float32, pin_memory=is_cuda)
        buffer, begin = self._buffers[kind], 0
        for part in parts:
            buffer[begin : begin + part.numel()].copy_(part, non_blocking=True)
            begin += part.numel()
        return buffer

    def _metadata(self) -> dict[str, str]:
        pieces = [live.piece.to_json() for live in self._pieces]
        return {
            "format": str(FORMAT),
            "pieces": json.dumps(pieces, separators=(",", ":")),
            **random_metadata(),
        }

    def _describe(self, state: TrainerState) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "state": asdict(state),
            "model": self.config.model.model_dump(mode="json"),
            "layout": asdict(layout_of(self.config, self.mesh)),
            "optimizer": {"name": self.config.optimizer.name, "steps": adam_steps(self.engine)},
            "saved_at": round(time.time(), 3),
            "versions": {
                "dist_transformer": dist_transformer.__version__,
                "torch": torch.__version__,
                "deepspeed": deepspeed.__version__,
                "python": platform.python_version(),
            },
        }


def save_checkpoint(engine: Engine, state: TrainerState) -> Path:
    """Save now, and wait for it. A collective.

    Raises:
        CheckpointError: on every rank, if it cannot be saved.
    """
    saver = Saver(engine)
    outcome = [*saver.begin(state), *saver.finish()][-1]
    if outcome.path is None:
        failure = CheckpointError(outcome.error)
        failure.on_every_rank = True
        raise failure
    return outcome.path


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        return f"{error.filename}: {reason}" if error.filename else reason
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
