"""Signs of life: each rank keeps one small file, `RUN_DIR/heartbeats/rank-00000.json`, and anybody may read them.

Files, because they need no answer: a rank that is stopped or cut off writes nothing, and exactly that is the finding.
"""

import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER = "heartbeats"


def node_name() -> str:
    """This machine, by the name that Slurm gives it in a job: the one that `--exclude` and `scontrol` know."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


@dataclass(frozen=True)
class Beat:
    """What a rank said last."""

    rank: int
    host: str
    pid: int
    phase: str
    """What it was doing: starting, waiting for data, training, evaluating, saving."""
    step: int
    """The step it was at."""
    since: float
    """When it entered that phase, in seconds since 1970 by its own clock."""
    written: float
    """When it wrote this, by its own clock."""
    attempt: str
    """Which start of the run it belongs to."""


def beat_path(run_dir: Path, rank: int) -> Path:
    """The file of a rank."""
    return run_dir / FOLDER / f"rank-{rank:05d}.json"


def write_beat(run_dir: Path, rank: int, phase: str, step: int, since: float, attempt: str) -> None:
    """Say that this rank is alive. A file that cannot be written is no reason to stop training."""
    beat = Beat(rank, node_name(), os.getpid(), phase, step, since, time.time(), attempt)
    path = beat_path(run_dir, rank)
    try:
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(json.dumps(asdict(beat)) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError:
        return


def read_beats(run_dir: Path, attempt: str | None = None) -> list[Beat]:
    """The last beat of every rank, in order; of one attempt alone where it is named."""
    found = []
    for path in sorted((run_dir / FOLDER).glob("rank-*.json")):
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            beat = Beat(**content)
        except (OSError, ValueError, TypeError):
            continue
        if attempt is None or beat.attempt == attempt:
            found.append(beat)
    return found


def clear_beats(run_dir: Path) -> None:
    """Make the folder, without what an earlier start with more ranks left in it. Rank zero does it."""
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink(missing_ok=True)


def name_suspects(beats: list[Beat], silent_after_s: float, now: float) -> tuple[list[Beat], str]:
    """Which ranks keep the others waiting, and how it shows.

    A rank that writes no beats is stopped, dead or cut off. Where all write, those that have not reached the phase in
    which the others wait for them: a collective ends for nobody before all have come.

    Args:
        silent_after_s: Age of a beat from which its rank counts as silent.
        now: Seconds since 1970.
    """
    silent = [beat for beat in beats if now - beat.written > silent_after_s]
    if silent:
        return silent, "no sign of life"
    phases = {(beat.step, beat.phase) for beat in beats}
    if len(phases) > 1:
        groups = {key: [beat for beat in beats if (beat.step, beat.phase) == key] for key in phases}
        fewest = min(groups.values(), key=lambda group: (len(group), group[0].step))
        if 2 * len(fewest) < len(beats):
            return fewest, f"still {fewest[0].phase} (step {fewest[0].step}) while the others wait"
        earliest = min(groups)
        return groups[earliest], f"still {earliest[1]} (step {earliest[0]}) while the others wait"
    return [], "all ranks are in the same place"
