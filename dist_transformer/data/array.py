"""Preparation by several machines: each task writes a part of its own below the folder; `merge` joins them.

```
DIR/prepare.json        what all tasks were begun with
    parts/00000/        an ordinary prepared folder: what task 0 wrote
    parts/manifest.json what DIR/manifest.json will be     (while merging)
    parts/moves.json    which shard goes where             (while merging)
```
"""

import json
import os
import shutil
import socket
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from dist_transformer.data.folder import Recipe, describe_difference, read_description
from dist_transformer.data.inputs import Input, check_inputs
from dist_transformer.data.manifest import (
    MANIFEST_NAME,
    PARTS_NAME,
    PREPARATION_NAME,
    SPLITS,
    TOKENIZER_NAME,
    Manifest,
    ShardInfo,
    load_manifest,
    write_atomically,
)
from dist_transformer.data.preparation import load_given
from dist_transformer.data.shares import Share, share_inputs
from dist_transformer.data.summary import PreparedSummary
from dist_transformer.errors import DataError

_MOVES_NAME = "moves.json"


def begin_task(
    recipe: Recipe,
    out: Path,
    inputs: list[Input],
    held: list[Input],
    tokenizer: str | Path,
    task: int,
    n_tasks: int,
) -> tuple[Share, list[Input], Path]:
    """What a task does of the whole: its share, its inputs, and the folder that it writes.

    Raises:
        DataError: arguments that an array cannot have, or `out` is complete, was begun by an array with other
            arguments, or holds other things.
    """
    recipe.check()
    if recipe.dedup and not held and recipe.held_out != 0:
        raise DataError(
            "tasks do not see each other's documents, so that one task's held-out documents could be another's "
            "training documents: with --dedup, give --held-out 0 or held-out files"
        )
    if recipe.n_shards is not None and recipe.n_shards < n_tasks:
        raise DataError(
            f"{recipe.n_shards} shards are fewer than the {n_tasks} tasks: each writes one at least"
        )
    check_inputs(inputs, held)
    share, own = share_inputs(inputs, held, task, n_tasks)
    wanted = {
        "format": 1,
        "arguments": recipe.arguments(load_given(Path(tokenizer)).sha256) | {"tasks": n_tasks},
        "array_inputs": share.inputs,
    }
    _claim(out, wanted)
    return share, own, _part_folder(out, task)


def finished_task(
    recipe: Recipe, folder: Path, share: Share, tokenizer: str | Path
) -> PreparedSummary | None:
    """What a task wrote that has ended before, such as one that Slurm starts again; None if there is work to do."""
    if not (folder / MANIFEST_NAME).exists():
        return None
    begun = read_description(folder / PREPARATION_NAME)
    arguments = recipe.arguments(load_given(Path(tokenizer)).sha256) | share.arguments()
    if begun.get("arguments") != arguments or begun.get("array_inputs") != share.inputs:
        return None
    return PreparedSummary.of(load_manifest(folder), 0.0)


def _claim(out: Path, wanted: dict[str, Any]) -> None:
    """Say what the array was begun with, or find that another task has said so; all tasks may come at once."""
    path = out / PREPARATION_NAME
    try:
        out.mkdir(parents=True, exist_ok=True)
        others = {entry.name for entry in out.iterdir()} - {PARTS_NAME, PREPARATION_NAME}
        if MANIFEST_NAME in others:
            raise DataError(f"{out} is already prepared: use another --out, or remove it")
        if others:
            raise DataError(
                f"{out} holds other things ({min(others)}): give a new or empty folder with --out"
            )
        (out / PARTS_NAME).mkdir(exist_ok=True)
        if not path.exists():
            # A name of its own for each task: two that write one file would rename it from under each other.
            own = out / PARTS_NAME / f".{PREPARATION_NAME}-{socket.gethostname()}-{os.getpid()}"
            own.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
            own.replace(path)
    except FileExistsError as error:
        raise DataError(f"{out} is a file: give a folder with --out") from error
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror}") from error
    if (begun := read_description(path)) != wanted:
        raise DataError(
            f"{out} was begun with {describe_difference(begun, wanted)}: run the array with those, or remove "
            "the folder"
        )


def _part_folder(out: Path, task: int) -> Path:
    return out / PARTS_NAME / f"{task:05d}"


def merge(out: str | Path) -> PreparedSummary:
    """Join what all tasks of an array wrote into one prepared folder; shards are renamed, not copied.

    It may be interrupted at any point and run again; on a folder that is merged already, it changes nothing.

    Raises:
        DataError: there is nothing to merge, a task has not finished, or one was run with other arguments.
    """
    started = time.monotonic()
    out = Path(out)
    parts = out / PARTS_NAME
    moves = parts / _MOVES_NAME
    if not (out / MANIFEST_NAME).exists():
        if not moves.exists():
            _plan(out)
        _move_shards(out, json.loads(moves.read_text(encoding="utf-8")))
        _copy(_part_folder(out, 0) / TOKENIZER_NAME, out / TOKENIZER_NAME)
        _sync(out)
        (parts / MANIFEST_NAME).replace(out / MANIFEST_NAME)
    if moves.exists():
        # Its presence says that the rest may go, so it goes last.
        for entry in parts.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
        shutil.rmtree(parts)
    return PreparedSummary.of(load_manifest(out), time.monotonic() - started)


def _plan(out: Path) -> None:
    """Check the parts and write down what is to be done."""
    manifests = _load_parts(out)
    counters = {split: count() for split in SPLITS}
    moves: list[tuple[str, str, int]] = []
    joined: dict[str, list[ShardInfo]] = {split: [] for split in SPLITS}
    for task, manifest in enumerate(manifests):
        for split in SPLITS:
            for shard in manifest.shards(split):
                name = f"{split}-{next(counters[split]):05d}.tar"
                moves.append((f"{_part_folder(out, task).name}/{shard.file}", name, shard.bytes))
                joined[split].append(replace(shard, file=name, base=""))
    counts = {name: sum(part.counts[name] for part in manifests) for name in manifests[0].counts}
    replace(
        manifests[0],
        root=out / PARTS_NAME,
        train=tuple(joined["train"]),
        eval=tuple(joined["eval"]),
        counts=counts,
    ).save()
    write_atomically(out / PARTS_NAME / _MOVES_NAME, json.dumps(moves) + "\n")


def _load_parts(out: Path) -> list[Manifest]:
    begun = read_description(out / PREPARATION_NAME)
    n_tasks = begun.get("arguments", {}).get("tasks")
    if not n_tasks or not (out / PARTS_NAME).is_dir():
        raise DataError(
            f"{out} holds no parts to merge: let every task of an array write its own first, with "
            f"`dist-transformer prepare text FILES --out {out} --task I --tasks N --tokenizer FILE`"
        )
    folders = [_part_folder(out, task) for task in range(n_tasks)]
    unfinished = [task for task, folder in enumerate(folders) if not (folder / MANIFEST_NAME).exists()]
    if unfinished:
        raise DataError(
            f"{_listed(unfinished)} of the {n_tasks} tasks of {out} (counted from 0) did not finish: run "
            f"{'it' if len(unfinished) == 1 else 'them'} again, then merge; in Slurm, sbatch --array="
            f"{_ranges(unfinished)} with --tasks {n_tasks}"
        )
    for task, folder in enumerate(folders):
        wanted = {"arguments": begun["arguments"] | {"task": task}, "array_inputs": begun["array_inputs"]}
        of_part = read_description(folder / PREPARATION_NAME)
        if {name: of_part.get(name) for name in wanted} != wanted:
            raise DataError(
                f"task {task} of {out} was begun with {describe_difference(of_part, wanted)}: remove {folder} "
                "and run the task again"
            )
    return [load_manifest(folder) for folder in folders]


def _listed(tasks: list[int]) -> str:
    return ("task " if len(tasks) == 1 else "tasks ") + _ranges(tasks).replace(",", ", ")


def _ranges(tasks: list[int]) -> str:
    """Ascending numbers as Slurm writes them: 3,5-7."""
    ranges: list[list[int]] = []
    for task in tasks:
        if ranges and task == ranges[-1][1] + 1:
            ranges[-1][1] = task
        else:
            ranges.append([task, task])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges)


def _move_shards(out: Path, moves: list[tuple[str, str, int]]) -> None:
    for old, new, n_bytes in moves:
        source, target = out / PARTS_NAME / old, out / new
        if source.exists():
            _rename(source, target)
        elif not target.exists() or target.stat().st_size != n_bytes:
            raise DataError(f"shard {source} is gone, and {target} is not it: prepare the folder again")


def _rename(source: Path, target: Path) -> None:
    source.replace(target)


def _copy(source: Path, target: Path) -> None:
    if source.exists():
        partial = target.with_name(target.name + ".partial")
        shutil.copyfile(source, partial)
        partial.replace(target)


def _sync(folder: Path) -> None:
    """Have the renames on disk before the manifest that lists their results."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
