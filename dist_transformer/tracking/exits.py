"""How each start of a run ended: `RUN_DIR/exits.jsonl`, one line an end, and whether another start makes sense.

A start leaves `attempt.json`, and its end takes it away again. An attempt that is still there at the next start was
killed: by SIGKILL, by a node that died, by the power. So no end goes unnoticed, though nobody was left to record it.
"""

import itertools
import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

ATTEMPT_NAME, EXITS_NAME = "attempt.json", "exits.jsonl"

Reason = Literal[
    "done",
    "early_stopped",
    "preflight",
    "stopped",
    "time_limit",
    "preempted",
    "signal",
    "nonfinite",
    "error",
    "crash",
    "watchdog",
    "killed",
]
"""done: all steps. early_stopped: it did not get better. stopped: a person asked (switch file, dashboard).
time_limit, preempted, signal: saved and left on request. preflight: a node was not fit. nonfinite: diverged.
error: a sentence for a person. crash: a bug, a lost peer. watchdog: hung. killed: it left no word.
"""
FINISHED = ("done", "early_stopped")
ON_REQUEST = ("stopped", "time_limit", "preempted", "signal")
FOR_A_PERSON = ("nonfinite", "error")
"""Ends that the same command would only repeat."""


@dataclass(frozen=True)
class Exit:
    """One line of `exits.jsonl`."""

    reason: Reason
    message: str
    """What a person should know; may be empty."""
    step: int
    """Updates done when it ended, as far as known."""
    checkpoint_step: int
    """Step of the newest checkpoint at that time; 0: none."""
    started: float
    """Seconds since 1970."""
    ended: float
    """Seconds since 1970; of an attempt that was killed, when its last sign of life was written."""
    job: str = ""
    """The Slurm job and its restart, `123.1`; empty elsewhere."""
    host: str = ""
    """Where rank zero ran."""


@dataclass(frozen=True)
class Decision:
    """Whether to start again by itself, and why."""

    restart: bool
    why: str


def begin_attempt(run_dir: Path, step: int) -> Exit | None:
    """Note that the run starts, on rank zero.

    Args:
        step: Updates done before.

    Returns:
        The line that was written for an earlier attempt that left none; None where all is in order.
    """
    lost = close_lost_attempt(run_dir)
    attempt = {
        "started": time.time(),
        "step": step,
        "job": job_name(),
        "host": platform.node(),
        "pid": os.getpid(),
    }
    _write(run_dir / ATTEMPT_NAME, attempt)
    return lost


def end_attempt(run_dir: Path, reason: Reason, step: int, message: str = "") -> Exit | None:
    """Note how the run ended; the first of several reports counts.

    Returns:
        The line that was written; None where this end was already recorded.
    """
    claimed = _claim(run_dir)
    if claimed is None:
        return None
    found = Exit(
        reason=reason,
        message=message,
        step=max(step, int(claimed.get("step", 0))),
        checkpoint_step=newest_step(run_dir),
        started=float(claimed.get("started", 0.0)),
        ended=time.time(),
        job=str(claimed.get("job", "")),
        host=str(claimed.get("host", "")),
    )
    _append(run_dir, found)
    return found


def read_attempt(run_dir: Path) -> dict[str, Any] | None:
    """What the start noted that has not ended: `job`, `host`, `pid`, `started`; None: there is none."""
    path = run_dir / ATTEMPT_NAME
    return _read(path) if path.exists() else None


def close_lost_attempt(run_dir: Path) -> Exit | None:
    """Record an attempt that ended without a word. Only when it is known that none is running."""
    path = run_dir / ATTEMPT_NAME
    if not path.exists():
        return None
    last_sign = path.stat().st_mtime
    beats = list((run_dir / "heartbeats").glob("rank-*.json"))
    last_sign = max([last_sign, *(beat.stat().st_mtime for beat in beats)])
    steps = [int(beat.get("step", 0)) for beat in map(_read, beats)]
    claimed = _claim(run_dir)
    if claimed is None:
        return None
    started = float(claimed.get("started", last_sign))
    found = Exit(
        reason="killed",
        message="it left no word: killed, out of memory, or its node died",
        # Heartbeats of an earlier attempt may lie there too; none counts for less than where this one began.
        step=max([int(claimed.get("step", 0)), *steps]),
        checkpoint_step=newest_step(run_dir),
        started=started,
        ended=max(started, last_sign),
        job=str(claimed.get("job", "")),
        host=str(claimed.get("host", "")),
    )
    _append(run_dir, found)
    return found


def read_exits(run_dir: Path) -> list[Exit]:
    """All ends, oldest first; a torn last line is left out."""
    path = run_dir / EXITS_NAME
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
            if value["reason"] in get_args(Reason):
                found.append(Exit(**value))
        except (ValueError, TypeError, KeyError):
            continue
    return found


def decide_restart(run_dir: Path, limit: int) -> Decision:
    """Whether the batch script should start the run again.

    Args:
        limit: Restarts after failures without a new checkpoint in between.
    """
    exits = read_exits(run_dir)
    if not exits:
        return Decision(True, "it has not ended before")
    last = exits[-1]
    if last.reason in FINISHED:
        why = "all steps are done" if last.reason == "done" else last.message or "it stopped early"
        return Decision(False, why)
    if last.reason == "stopped":
        return Decision(False, "it was stopped by hand")
    if last.reason in FOR_A_PERSON:
        return Decision(False, f"it would end the same way again: {last.message}")
    if last.reason in ON_REQUEST:
        most = max(1, limit)
        requests = list(itertools.takewhile(lambda end: end.reason in ON_REQUEST, reversed(exits)))[
            : most + 1
        ]
        if len(requests) > most and _no_progress(requests):
            return Decision(
                False,
                f"it was asked to stop {len(requests)} times before it got beyond step {last.checkpoint_step}",
            )
        return Decision(True, f"{last.reason}, saved at step {last.checkpoint_step}")
    failures: list[Exit] = []
    for end in reversed(exits):
        if end.reason in ON_REQUEST or (failures and end.checkpoint_step != failures[-1].checkpoint_step):
            break
        failures.append(end)
    if len(failures) > limit:
        return Decision(
            False,
            f"it failed {len(failures)} times without getting beyond step {last.checkpoint_step} ({last.reason})",
        )
    return Decision(
        True, f"{last.reason}; failure {len(failures)} of at most {limit} at step {last.checkpoint_step}"
    )


def newest_step(run_dir: Path) -> int:
    """Step of the newest complete checkpoint, by the name in `latest`; 0: none."""
    try:
        name = (run_dir / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    except OSError:
        return 0
    number = name.removeprefix("step-")
    return int(number) if number.isdigit() else 0


def job_name() -> str:
    """The Slurm job and its restart; empty outside of one."""
    job = os.environ.get("SLURM_JOB_ID", "")
    return f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else ""


def signal_reason(name: str) -> Reason:
    """Why a signal asked the run to stop. Slurm says neither; near the job's end it was the time limit."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    if end.isdigit() and int(end) - time.time() < 900:
        return "time_limit"
    in_job = "SLURM_JOB_ID" in os.environ
    return "preempted" if in_job and name in ("SIGUSR1", "SIGTERM") else "signal"


def _no_progress(exits: list[Exit]) -> bool:
    return len({end.checkpoint_step for end in exits}) == 1


def _claim(run_dir: Path) -> dict[str, Any] | None:
    """Take `attempt.json` away: of several processes that report the same end, one succeeds."""
    claimed = run_dir / f"{ATTEMPT_NAME}.{platform.node()}.{os.getpid()}"
    try:
        (run_dir / ATTEMPT_NAME).rename(claimed)
    except OSError:
        return None
    content = _read(claimed)
    claimed.unlink(missing_ok=True)
    return content


def _append(run_dir: Path, found: Exit) -> None:
    with (run_dir / EXITS_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(found), ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
    partial.replace(path)
