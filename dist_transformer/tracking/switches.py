"""Switches: files that a person puts into the run directory to have something done between two steps.

`touch RUN_DIR/STOP` saves and ends the run; `touch RUN_DIR/SAVE` saves. Rank zero looks, and takes the file away once
it is done. They work where signals do not: from another node, without Slurm, for whoever may write to the folder.
"""

from pathlib import Path

STOP_NAME, SAVE_NAME = "STOP", "SAVE"


def ask_to_stop(run_dir: Path) -> None:
    """Have the run save and end after the present step."""
    (run_dir / STOP_NAME).touch()


def is_set(run_dir: Path, name: str) -> bool:
    """Whether a switch is set."""
    return (run_dir / name).exists()


def take_away(run_dir: Path, name: str) -> None:
    """It is done."""
    (run_dir / name).unlink(missing_ok=True)
