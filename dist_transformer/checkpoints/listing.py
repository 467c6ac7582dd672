"""What a person wants to know of a run's checkpoints, at a glance. No torch."""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from dist_transformer.checkpoints.folder import (
    PARTIAL,
    best_checkpoint,
    checkpoints_dir,
    damages,
    latest_checkpoint,
    list_checkpoints,
    read_description,
    read_files,
    read_layout,
    read_trainer_state,
    size_in_words,
)
from dist_transformer.errors import CheckpointError

_HEADINGS = ("checkpoint", "saved", "size", "layout", "tokens", "state")


@dataclass(frozen=True)
class Line:
    """One checkpoint of a run; what cannot be read is empty."""

    name: str
    saved: str = ""
    size: str = ""
    layout: str = ""
    tokens: str = ""
    state: str = ""

    def cells(self) -> tuple[str, ...]:
        """In the order of the table's columns."""
        return (self.name, self.saved, self.size, self.layout, self.tokens, self.state)


def describe_run(run_dir: Path) -> list[Line]:
    """Every checkpoint of a run, oldest first; sizes of files are compared, contents are not.

    Raises:
        CheckpointError: if the run has no checkpoints.
    """
    root = checkpoints_dir(run_dir)
    if not root.is_dir():
        raise CheckpointError(f"{run_dir}: no run with checkpoints: {root} is missing")
    marks: dict[Path, list[str]] = {}
    for mark, find in (("latest", latest_checkpoint), ("best", best_checkpoint)):
        # Where a pointer leads nowhere, the table shows that none is marked; resuming says why.
        with contextlib.suppress(CheckpointError):
            if (found := find(run_dir)) is not None:
                marks.setdefault(found, []).append(mark)
    averages = sorted(path for path in root.glob("average-*") if (path / "files.json").exists())
    lines = [_describe(path, marks.get(path, [])) for path in [*list_checkpoints(run_dir), *averages]]
    unfinished = [
        path
        for path in root.glob("step-*")
        if path.suffix == PARTIAL or (path.is_dir() and not (path / "files.json").exists())
    ]
    lines += [
        Line(path.name, state="not complete: being written, or left by a crash")
        for path in sorted(unfinished)
    ]
    return lines


def table(lines: list[Line]) -> str:
    """Columns of text."""
    rows = [_HEADINGS, *(line.cells() for line in lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _describe(path: Path, marks: list[str]) -> Line:
    try:
        damage = next(iter(damages(path, checksums=False)), None)
        state = "complete" if damage is None else f"damaged: {damage}"
        return Line(
            path.name,
            _age(float(read_description(path).get("saved_at", 0.0))),
            size_in_words(sum(record["size"] for record in read_files(path).values())),
            str(read_layout(path)),
            f"{read_trainer_state(path).tokens_seen:,}",
            ", ".join([state, *marks]),
        )
    except CheckpointError as error:
        return Line(path.name, state=f"damaged: {error}")


def _age(saved_at: float) -> str:
    seconds = max(0.0, time.time() - saved_at)
    for unit, length in (("day", 86400.0), ("hour", 3600.0), ("minute", 60.0)):
        if seconds >= length:
            n = int(seconds // length)
            return f"{n} {unit}{'s' if n > 1 else ''} ago"
    return f"{seconds:.0f} s ago"
