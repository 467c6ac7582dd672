"""What a section of benchmarks/gpu.py is given, and how it reports."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_sections.plan import Setting


class UnavailableError(Exception):
    """Why something cannot be measured here, in one sentence."""


@dataclass
class Task:
    """What a section is to do, and where its figures go."""

    setting: Setting
    arguments: dict[str, Any]
    started: float
    """When its process was started, in seconds of the clock."""
    deadline: float
    """When it will be ended."""
    result: Path
    figures: dict[str, Any] = field(default_factory=dict)

    def add(self, **figures: Any) -> None:
        """Further figures, on disk at once."""
        self.figures |= figures
        self.write("running", "")

    def write(self, status: str, reason: str) -> None:
        """Replace the result."""
        content = {"status": status, "reason": reason, "figures": self.figures}
        beside = self.result.with_suffix(".partial")
        beside.write_text(json.dumps(content))
        beside.replace(self.result)

    def time_left(self) -> float:
        """Seconds until it will be ended."""
        return self.deadline - time.time()


def first_line(error: BaseException) -> str:
    """What a failure says, as one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"[:300]


def is_out_of_memory(error: BaseException) -> bool:
    """Of the device; older versions of torch have no name of their own for it, and libraries another."""
    return type(error).__name__ == "OutOfMemoryError" or any(
        sign in str(error) for sign in ("out of memory", "ALLOC_FAILED")
    )
