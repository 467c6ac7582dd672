"""Making a checkpoint visible: synced, renamed, `latest` and `best` replaced, old ones removed.

A crash between any two lines leaves the previous checkpoint whole, and the pointers always name complete ones.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_transformer.checkpoints.folder import (
    PARTIAL,
    FileRecord,
    checkpoint_name,
    hash_file,
    list_checkpoints,
)

_OLD = f".old{PARTIAL}"
"""Ends the name of a folder that is to be removed."""


def partial_folder(root: Path, step: int) -> Path:
    """Where a checkpoint is written before it is complete."""
    return root / f"{checkpoint_name(step)}{PARTIAL}"


def remove_left_overs(root: Path) -> None:
    """What interrupted saves have left."""
    for stale in root.glob(f"step-*{PARTIAL}"):  # an average may be under way
        shutil.rmtree(stale, ignore_errors=True)


def bring_back(root: Path) -> None:
    """Undo half of a replacement: where `latest` names a checkpoint that a crash has left set aside, it is that one.

    Only for a run that nobody else saves: a save under way would be undone.
    """
    try:
        name = (root / "latest").read_text(encoding="utf-8").strip()
    except OSError:
        return
    if name and not (root / name).exists() and (root / f"{name}{_OLD}").is_dir():
        (root / f"{name}{_OLD}").rename(root / name)


def publish(
    partial: Path,
    files: Mapping[str, FileRecord],
    description: Mapping[str, Any],
    index: Mapping[str, Any],
    *,
    keep: int,
    keep_every: int | None,
) -> Path:
    """Complete a folder whose tensors are written and synced, make it the latest, and mark the best.

    Which one is the best stands in the description's `state`: `best` is written again whenever it does not say so,
    which mends what a crash has left.

    Args:
        files: What the ranks wrote.
        description: `trainer.json`.
        index: `index.json`.
        keep: Newest checkpoints that stay; so does the best.
        keep_every: Checkpoints of steps that this divides stay for ever.

    Raises:
        OSError: the disk is full, or the folder is gone.
    """
    final = complete(partial, files, description, index)
    _point(final.parent / "latest", final.name)
    best = final.parent / "best"
    if found := description.get("state", {}).get("best"):
        name = checkpoint_name(found["step"])
        if (final.parent / name).is_dir():
            _point(best, name)
    _remove_old(final, best.read_text(encoding="utf-8").strip() if best.exists() else "", keep, keep_every)
    return final


def complete(
    partial: Path, files: Mapping[str, FileRecord], description: Mapping[str, Any], index: Mapping[str, Any]
) -> Path:
    """Give a folder its descriptions and its name; a folder of that name is replaced.

    Raises:
        OSError: the disk is full, or the folder is gone.
    """
    records = dict(files)
    for name, tree in (("trainer.json", description), ("index.json", index)):
        _write_json(partial / name, tree, indent=1 if name == "trainer.json" else None)
        records[name] = FileRecord((partial / name).stat().st_size, hash_file(partial / name))
    _write_json(partial / "files.json", {name: asdict(records[name]) for name in sorted(records)}, indent=1)
    _sync(partial)
    final = partial.with_name(partial.name.removesuffix(PARTIAL))
    # The same step again, after a resume from an older one: the new one replaces it.
    old = _put_aside(final) if final.exists() else None
    partial.rename(final)
    _sync(final.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _point(pointer: Path, name: str) -> None:
    """Make a pointer name a checkpoint, in one step."""
    beside = pointer.with_name(f"{pointer.name}.partial-pointer")
    beside.write_text(name + "\n", encoding="utf-8")
    _sync(beside)
    beside.replace(pointer)
    _sync(pointer.parent)


def _remove_old(newest: Path, best: str, keep: int, keep_every: int | None) -> None:
    # Later ones belong to a course that was given up, and are replaced when the run comes to their steps.
    own = [path for path in list_checkpoints(newest.parent.parent) if path.name <= newest.name]
    for old in own[:-keep]:
        step = int(old.name.removeprefix("step-"))
        if old.name != best and not (keep_every and step % keep_every == 0):
            # The new checkpoint stands: one that cannot be removed is the next save's.
            with contextlib.suppress(OSError):
                shutil.rmtree(_put_aside(old), ignore_errors=True)


def _put_aside(path: Path) -> Path:
    """Out of sight in one step, to be removed: a crash leaves what the next save removes, never half of it."""
    gone = path.with_name(f"{path.name}{_OLD}")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    return gone


def _write_json(path: Path, value: object, indent: int | None) -> None:
    path.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
