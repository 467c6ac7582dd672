"""Slurm's commands as functions: what they are asked, and their answers as plain values."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from dist_transformer.errors import LaunchError

_TIMEOUT_S = 60


def run_slurm(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Output of a command such as `sbatch`.

    Raises:
        LaunchError: it is not installed, fails, or does not answer.
    """
    if shutil.which(command[0]) is None:
        raise LaunchError(
            f"there is no {command[0]} here: run this where Slurm's commands are, or use launch/local.sh"
        )
    try:
        done = subprocess.run(
            list(command),
            env=None if environment is None else {**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{command[0]} did not answer within {_TIMEOUT_S} s: is slurmctld up?") from None
    if done.returncode:
        lines = [line.removeprefix(f"{command[0]}: ") for line in done.stderr.strip().splitlines()]
        reason = "; ".join(line.removeprefix("error: ") for line in lines) or f"exit code {done.returncode}"
        raise LaunchError(f"{command[0]} refused: {reason}")
    # `sbatch --test-only` says when the job would start on the error stream.
    return done.stdout.strip() or done.stderr.strip()


def job_fields(job: str) -> dict[str, str]:
    """What `scontrol show job` says: JobState, Restarts, ExitCode, Reason, NodeList; empty where it forgot the job."""
    try:
        shown = run_slurm(["scontrol", "-o", "show", "job", job])
    except LaunchError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    return dict(word.split("=", 1) for word in shown.splitlines()[0].split() if "=" in word) if shown else {}


def has_slurm() -> bool:
    """Whether Slurm's commands are here."""
    return shutil.which("scontrol") is not None
