"""SIGKILL at random instants of a run that always saves: `latest` must verify and the next start must go on from it.

    .venv/bin/python -m benchmarks.kill_saves --shards SHARDS [--kills 30] [--nproc 2]

Everything through the public commands: launch/local.sh, `checkpoint verify`. Exit code 1 at the first failure.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from dist_transformer.checkpoints.folder import latest_checkpoint

ROOT = Path(__file__).resolve().parents[1]
COMMAND = (sys.executable, "-m", "dist_transformer")
LIMIT_S = 600.0


def main() -> int:
    """Kill, verify and resume, so many times; print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", required=True, help="a folder of `prepare pairs`")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    generator, began, step = random.Random(options.seed), time.perf_counter(), 0
    n_partial = 0
    with tempfile.TemporaryDirectory() as folder:
        config, run_dir = write_config(Path(folder), options.shards), Path(folder) / "run"
        for kill in range(1, options.kills + 1):
            wait_s = generator.uniform(0.0, 2.0)
            said = run_and_kill(config, run_dir, options.nproc, step, wait_s)
            resumed = re.search(r"resuming after step ([\d,]+)", said)
            if step and (resumed is None or int(resumed[1].replace(",", "")) != step):
                print(f"kill {kill}: did not go on after step {step}:\n{said}")
                return 1
            left = sum(1 for path in (run_dir / "checkpoints").glob("*.partial"))
            n_partial += bool(left)
            verified = subprocess.run(
                [*COMMAND, "checkpoint", "verify", str(run_dir)], capture_output=True, text=True, check=False
            )
            if verified.returncode:
                print(f"kill {kill}: {verified.stdout}{verified.stderr}")
                return 1
            step = latest_step(run_dir)
            print(
                f"kill {kill}: {wait_s:.2f} s after a save, latest is step {step}, whole; {left} left over",
                flush=True,
            )
    print(
        f"{options.kills} kills, {n_partial} of them in the middle of a save; latest always verified and was resumed "
        f"from; {time.perf_counter() - began:.0f} s"
    )
    return 0


def write_config(folder: Path, shards: str) -> Path:
    """A small model that is saved after every step, a few MiB each time."""
    tree = {
        "run": {"dir": str(folder / "run")},
        "model": {
            "preset": "modern_small", "d_model": 128, "d_ff": 256, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32,
            "n_encoder_layers": 2, "n_decoder_layers": 2,
        },
        "data": {"train": shards, "objective": "pairs", "max_source_len": 64, "max_target_len": 64, "workers": 0},
        "train": {"steps": 1_000_000, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32"},
        "checkpoint": {"every": 1, "keep": 2},
        "tracking": {"wandb": {"mode": "disabled"}},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run_and_kill(config: Path, run_dir: Path, nproc: int, step: int, wait_s: float) -> str:
    """Start, wait for a checkpoint newer than `step` and `wait_s` more, kill every rank; what was printed."""
    log = config.with_name("output.txt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    with log.open("w") as stream:
        process = subprocess.Popen(
            [str(ROOT / "launch" / "local.sh"), str(config), "--nproc", str(nproc)],
            stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + LIMIT_S
        while latest_step(run_dir) <= step:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"no new checkpoint:\n{log.read_text()}")
            time.sleep(0.01)
        time.sleep(wait_s)
        for pid in descendants(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    return log.read_text()


def descendants(pid: int) -> list[int]:
    """A process and all below it: torchrun's ranks are in sessions of their own."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*"):
        for child in (task / "children").read_text().split():
            found += descendants(int(child))
    return found


def latest_step(run_dir: Path) -> int:
    """Of the newest complete checkpoint; 0 where there is none."""
    path = latest_checkpoint(run_dir)
    return 0 if path is None else int(path.name.removeprefix("step-"))


if __name__ == "__main__":
    sys.exit(main())
