"""The jobs of a run directory: which they are, how the run does, and how to stop it."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_transformer.config import load_config
from dist_transformer.errors import ConfigError, LaunchError
from dist_transformer.launcher.slurm import has_slurm, job_fields, run_slurm
from dist_transformer.tracking.exits import ATTEMPT_NAME, FINISHED, Exit, newest_step, read_exits
from dist_transformer.tracking.heartbeats import Beat, read_beats
from dist_transformer.tracking.metrics import read_metrics
from dist_transformer.tracking.startup import describe_start, last_start
from dist_transformer.tracking.switches import ask_to_stop

JOBS_NAME = "jobs.json"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
_ALIVE_S = 120.0
"""A rank whose last sign of life is younger counts as running."""


@dataclass(frozen=True)
class JobState:
    """A job as Slurm sees it."""

    id: str
    state: str
    """PENDING, RUNNING, COMPLETED, ...; `forgotten` where Slurm does not know it any more, empty without Slurm."""
    reason: str
    restarts: int
    nodes: str


@dataclass(frozen=True)
class RunStatus:
    """How a run does."""

    run_dir: Path
    steps: int
    step: int
    checkpoint_step: int
    latest: dict[str, Any]
    """The newest row of figures."""
    jobs: list[JobState]
    exits: list[Exit]
    beats: list[Beat]
    now: float
    is_open: bool
    """A start is recorded that has not ended."""

    @property
    def is_alive(self) -> bool:
        """Whether any rank has shown a sign of life of late."""
        return self.is_open and any(self.now - beat.written < _ALIVE_S for beat in self.beats)

    @property
    def word(self) -> str:
        """The state in one word."""
        if self.exits and self.exits[-1].reason in FINISHED and not self.is_open:
            return "finished"
        states = {job.state for job in self.jobs}
        if "RUNNING" in states or "COMPLETING" in states or (not states - {""} and self.is_alive):
            return "running"
        if "PENDING" in states:
            return "waiting"
        return "stopped" if self.exits else ("running" if self.is_alive else "not started")


def record_jobs(run_dir: Path, jobs: list[str], folder: Path) -> None:
    """Remember jobs that were submitted for a run."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / JOBS_NAME
    known = _read(path)
    known += [{"job": job, "submitted": time.time(), "folder": str(folder)} for job in jobs]
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def run_status(run_dir: Path) -> RunStatus:
    """What the files of a run and Slurm say.

    Raises:
        LaunchError: it is no run directory.
    """
    jobs = [str(entry["job"]) for entry in _read(run_dir / JOBS_NAME)]
    if not jobs and not (run_dir / "config.yaml").exists():
        raise LaunchError(f"{run_dir} is no run directory: it has neither {JOBS_NAME} nor config.yaml")
    steps, rows = 0, []
    try:
        steps = load_config(run_dir / "config.yaml").train.steps
        rows = [row for row in read_metrics(run_dir) if row["event"] == "train"]
    except (ConfigError, OSError):
        pass  # submitted and not started yet
    exits, beats = read_exits(run_dir), read_beats(run_dir)
    latest = rows[-1] if rows else {}
    return RunStatus(
        run_dir=run_dir,
        steps=steps,
        step=int(latest.get("step", 0)),
        checkpoint_step=newest_step(run_dir),
        latest=latest,
        jobs=[_job_state(job) for job in jobs[-5:]],
        exits=exits,
        beats=beats,
        now=time.time(),
        is_open=(run_dir / ATTEMPT_NAME).exists(),
    )


def describe_status(status: RunStatus) -> list[str]:
    """The status for people."""
    lines = [f"{status.run_dir}: {status.word}"]
    if status.steps:
        share = 100 * status.step / status.steps
        lines.append(
            f"  step        {status.step:,} of {status.steps:,} ({share:.0f} %); saved at {status.checkpoint_step:,}"
        )
    if status.latest:
        row = status.latest
        lines.append(
            f"  figures     loss {row.get('train/loss', float('nan')):.4f}, "
            f"{row.get('perf/tokens_per_sec', 0):,.0f} tokens/s, {row.get('perf/step_time_s', 0):.3g} s a step"
        )
    for job in status.jobs:
        reason = f" ({job.reason})" if job.reason not in ("", "None") else ""
        restarts = f", restarted {job.restarts} times" if job.restarts else ""
        nodes = f" on {job.nodes}" if job.nodes not in ("", "(null)") else ""
        lines.append(f"  job {job.id:<8}{job.state or 'unknown: no Slurm here'}{reason}{nodes}{restarts}")
    if start := last_start(status.run_dir):
        lines.append(f"  last start  {describe_start(start)}")
    if status.is_alive:
        oldest = min(status.beats, key=lambda beat: beat.written)
        lines.append(
            f"  ranks       {len(status.beats)}; oldest sign of life {max(0.0, status.now - oldest.written):.0f} s "
            f"ago, from rank {oldest.rank} on {oldest.host} ({oldest.phase}, step {oldest.step})"
        )
    for end in status.exits[-5:]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(end.ended))
        lines.append(
            f"  ended       {when} {end.reason} at step {end.step:,}{': ' if end.message else ''}{end.message}"
        )
    return lines


def cancel_run(run_dir: Path, *, now: bool = False) -> list[str]:
    """Stop a run: running ranks save first, what waits in the queue is taken out.

    Args:
        now: Do not save.

    Returns:
        What was done, a line each.

    Raises:
        LaunchError: it is no run directory, or nothing of it runs or waits.
    """
    status = run_status(run_dir)
    done = []
    # Those that wait first: the next of a chain starts as soon as the one before it ends.
    for job in sorted(status.jobs, key=lambda job: job.state == "RUNNING"):
        if job.state == "PENDING" or (now and job.state == "RUNNING"):
            run_slurm(["scancel", job.id])
            done.append(f"job {job.id} ({job.state.lower()}) is cancelled")
        elif job.state == "RUNNING":
            ask_to_stop(run_dir)
            done.append(f"job {job.id} saves and ends; the same submit goes on from there")
    if not done and status.is_alive and status.word != "finished":
        ask_to_stop(run_dir)
        done.append(f"the ranks of {run_dir} save and end after the present step")
    if not done:
        raise LaunchError(f"{run_dir}: nothing runs or waits ({status.word})")
    return done


def _job_state(job: str) -> JobState:
    fields = job_fields(job) if has_slurm() else None
    if fields is None:
        return JobState(job, "", "", 0, "")
    return JobState(
        id=job,
        state=fields.get("JobState", "forgotten"),
        reason=fields.get("Reason", ""),
        restarts=int(fields.get("Restarts", "0")),
        nodes=fields.get("NodeList", ""),
    )


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LaunchError(f"{path} cannot be read: {error}") from None
    return content if isinstance(content, list) else []
