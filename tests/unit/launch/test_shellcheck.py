"""Every shell script that people run or edit is clean."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("slurm/*.sbatch")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip(
            "SHELL SCRIPTS NOT CHECKED: no shellcheck here; install it with: apt-get install -y shellcheck"
        )
    done = subprocess.run(
        ["shellcheck", "-x", str(script.relative_to(ROOT))], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", sorted(ROOT.glob("slurm/*.sbatch")), ids=lambda path: path.name)
def test_slurm_reads_every_option(script: Path) -> None:
    """Slurm stops at the first command: #SBATCH lines below it are ignored without a word."""
    lines = script.read_text(encoding="utf-8").splitlines()
    first = next(n for n, line in enumerate(lines) if line.strip() and not line.startswith("#"))
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")]
    assert b"\r" not in script.read_bytes()
