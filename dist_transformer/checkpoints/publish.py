"""Making a checkpoint visible: synced, renamed, `latest` replaced, old ones removed.

A crash between any two lines leaves the previous checkpoint whole, and `latest` always names a complete one.
"""

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


def partial_folder(root: Path, step: int) -> Path:
    """Where a checkpoint is written before it is complete."""
    return root / f"{checkpoint_name(step)}{PARTIAL}"


def remove_left_overs(root: Path) -> None:
    """What interrupted saves have left."""
    for stale in root.glob(f"*{PARTIAL}"):
        shutil.rmtree(stale, ignore_errors=True)


def publish(
    partial: Path,
    files: Mapping[str, FileRecord],
    description: Mapping[str, Any],
    index: Mapping[str, Any],
    *,
    keep: int,
    keep_every: int | None,
) -> Path:
    """Complete a folder whose tensors are written and synced, and make it the latest.

    Args:
        files: What the ranks wrote.
        description: `trainer.json`.
        index: `index.json`.
        keep: Newest checkpoints that stay.
        keep_every: Checkpoints of steps that this divides stay for ever.

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
    _remove_old(final, keep, keep_every)
    return final


def _remove_old(newest: Path, keep: int, keep_every: int | None) -> None:
    for old in list_checkpoints(newest.parent.parent)[:-keep]:
        step = int(old.name.removeprefix("step-"))
        if old != newest and not (keep_every and step % keep_every == 0):
            _discard(old)


def _discard(path: Path) -> None:
    """Out of sight in one step, then removed: a crash leaves what the next save removes, never half of it."""
    gone = path.with_name(f"{path.name}.old{PARTIAL}")
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _write_json(path: Path, value: object, indent: int | None) -> None:
    path.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
