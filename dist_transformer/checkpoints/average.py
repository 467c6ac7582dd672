"""The mean of several checkpoints' weights, as a checkpoint: one tensor in memory at a time, whatever their layouts."""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from dist_transformer.checkpoints.folder import (
    FORMAT,
    PARTIAL,
    FileRecord,
    Layout,
    check_files,
    checkpoint_name,
    checkpoints_dir,
    hash_file,
    latest_checkpoint,
    list_checkpoints,
    read_description,
    read_trainer_state,
)
from dist_transformer.checkpoints.pieces import whole
from dist_transformer.checkpoints.publish import complete
from dist_transformer.checkpoints.reader import CheckpointReader
from dist_transformer.checkpoints.safe_files import Entry, write_safetensors
from dist_transformer.config import Weights
from dist_transformer.errors import CheckpointError

_FILE = "rank-00000.safetensors"
# What generating with it needs: copied from the run, so that the folder may be moved.
_OF_RUN = ("config.yaml", "tokenizer.json")
_WRITTEN = {_FILE, *_OF_RUN, "trainer.json", "index.json", "files.json"}


def newest_of(run_dir: Path, n: int) -> list[Path]:
    """The last n checkpoints, oldest first.

    Raises:
        CheckpointError: there are fewer.
    """
    latest = latest_checkpoint(run_dir)
    # Later ones belong to a course that was given up.
    found = [path for path in list_checkpoints(run_dir) if latest is not None and path.name <= latest.name]
    if len(found) < n:
        raise CheckpointError(
            f"{run_dir} has {len(found)} checkpoints, not {n}: keep more of them with checkpoint.keep, or ask for fewer"
        )
    return found[-n:]


def of_steps(run_dir: Path, steps: Sequence[int]) -> list[Path]:
    """The checkpoints of these steps.

    Raises:
        CheckpointError: one is not there.
    """
    there = {path.name: path for path in list_checkpoints(run_dir)}
    steps = list(dict.fromkeys(steps))
    for step in steps:
        if checkpoint_name(step) not in there:
            raise CheckpointError(
                f"{run_dir} has no checkpoint {checkpoint_name(step)}: there are {', '.join(there) or 'none'}"
            )
    return [there[checkpoint_name(step)] for step in steps]


def averaged_weights(checkpoints: Sequence[Path], which: Weights = "current") -> Iterator[tuple[str, Tensor]]:
    """Each parameter's mean over the checkpoints, added up in float64, in float32.

    Raises:
        CheckpointError: one is damaged, has no such weights, or is of another model than the first.
    """
    with contextlib.ExitStack() as stack:
        readers = [_open(path, stack) for path in checkpoints]
        for reader in readers:
            reader.require(which)
            _check_same_shapes(readers[0], reader)
        for name in readers[0].shapes:
            yield name, _mean(readers, name, which)


def write_average(
    checkpoints: Sequence[Path], out: Path | None = None, which: Weights = "current", overwrite: bool = False
) -> Path:
    """Write the mean as a checkpoint that has weights, and neither moments nor random generators.

    Args:
        checkpoints: of one run.
        out: a folder; None: beside them, `average-N-step-...`.

    Returns:
        The folder.

    Raises:
        CheckpointError: as `averaged_weights`, or the folder is there or cannot be written.
    """
    run_dir = checkpoints[0].parent.parent
    newest = max(checkpoints, key=lambda path: read_trainer_state(path).step)
    if out is None:
        ema = "-ema" if which == "ema" else ""
        out = checkpoints_dir(run_dir) / f"average-{len(checkpoints)}{ema}-{newest.name}"
    if out.exists():
        if not overwrite:
            raise CheckpointError(f"{out} is there already: give another --out, or --overwrite")
        if not (out / "trainer.json").exists() or "average" not in read_description(out):
            raise CheckpointError(f"{out} is there already and no mean of checkpoints: it is not overwritten")
    partial = out.with_name(out.name + PARTIAL)
    if not {path.name for path in partial.glob("*")} <= _WRITTEN:
        raise CheckpointError(f"{partial} is in the way, and holds what no average wrote")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        files = {_FILE: _write_weights(partial / _FILE, checkpoints, which)}
        for name in _OF_RUN:
            if (run_dir / name).exists():
                shutil.copyfile(run_dir / name, partial / name)
                files[name] = FileRecord((partial / name).stat().st_size, hash_file(partial / name))
        description = read_description(newest) | {
            "layout": asdict(Layout(1, 1, 0, "fp32", "none", False, "cpu")),
            "average": {"of": [path.name for path in checkpoints], "weights": which},
            "saved_at": round(time.time(), 3),
        }
        with CheckpointReader(newest) as reader:
            pieces = [whole(name, shape).to_json() for name, shape in reader.shapes.items()]
        return complete(partial, files, description, {_FILE: pieces})
    except OSError as error:
        raise CheckpointError(f"{error.filename or out}: cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_weights(file: Path, checkpoints: Sequence[Path], which: Weights) -> FileRecord:
    with CheckpointReader(checkpoints[0]) as reader:
        pieces = [whole(name, shape) for name, shape in reader.shapes.items()]
    parts = (weight for _, weight in averaged_weights(checkpoints, which))
    n_elements = sum(piece.length for piece in pieces)
    metadata = {
        "format": str(FORMAT),
        "pieces": json.dumps([piece.to_json() for piece in pieces], separators=(",", ":")),
    }
    return write_safetensors(file, [Entry("master", torch.float32, (n_elements,), parts)], metadata)


def _open(path: Path, stack: contextlib.ExitStack) -> CheckpointReader:
    check_files(path)
    return stack.enter_context(CheckpointReader(path))


def _check_same_shapes(first: CheckpointReader, other: CheckpointReader) -> None:
    for name in sorted(first.shapes.keys() | other.shapes.keys()):
        if first.shapes.get(name) != other.shapes.get(name):
            raise CheckpointError(f"{other.path} is of another model than {first.path}: {name} differs")


def _mean(readers: Sequence[CheckpointReader], name: str, which: Weights) -> Tensor:
    total = torch.zeros(readers[0].shapes[name], dtype=torch.float64)
    for reader in readers:
        total += reader.weight(name, which)
    return (total / len(readers)).float()
