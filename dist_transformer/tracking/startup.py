"""Where the time from `sbatch` to the first step goes: `RUN_DIR/startup.jsonl`, a line for each start.

The scripts before this process (batch script, launch/node.sh) note in DIST_TRANSFORMER_CLOCK when each of them began.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from dist_transformer.tracking.accounts import process_age_s
from dist_transformer.tracking.exits import job_name

STARTUP_NAME = "startup.jsonl"
VARIABLE = "DIST_TRANSFORMER_CLOCK"


class StartClock:
    """The phases of a start on this rank, one after the other; made when the imports are done.

    Args:
        environment: With the stamps of the scripts before: `batch=1700000000.1 srun=1700000001.2 ...`.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        now = time.time()
        # What torchrun starts again began long after those scripts did.
        is_first = environment.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        before = _stamps(environment.get(VARIABLE, "")) if is_first else []
        self._marks = [*before, ("imports", now - process_age_s(), 0.0)]
        """Phase, when it began, CPU seconds of this process at that time."""
        self.is_over = False

    @property
    def phase(self) -> str:
        """What goes on now."""
        return self._marks[-1][0]

    def begin(self, phase: str) -> None:
        """The present phase ends, another begins."""
        self._marks.append((phase, time.time(), time.process_time()))

    def finish(self) -> tuple[dict[str, float], dict[str, float]]:
        """The last phase ends: seconds of each on the clock, CPU seconds of those in this process."""
        self.is_over = True
        self.begin("")
        seconds, cpu_seconds = {}, {}
        for (phase, began, cpu), (_, ended, cpu_then) in zip(self._marks[:-1], self._marks[1:], strict=True):
            # Slurm's own stamps are whole seconds, and clocks of two nodes differ.
            seconds[phase] = round(max(0.0, ended - began), 3)
            if cpu_then:
                cpu_seconds[phase] = round(cpu_then - cpu, 3)
        return seconds, cpu_seconds


def record_start(run_dir: Path, step: int, seconds: Mapping[str, float], cpu: Mapping[str, float]) -> None:
    """Append a start to `startup.jsonl`. A file that cannot be written is no reason not to train."""
    row = {"job": job_name(), "step": step, "seconds": dict(seconds), "cpu_seconds": dict(cpu)}
    try:
        with (run_dir / STARTUP_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError:
        return


def last_start(run_dir: Path) -> dict[str, float]:
    """Seconds of the phases of the newest start; empty: none is recorded."""
    try:
        lines = (run_dir / STARTUP_NAME).read_text(encoding="utf-8").splitlines()
        return dict(json.loads(lines[-1])["seconds"])
    except (OSError, ValueError, KeyError, IndexError):
        return {}


def describe_start(seconds: Mapping[str, float], cpu: Mapping[str, float] | None = None) -> str:
    """A start in one line; phases under a tenth of a second are left out.

    Args:
        seconds: Of each phase.
        cpu: CPU seconds, which are shown where they are known.
    """
    parts = [
        f"{phase} {taken:.1f}{f' ({cpu[phase]:.1f} CPU)' if cpu and phase in cpu else ''}"
        for phase, taken in seconds.items()
        if taken >= 0.1
    ]
    return f"first step after {sum(seconds.values()):.1f} s: {', '.join(parts)}"


def _stamps(text: str) -> list[tuple[str, float, float]]:
    found = []
    for word in text.split():
        name, _, value = word.partition("=")
        try:
            found.append((name.replace("_", " "), float(value.replace(",", ".")), 0.0))
        except ValueError:
            continue
    return found
