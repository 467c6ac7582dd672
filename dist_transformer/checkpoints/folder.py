"""A run's folder of checkpoints: which are there, what they say of themselves, whether they are whole. No torch.

RUN_DIR/checkpoints/step-00000100/    rank-*.safetensors, trainer.json, index.json, files.json
RUN_DIR/checkpoints/latest            text: the name of the newest complete one
RUN_DIR/checkpoints/best              text: the name of the one with the best `checkpoint.best_metric`
RUN_DIR/checkpoints/average-.../      means of several, written by `dist-transformer checkpoint average`: weights only
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import dist_transformer
from dist_transformer.checkpoints.pieces import Piece
from dist_transformer.config import ModelConfig
from dist_transformer.config.model import Side
from dist_transformer.errors import CheckpointError

FORMAT = 2
PARTIAL = ".partial"
_FILES = "files.json"
_NAME = re.compile(r"step-\d+")
"""Copies under other names are a person's."""


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
    n_bad_samples: int = 0
    """Samples lost to damaged or unreachable shards, in the whole run."""
    data: dict[str, Any] | None = None
    """Lane cursors of all ranks (`data.stream.merge_states`)."""
    best: dict[str, Any] | None = None
    """`metric`, its best `value` so far, and the `step` of the checkpoint that has it (`checkpoint.best_metric`)."""
    evaluated_step: int | None = None
    """Updates before the last evaluation, which a stop may have left out; null: written before this was noted."""
    early_stopping: dict[str, Any] | None = None
    """`metric`, its best `value`, and how many evaluations in a row since were no better (`n_without`)."""

    @property
    def is_unevaluated(self) -> bool:
        """Whether there are updates since the last evaluation, as far as the checkpoint says."""
        return self.evaluated_step is not None and self.evaluated_step < self.step


@dataclass(frozen=True)
class Layout:
    """How the ranks that wrote a checkpoint had shared the model."""

    dp_size: int
    tp_size: int
    zero_stage: int
    precision: str
    offload: str
    sequence_parallel: bool
    device: str

    def __str__(self) -> str:
        offload = "" if self.offload == "none" else f", offload {self.offload}"
        return f"dp {self.dp_size} x tp {self.tp_size}, ZeRO {self.zero_stage}, {self.precision}{offload}"


@dataclass(frozen=True)
class FileRecord:
    """What `files.json` keeps of a file."""

    size: int
    sha256: str


def hash_file(file: Path) -> str:
    """sha256 of a file.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from None


def checkpoints_dir(run_dir: Path) -> Path:
    """Where a run's checkpoints lie."""
    return run_dir / "checkpoints"


def checkpoint_name(step: int) -> str:
    """The folder's name of the checkpoint after update number `step`."""
    return f"step-{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(
        path
        for path in checkpoints_dir(run_dir).glob("step-*")
        if _NAME.fullmatch(path.name) and (path / _FILES).exists()
    )


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint, or None where there is none yet.

    Raises:
        CheckpointError: if `latest` names a checkpoint that is not there.
    """
    return _pointed_at(run_dir, "latest", "remove it to start from step 0")


def best_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint with the best `checkpoint.best_metric`, or None where there is none yet.

    Raises:
        CheckpointError: if `best` names a checkpoint that is not there.
    """
    return _pointed_at(run_dir, "best", "remove it")


def _pointed_at(run_dir: Path, pointer_name: str, otherwise: str) -> Path | None:
    pointer = checkpoints_dir(run_dir) / pointer_name
    if not pointer.exists():
        return None
    name = pointer.read_text(encoding="utf-8").strip()
    path = checkpoints_dir(run_dir) / name
    if not name or not path.is_dir():
        others = [other.name for other in list_checkpoints(run_dir)]
        hint = f"write one of {', '.join(others)} into it" if others else otherwise
        raise CheckpointError(f"{pointer} names '{name}', which is not there: {hint}")
    return path


def find_checkpoint_in(path: Path, which: str | None = None) -> Path:
    """A checkpoint that is named itself, or one of the run directory that is.

    Args:
        which: of a run's: `latest` (default), `best`, a step's number, or a folder's name or path.

    Raises:
        CheckpointError: if there is none.
    """
    if (path / "trainer.json").exists():
        if which is not None:
            raise CheckpointError(
                f"{path} is a checkpoint itself: give its run, or leave out --checkpoint {which}"
            )
        return path
    if which in (None, "latest"):
        checkpoint = latest_checkpoint(path)
        if checkpoint is None:
            raise CheckpointError(f"{path}: neither a checkpoint nor a run that has one")
        return checkpoint
    if which == "best":
        checkpoint = best_checkpoint(path)
        if checkpoint is None:
            raise CheckpointError(
                f"{path}: no checkpoint is marked as the best: its run had no checkpoint.best_metric"
            )
        return checkpoint
    assert which is not None
    if Path(which).name != which and Path(which).parent.resolve() != checkpoints_dir(path).resolve():
        raise CheckpointError(f"{which} is not a checkpoint of {path}: give one or the other")
    named = checkpoints_dir(path) / (checkpoint_name(int(which)) if which.isdecimal() else Path(which).name)
    if not (named / "trainer.json").exists():
        names = [other.name for other in list_checkpoints(path)]
        there = f"there are {', '.join(names)}" if names else "there is none"
        raise CheckpointError(f"{path} has no checkpoint {named.name}: {there}")
    return named


def read_description(path: Path) -> dict[str, Any]:
    """What `trainer.json` says: state, model, layout, versions.

    Raises:
        CheckpointError: if it cannot be read, or is another format's.
    """
    file = path / "trainer.json"
    description = _read_json(file)
    found = description.get("format")
    if found != FORMAT:
        version = _version(description)
        raise CheckpointError(
            f"{path}: written in checkpoint format {found} by dist_transformer {version}, and this version reads "
            f"format {FORMAT}: go on with the code that wrote it, or start a new run"
        )
    return description


def read_trainer_state(path: Path) -> TrainerState:
    """The loop's state in a checkpoint.

    Raises:
        CheckpointError: if it cannot be read.
    """
    description = read_description(path)
    try:
        return TrainerState(**description["state"])
    except (KeyError, TypeError):
        raise CheckpointError(
            f"{path / 'trainer.json'}: its state is another version's ({_version(description)}, this is "
            f"{dist_transformer.__version__}): resume with the code that wrote it, or start a new run from its "
            f"weights with train.init_from"
        ) from None


def read_layout(path: Path) -> Layout:
    """How the ranks that wrote a checkpoint shared the model.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        return Layout(**read_description(path)["layout"])
    except (KeyError, TypeError):
        raise CheckpointError(f"{path / 'trainer.json'}: its layout is another version's") from None


def read_index(path: Path) -> dict[str, list[Piece]]:
    """For each file of a checkpoint, the pieces of parameters in it, in their order.

    Raises:
        CheckpointError: if it cannot be read.
    """
    file = path / "index.json"
    try:
        return {
            name: [Piece.from_json(piece) for piece in pieces] for name, pieces in _read_json(file).items()
        }
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: not an index of pieces: {error}") from None


def read_files(path: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file of a checkpoint.

    Raises:
        CheckpointError: if they cannot be read.
    """
    files = _read_json(path / _FILES)
    for name, record in files.items():
        if not isinstance(record, dict) or not isinstance(record.get("size"), int) or "sha256" not in record:
            raise CheckpointError(f"{path / _FILES}: {name} has no size and sha256 there: it is damaged")
    return files


def damages(path: Path, *, checksums: bool, share: tuple[int, int] = (0, 1)) -> Iterator[str]:
    """What is wrong with a checkpoint's files, a sentence each.

    Args:
        checksums: read every file and compare its sha256; else sizes only.
        share: (rank, ranks) that share the work: every rank looks at its files.

    Raises:
        CheckpointError: if `files.json` cannot be read.
    """
    for name, record in sorted(read_files(path).items())[share[0] :: share[1]]:
        file, size = path / name, record["size"]
        actual = file.stat().st_size if file.exists() else None
        if actual != size:
            yield f"{file} " + (
                "is missing" if actual is None else f"has {actual:,} bytes instead of {size:,}"
            )
        elif checksums and hash_file(file) != record["sha256"]:
            yield f"{file} is not what was written: its sha256 differs"


def check_files(path: Path, *, checksums: bool = False, share: tuple[int, int] = (0, 1)) -> None:
    """Every file is there as it was written.

    Raises:
        CheckpointError: one sentence about the first that is not, or about another format.
    """
    read_description(path)
    for damage in damages(path, checksums=checksums, share=share):
        others = [o.name for o in list_checkpoints(path.parent.parent) if o != path]
        hint = f"one of {', '.join(others)}" if others else "another, or remove it to start from step 0"
        raise CheckpointError(
            f"{damage}: the checkpoint is damaged; point {path.parent / 'latest'} to {hint}"
        )


def check_model(path: Path, model: ModelConfig, fix: str) -> None:
    """Refuse a checkpoint whose weights are another model's.

    Raises:
        CheckpointError: one sentence that names the first difference, and `fix`.
    """
    for name, was, now in _differences(read_model(path), model):
        raise CheckpointError(
            f"{path} is a checkpoint of another model: model.{name} is {was} there "
            f"and {now} in this configuration; {fix}"
        )


def read_model(path: Path) -> ModelConfig:
    """The model whose weights a checkpoint holds.

    Raises:
        CheckpointError: if it is not one of this version's.
    """
    try:
        return ModelConfig.model_validate(read_description(path)["model"])
    except (KeyError, ValueError) as error:
        problem = str(error).splitlines()[0]
        raise CheckpointError(f"{path / 'trainer.json'}: no model of this version: {problem}") from None


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


def size_in_words(n_bytes: int) -> str:
    """A number of bytes, short."""
    return f"{n_bytes / 2**30:,.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:,.1f} MiB"


def _version(description: dict[str, Any]) -> str:
    versions = description.get("versions")
    return str(versions.get("dist_transformer", "unknown")) if isinstance(versions, dict) else "unknown"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{file}: cannot be read: it is no JSON object")
    return tree
