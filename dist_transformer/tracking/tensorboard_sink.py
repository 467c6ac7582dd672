"""Rows to TensorBoard event files under the run directory."""

import importlib.util
from pathlib import Path
from typing import Any

from dist_transformer.errors import ConfigError
from dist_transformer.tracking.jsonl import Row

FOLDER = "tensorboard"
_NOT_LOGGED = frozenset({"step", "row", "time", "event"})


def check_tensorboard() -> None:
    """Refuse, in one sentence, a configuration that asks for TensorBoard where it is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "tracking.tensorboard=true needs the package tensorboard, which is not installed: "
            "run 'pip install tensorboard' or set tracking.tensorboard=false"
        )


class TensorBoardSink:
    """Scalars over the training step; alerts as text."""

    name = "tensorboard"
    stop_requested = False

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / FOLDER
        self._writer: Any = None

    def open(self) -> None:
        """Find out early whether the folder can be written."""
        self._folder.mkdir(parents=True, exist_ok=True)

    def write(self, row: Row) -> None:
        """Write the row's numbers."""
        step = row["step"]
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides what an earlier process wrote for the steps that are now trained again.
            restarted = any(self._folder.iterdir())
            self._writer = SummaryWriter(
                str(self._folder), purge_step=step if restarted else None, flush_secs=10
            )
        for key, value in row.items():
            if key not in _NOT_LOGGED and isinstance(value, int | float):
                self._writer.add_scalar(key, value, step, walltime=row["time"])
        if row["event"] == "alert":
            text = ", ".join(f"{key}={value}" for key, value in row.items() if key not in _NOT_LOGGED)
            self._writer.add_text("alert", text, step, walltime=row["time"])

    def close(self, exit_code: int, preempted: bool) -> None:
        """Flush the event file."""
        if self._writer is not None:
            self._writer.close()

    def interrupt(self) -> None:
        """Nothing to interrupt: writing to a local file is all that can block."""

    def abandon(self) -> None:
        """Nothing to give up: the event file is complete up to its last flush."""

    def where(self) -> str:
        """How to look at the curves."""
        return f"TensorBoard files in {self._folder}; look with: tensorboard --logdir {self._folder}"
