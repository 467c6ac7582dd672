"""Random faults in one run on a real Slurm cluster: it must finish, with the weights of the run that nothing disturbed.

    .venv/bin/python -m benchmarks.chaos [--faults 20] [--seed 1] [--mode loopback|netns] [--kinds rank,node,...]

It brings up two nodes on this machine (tests/slurm/slurm_cluster.sh; Debian: slurmctld slurmd slurm-client munge) and a
stand-in for W&B's server, trains a small model undisturbed, then again with faults. As root the checkpoints lie on a
small file system of their own, which can be filled; else that fault is left out. With --mode netns each node has a
network of its own, from which the stand-in cannot be reached: no dashboard then. Exit code 1 if anything differs.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from dist_transformer.checkpoints.reader import load_weights
from dist_transformer.tracking import read_metrics
from dist_transformer.tracking.exits import newest_step, read_exits
from dist_transformer.tracking.heartbeats import read_beats
from tests.e2e.conftest import environment, sentence, steps_of
from tests.tools.fake_wandb import FakeWandb
from tests.tools.slurm import LIMIT_S, Cluster, start_cluster, why_not

STEPS_BETWEEN, SAVE_EVERY = 30, 10
OUTAGE_STEPS = 20
COMPARED = ("train/loss", "train/grad_norm", "train/lr", "data/fingerprint", "trainer/tokens_seen")
KINDS = ("rank", "hang", "node", "requeue", "preempt", "disk", "dashboard")
"""A rank killed; a rank stopped; a node dead, and back; `scontrol requeue`; told to save and leave; no room for
checkpoints; no dashboard."""
ENDS = ("rank", "hang", "node", "requeue", "preempt")
"""Those that end the start that they hit."""
BALLAST = "ballast"


@dataclass(frozen=True)
class Fault:
    """What was done to the run, and how it came through."""

    kind: str
    what: str
    step: int
    """Newest step at that time."""
    resumed_at: int
    """Step of the checkpoint that the run went on from; the same step where it never ended."""
    seconds: float
    """Until it trained again; of disk and dashboard, with the time that they were away."""


class Chaos:
    """One run that is disturbed.

    Args:
        cluster: Two nodes, a rank on each.
        backend: What stands in for the dashboard's server.
        run_dir: Of the run; its checkpoints are on a file system of their own, where `disk` is among the kinds.
        generator: What, whom and when.
    """

    def __init__(self, cluster: Cluster, backend: FakeWandb, run_dir: Path, generator: random.Random) -> None:
        self.cluster, self.backend, self.run_dir, self.generator = cluster, backend, run_dir, generator

    def run(self, config: Path, kinds: Sequence[str]) -> list[Fault]:
        """Train, with one fault of each of these kinds in their order.

        Raises:
            AssertionError: the run did not come through.
        """
        self.job = self.cluster.submit(self.run_dir, config)
        faults = []
        for number, kind in enumerate(kinds, start=1):
            at = number * STEPS_BETWEEN - self.generator.randrange(STEPS_BETWEEN // 2)
            self.job.wait_for(lambda at=at: self.step() >= at, f"step {at}", 4 * LIMIT_S)  # type: ignore[misc]
            time.sleep(self.generator.uniform(0.0, 0.5))
            faults.append(self._strike(kind))
            print(f"{number:>3}  {describe(faults[-1])}", flush=True)
        self.job.finish()
        return faults

    def step(self) -> int:
        """The newest step that was logged."""
        return newest_row(self.run_dir)[0]

    def _strike(self, kind: str) -> Fault:
        step, began, ends = self.step(), time.time(), len(read_exits(self.run_dir))
        what = getattr(self, f"_{kind}")()
        if kind in ENDS:
            self._wait(lambda: len(read_exits(self.run_dir)) > ends, f"the end after {what}")
        since = read_exits(self.run_dir)[-1].ended if kind in ENDS else time.time()
        resumed_at = newest_step(self.run_dir) if kind in ENDS else step
        self._wait(lambda: newest_row(self.run_dir)[1] > since, f"a step after {what}")
        return Fault(kind, what, step, resumed_at, time.time() - began)

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        self.job.wait_for(condition, what, 2 * LIMIT_S)

    def _rank(self) -> str:
        beat = self.generator.choice(read_beats(self.run_dir))
        os.kill(beat.pid, signal.SIGKILL)
        return f"rank {beat.rank} killed"

    def _hang(self) -> str:
        beat = self.generator.choice(read_beats(self.run_dir))
        os.kill(beat.pid, signal.SIGSTOP)
        return f"rank {beat.rank} stopped"

    def _node(self) -> str:
        node = self.generator.choice(("node1", "node2"))
        self.cluster.kill_node(node)
        dead_s = self.generator.uniform(0.0, 20.0)
        time.sleep(dead_s)
        self.cluster.start_node(node)
        return f"{node} dead for {dead_s:.0f} s"

    def _requeue(self) -> str:
        self.cluster.must("scontrol", "requeue", self.job.id)
        return "requeued by the administrator"

    def _preempt(self) -> str:
        self.job.signal("--batch", "--signal=USR1")
        return "told to save and leave"

    def _disk(self) -> str:
        """Full until a save has failed, then with room again until one has worked."""
        checkpoints, began = self.run_dir / "checkpoints", time.time()
        with contextlib.suppress(OSError), (checkpoints / BALLAST).open("wb") as file:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        self._wait(lambda: self._has(began, "alert/kind", "checkpoint"), "a save that fails")
        (checkpoints / BALLAST).unlink()
        again = time.time()
        self._wait(lambda: self._has(again, "event", "checkpoint"), "a save that works")
        return "the checkpoints' disk full"

    def _dashboard(self) -> str:
        port, state = int(self.backend.url.rpartition(":")[2]), self.backend.state
        self.backend.stop()
        until = self.step() + OUTAGE_STEPS
        self._wait(lambda: self.step() >= until, "steps without a dashboard")
        again = FakeWandb(port)
        again.state = again._server.state = state
        self.backend = again.start()
        return f"the dashboard gone for {OUTAGE_STEPS} steps"

    def _has(self, since: float, key: str, value: str) -> bool:
        return any(row["time"] > since and row.get(key) == value for row in read_metrics(self.run_dir))


def newest_row(run_dir: Path) -> tuple[int, float]:
    """Step and time of the last training row; (0, 0): none."""
    path = run_dir / "metrics.jsonl"
    rows = [row for row in read_metrics(run_dir) if row["event"] == "train"] if path.exists() else []
    return (int(rows[-1]["step"]), float(rows[-1]["time"])) if rows else (0, 0.0)


def choose_kinds(allowed: Sequence[str], count: int, generator: random.Random) -> list[str]:
    """Every kind before any comes again, in random order."""
    kinds: list[str] = []
    while len(kinds) < count:
        kinds += generator.sample(list(allowed), len(allowed))
    return kinds[:count]


def compare(undisturbed: Path, disturbed: Path, n_steps: int) -> list[str]:
    """What differs between two runs, in sentences."""
    found: list[str] = []
    expected, actual = (
        {step: [row.get(key) for key in COMPARED] for step, row in steps_of(read_metrics(run_dir)).items()}
        for run_dir in (undisturbed, disturbed)
    )
    found += [
        f"step {step}: {actual.get(step)} instead of {expected.get(step)}"
        for step in range(1, n_steps + 1)
        if actual.get(step) != expected.get(step)
    ]
    first, second = (
        load_weights(run_dir / "checkpoints" / f"step-{n_steps:08d}") for run_dir in (undisturbed, disturbed)
    )
    if first.keys() != second.keys():
        found.append("the weights have other names")
    else:
        found += [f"{name} differs" for name in first if not torch.equal(first[name], second[name])]
    return found


def write_inputs(folder: Path, n_steps: int, dashboard: bool) -> Path:
    """A toy translation and a small model of it: a configuration."""
    generator = random.Random(5)
    pairs = [sentence(generator) for _ in range(2000)]
    for name, side in (("source", 0), ("target", 1)):
        (folder / f"{name}.txt").write_text("".join(f"{pair[side]}\n" for pair in pairs))
    prepare = [sys.executable, "-m", "dist_transformer", "prepare", "pairs", "--source", folder / "source.txt",
               "--target", folder / "target.txt", "--vocab-size", "420", "--shards", "4", "--held-out", "40",
               "--out", folder / "shards"]  # fmt: skip
    subprocess.run(list(map(str, prepare)), check=True, capture_output=True, env=environment())
    tree = {
        "run": {"dir": str(folder / "run"), "seed": 3},
        "model": {
            "preset": "modern_small", "d_model": 32, "d_ff": 64, "n_heads": 2, "n_kv_heads": 1, "head_dim": 16,
            "n_encoder_layers": 2, "n_decoder_layers": 2, "dropout": 0.1,
        },
        "data": {
            "train": str(folder / "shards"), "objective": "pairs", "fingerprint": True, "max_source_len": 64,
            "max_target_len": 64, "window": 64, "workers": 0,
        },
        "train": {"steps": n_steps, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32"},
        "optimizer": {"lr": 0.005, "warmup_steps": 10},
        "checkpoint": {"every": SAVE_EVERY, "keep": 2},
        "faults": {"step_limit_s": 30, "heartbeat_s": 1},
        "tracking": {"every": 1, "wandb": {"mode": "online" if dashboard else "disabled"}},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@contextlib.contextmanager
def small_disk(path: Path, n_mib: int = 16) -> Iterator[bool]:
    """A file system of its own at this path, where that is permitted; says whether it was."""
    path.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={n_mib}m", "tmpfs", str(path)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(path)], check=True)


def describe(fault: Fault) -> str:
    """A line of the table."""
    return f"{fault.kind:<10}{fault.what:<34}{fault.step:>6}{fault.resumed_at:>8}{fault.seconds:>8.1f} s"


def torment(kinds: Sequence[str], count: int, seed: int, mode: str) -> list[str]:
    """Both runs and their comparison; prints a table.

    Returns:
        What differs, in sentences.
    """
    generator, n_steps = random.Random(seed), (count + 1) * STEPS_BETWEEN
    backend = FakeWandb().start()
    variables = {**environment(), "NPROC": "1", "WANDB_BASE_URL": backend.url, "WANDB_API_KEY": "k" * 40}
    with tempfile.TemporaryDirectory(prefix="chaos-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        config = write_inputs(folder, n_steps, mode == "loopback")
        # Before the nodes, which have mounts of their own.
        has_disk = stack.enter_context(small_disk(folder / "disturbed" / "checkpoints"))
        left_out = set() if has_disk else {"disk"}
        if "disk" in kinds and not has_disk:
            print("no full disk: only root may mount a small file system")
        if mode != "loopback":
            left_out.add("dashboard")
        cluster = stack.enter_context(start_cluster(mode, variables))
        began = time.time()
        cluster.submit(folder / "whole", config).finish()
        print(f"undisturbed: {n_steps} steps in {time.time() - began:.0f} s")
        chosen = choose_kinds([kind for kind in kinds if kind not in left_out], count, generator)
        print(f"{'':>5}{'fault':<44}{'step':>6}{'resumed':>8}{'back':>10}")
        chaos = Chaos(cluster, backend, folder / "disturbed", generator)
        began = time.time()
        chaos.run(config, chosen)
        exits = read_exits(folder / "disturbed")
        print(
            f"disturbed: {time.time() - began:.0f} s, {chaos.job.restarts()} restarts of one job; "
            f"ends: {', '.join(end.reason for end in exits)}"
        )
        found = compare(folder / "whole", folder / "disturbed", n_steps)
        runs = chaos.backend.state.runs
        if mode == "loopback" and len(runs) != 2:  # one for each of the two run directories
            found.append(f"{len(runs)} dashboard runs instead of 2")
        chaos.backend.stop()
    return found


def main() -> int:
    """Print the table and what differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mode", choices=("loopback", "netns"), default="loopback")
    parser.add_argument("--kinds", default=",".join(KINDS))
    options = parser.parse_args()
    if reason := why_not(options.mode):
        print(reason, file=sys.stderr)
        return 1
    found = torment(options.kinds.split(","), options.faults, options.seed, options.mode)
    for sentence_ in found[:20]:
        print(sentence_)
    if not found:
        print("losses, data and final weights equal those of the undisturbed run bit for bit")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
