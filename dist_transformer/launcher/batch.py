"""What a batch script asks of us: before its ranks start, and after they have ended. Imports no torch."""

import os
import platform
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dist_transformer.checkpoints.folder import read_trainer_state
from dist_transformer.config import Config, load_config
from dist_transformer.errors import CheckpointError, ConfigError, LaunchError
from dist_transformer.launcher.slurm import has_slurm, job_fields
from dist_transformer.tracking.exits import (
    FINISHED,
    close_lost_attempt,
    decide_restart,
    newest_step,
    read_attempt,
    read_exits,
)
from dist_transformer.tracking.heartbeats import read_beats

_SILENT_S = 60.0
"""A start whose ranks have written nothing for so long has ended, where nobody can be asked."""


@dataclass(frozen=True)
class Beginning:
    """What the script needs to know before it starts ranks."""

    run_dir: Path
    max_restarts: int
    n_ends: int
    """Lines of `exits.jsonl`: whether training began shows later in their number."""
    checkpoint: str
    """Name of the newest one; empty: none."""
    finished: str
    """Why there is nothing to do, in words; empty: there is."""


@dataclass(frozen=True)
class Verdict:
    """What the script does next."""

    verdict: Literal["finished", "restart", "stop", "not_begun"]
    """not_begun: the ranks ended before training did begin, which another start would only repeat."""
    why: str
    checkpoint: str
    """Name of the newest one; empty: none."""


def begin_job(path: str, overrides: Sequence[str], array_task: int | None = None) -> Beginning:
    """Check the configuration, and close what an earlier start left open.

    Args:
        path: The configuration.
        overrides: `section.key=value`.
        array_task: Number of this job in its array: the seed of a run of its own.

    Raises:
        ConfigError: it cannot be used.
        LaunchError: another job, or somebody without one, trains in this run directory now.
    """
    config = load_config(path, list(overrides))
    run_dir = Path(config.run.dir if array_task is None else f"{config.run.dir}-seed{array_task}")
    close_dead_attempt(run_dir)
    return Beginning(
        run_dir=run_dir,
        max_restarts=config.faults.max_restarts,
        n_ends=len(read_exits(run_dir)),
        checkpoint=_checkpoint(run_dir),
        finished=_why_finished(run_dir, config),
    )


def end_job(run_dir: Path, limit: int, n_ends: int) -> Verdict:
    """Record how the start ended, where it left no word, and decide whether there is another.

    Args:
        run_dir: Of the run.
        limit: Restarts after failures without a new checkpoint in between.
        n_ends: Lines of `exits.jsonl` when the job began.

    Raises:
        LaunchError: the run is not this job's, and goes on.
    """
    close_dead_attempt(run_dir)
    exits, checkpoint = read_exits(run_dir), _checkpoint(run_dir)
    if len(exits) <= n_ends:
        return Verdict("not_begun", "training did not begin", checkpoint)
    decision = decide_restart(run_dir, limit)
    if exits[-1].reason in FINISHED:
        return Verdict("finished", decision.why, checkpoint)
    return Verdict("restart" if decision.restart else "stop", decision.why, checkpoint)


def close_dead_attempt(run_dir: Path) -> None:
    """Record a start that nobody runs any more.

    Raises:
        LaunchError: it runs.
    """
    attempt = read_attempt(run_dir)
    if attempt is None:
        return
    job = str(attempt.get("job", "")).partition(".")[0]
    # Within a job, the batch script asks when its ranks have ended, or when a node took an earlier start with it.
    if not (job and job == os.environ.get("SLURM_JOB_ID")) and _runs(run_dir, job, attempt):
        whose = f"job {job}" if job else f"process {attempt.get('pid')} on {attempt.get('host')}"
        raise LaunchError(
            f"{run_dir} is being trained by {whose}: wait for its end, or stop it with "
            f"dist-transformer cancel {run_dir}"
        )
    close_lost_attempt(run_dir)


def as_shell(answer: Beginning | Verdict) -> str:
    """Assignments that a shell evaluates."""
    return "\n".join(f"{name}={shlex.quote(str(value))}" for name, value in vars(answer).items())


def _runs(run_dir: Path, job: str, attempt: Mapping[str, Any]) -> bool:
    if job and has_slurm():
        deadline = time.monotonic() + _SILENT_S
        # The next job of a chain may start while the nodes are still cleared of the one before it.
        while (state := job_fields(job).get("JobState", "")) == "COMPLETING" and time.monotonic() < deadline:
            time.sleep(1.0)
        return state in ("RUNNING", "COMPLETING", "SUSPENDED")
    if not job and attempt.get("host") == platform.node():
        return Path(f"/proc/{attempt.get('pid')}").exists()
    return any(time.time() - beat.written < _SILENT_S for beat in read_beats(run_dir))


def _why_finished(run_dir: Path, config: Config) -> str:
    checkpoint, step = _checkpoint(run_dir), newest_step(run_dir)
    if checkpoint and step >= config.train.steps:
        if _lacks_evaluation(run_dir / "checkpoints" / checkpoint, config):
            return ""
        return f"{checkpoint} of {config.train.steps} steps"
    exits = read_exits(run_dir)
    if not exits or exits[-1].reason != "early_stopped":
        return ""
    try:
        before = load_config(run_dir / "config.yaml")
    except (ConfigError, OSError):
        return ""
    # Whoever asks for more steps, or for more patience, wants it to go on.
    same = (
        before.train.steps == config.train.steps
        and before.train.early_stopping == config.train.early_stopping
    )
    return exits[-1].message or f"stopped early at {checkpoint}" if same else ""


def _lacks_evaluation(checkpoint: Path, config: Config) -> bool:
    """Whether the run was stopped between its last step and the end of its last evaluation."""
    try:
        state = read_trainer_state(checkpoint)
    except (CheckpointError, OSError):
        return False
    return state.is_unevaluated and any(corpus.eval for corpus in config.data.corpora())


def _checkpoint(run_dir: Path) -> str:
    step = newest_step(run_dir)
    return f"step-{step:08d}" if step else ""
