"""Training speed beside the peers', on the same pairs, shape, optimizer and threads, in one run.

    dist-transformer prepare pairs --source train.en --target train.de --vocab-size 8000 --shards 18 \\
        --out SHARDS
    .venv/bin/python -m benchmarks.train --shards SHARDS [--shape small base] [--ranks 1 2] [--repeats 3] [--json FILE]

Each contestant is a process of its own, started in turn, `--repeats` times; medians are shown. Ours is the public
command. Reported: real tokens of both sides per second, padding, useful operations per second (matrix products of
real tokens, by one formula for everyone) and their share of what this machine's matrix products reach (measured for a
second before and after every run: of the fastest product, and of the median one, which tells a host that others use
too), the most memory that all processes held together, and seconds from the start to the end of the first step.
`--ranks 1` is one process with `--cores` threads, `--ranks 2` two of half as many.

Dropout of 0.1 is where the paper and Marian have it: on embeddings and sublayers' outputs. T5 and torch.nn.Transformer
have one rate for everything, attention's weights and activations too, and so do a little more.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch
import yaml

from benchmarks.peers import DROPOUT, LEARNING_RATE, PEERS
from benchmarks.shapes import SHAPES, TARGET_TOKENS, read_pairs, target_len
from dist_transformer.model.flops import Work
from dist_transformer.tracking import read_metrics

ROOT = Path(__file__).resolve().parents[1]
ROW_LEN = 64
"""Our rows' source side; the target side is as much longer as the corpus's targets are. The longest sample fits."""
MICRO_STEPS = 2
"""Of one process, for half of the activations. Several ranks have half of the rows each, and one."""
MEMORY_EVERY_S = 3.0
"""The kernel walks through all pages of a process to count them: 60 ms for each GiB."""
CONTESTANTS = ("ours", *PEERS, "trainer")


@dataclass(frozen=True)
class Figures:
    """One run of one contestant."""

    tokens_per_s: float
    padding_pct: float
    gflops_per_s: float
    peak_pct: float
    """Of the fastest matrix product."""
    rate_pct: float
    """Of the median matrix product."""
    memory_mib: float
    first_step_s: float


class PeakMemory(threading.Thread):
    """The most that a process and its children held together, shared pages counted once (MiB)."""

    def __init__(self, process: psutil.Process) -> None:
        super().__init__(daemon=True)
        self.mib = 0.0
        self._process, self._over = process, threading.Event()
        self.start()

    def run(self) -> None:
        while not self._over.wait(MEMORY_EVERY_S):
            held = 0
            for process in self._family():
                try:
                    held += process.memory_full_info().pss
                except psutil.Error:  # it ended meanwhile
                    continue
            self.mib = max(self.mib, held / 2**20)

    def _family(self) -> list[psutil.Process]:
        try:
            return [self._process, *self._process.children(recursive=True)]
        except psutil.Error:
            return []

    def stop(self) -> float:
        """The peak so far."""
        self._over.set()
        self.join()
        return self.mib


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    shards: Path
    shape: str
    ranks: int
    threads: int
    """Of each rank."""
    steps: int
    warm_up: int
    target_len: int
    """Our rows' target side."""
    overrides: tuple[str, ...]
    """Of our configuration."""


def our_config(setting: Setting, folder: Path) -> Path:
    """Our configuration: the paper's model, AdamW, packed rows."""
    shape, rows = SHAPES[setting.shape], TARGET_TOKENS // ROW_LEN
    tree = {
        "run": {"dir": str(folder / "run"), "seed": 1},
        "model": {
            "preset": "vaswani2017_base",
            "d_model": shape.d_model,
            "n_heads": shape.n_heads,
            "head_dim": shape.d_model // shape.n_heads,
            "d_ff": shape.d_ff,
            "n_encoder_layers": shape.n_layers,
            "n_decoder_layers": shape.n_layers,
            # As Marian, and as the paper: none of attention's weights, none inside the feed-forward network.
            "dropout": DROPOUT,
            "attention_dropout": 0.0,
            "ffn_dropout": 0.0,
        },
        "data": {
            "train": str(setting.shards.resolve()),
            "objective": "pairs",
            "max_source_len": ROW_LEN,
            "max_target_len": setting.target_len,
        },
        "train": {
            "steps": setting.warm_up + setting.steps,
            "global_batch_size": rows,
            "micro_batch_size": rows // (MICRO_STEPS if setting.ranks == 1 else setting.ranks),
            "precision": "fp32",
        },
        "optimizer": {"name": "adamw", "lr": LEARNING_RATE, "schedule": "constant", "warmup_steps": 0},
        "parallel": {
            "zero_stage": 0
        },  # data parallelism, as the peers'; benchmarks/overhead.py has the other stages
        "checkpoint": {"every": 10**6},
        "tracking": {"every": setting.warm_up, "wandb": {"mode": "disabled"}},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run_ours(setting: Setting, folder: Path) -> dict[str, float]:
    """The public command; figures from its metrics.jsonl."""
    command = [
        str(ROOT / "launch" / "local.sh"),
        str(our_config(setting, folder)),
        "--nproc",
        str(setting.ranks),
        *setting.overrides,
    ]
    if setting.ranks == 1:
        command = [sys.executable, "-m", "dist_transformer", "train", command[1], *setting.overrides]
    started, memory = start(command, setting.threads)
    rows = [row for row in read_metrics(folder / "run") if row.get("event") == "train"]
    first = next(row for row in rows if row["step"] == 1)
    timed = [row for row in rows if row["step"] > setting.warm_up]
    seconds = timed[-1]["time"] - next(row["time"] for row in rows if row["step"] == setting.warm_up)
    steps_of = [
        row["step"] - before
        for row, before in zip(timed, [setting.warm_up, *(r["step"] for r in timed)], strict=False)
    ]
    total_s = [row["perf/step_time_s"] * n for row, n in zip(timed, steps_of, strict=True)]
    n_tokens = sum(row["perf/tokens_per_sec"] * s for row, s in zip(timed, total_s, strict=True))
    per_rank = sum(row["perf/tflops_per_sec"] * 1e12 * s for row, s in zip(timed, total_s, strict=True))
    positions = sum(
        row["perf/tokens_per_sec"] * s / (1 - row["perf/padding_pct"] / 100)
        for row, s in zip(timed, total_s, strict=True)
    )
    return {
        "seconds": seconds,
        "n_tokens": n_tokens,
        "n_positions": positions,
        "flops": per_rank * setting.ranks,
        "memory_mib": memory,
        "first_step_s": first["time"] - started,
    }


def run_peer(name: str, setting: Setting, vocab_size: int) -> dict[str, float]:
    """benchmarks/peers.py; with several ranks, under torchrun."""
    arguments = ["-m", "benchmarks.peers", name, "--shards", str(setting.shards), "--shape", setting.shape]
    arguments += ["--steps", str(setting.steps), "--warm-up", str(setting.warm_up)]
    command = [sys.executable, *arguments]
    if setting.ranks > 1:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(setting.ranks),
            *arguments,
        ]
    with tempfile.TemporaryFile("w+") as output:
        started, memory = start(command, setting.threads, output.fileno())
        output.seek(0)
        reports = [json.loads(line) for line in output if line.startswith('{"first_step_at"')]
    assert len(reports) == setting.ranks, f"{name} printed {len(reports)} reports"
    work = sum((Work(*report["work"]) for report in reports), Work())
    return {
        "seconds": max(report["seconds"] for report in reports),
        "n_tokens": work.n_source + work.n_target,
        "n_positions": sum(report["n_positions"] for report in reports),
        "flops": SHAPES[setting.shape].flops(vocab_size, work),
        "memory_mib": memory,
        "first_step_s": max(report["first_step_at"] for report in reports) - started,
    }


def start(command: list[str], threads: int, output: int | None = None) -> tuple[float, float]:
    """Run it; when it started (seconds of the clock), and the most memory it held."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "WANDB_MODE": "disabled",
        "PYTHON": sys.executable,
    }
    started = time.time()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log if output is None else output, stderr=log
        )
        memory = PeakMemory(psutil.Process(process.pid))
        if process.wait():
            log.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{log.read()[-3000:]}")
        return started, memory.stop()


def gemm_seconds(threads: int, seconds: float = 1.0) -> list[float]:
    """How long each of many products of 1,024 takes on that many threads."""
    torch.set_num_threads(threads)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    found, until = [], time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        torch.mm(a, b)
        found.append(time.perf_counter() - began)
    return found


def measure(name: str, setting: Setting, vocab_size: int) -> Figures:
    """One run of one contestant."""
    threads = setting.threads * setting.ranks
    products = gemm_seconds(threads)
    with tempfile.TemporaryDirectory() as folder:
        found = run_ours(setting, Path(folder)) if name == "ours" else run_peer(name, setting, vocab_size)
    products += gemm_seconds(threads)
    seconds = found["seconds"]
    gflops = found["flops"] / seconds / 1e9
    return Figures(
        tokens_per_s=found["n_tokens"] / seconds,
        padding_pct=100 * (1 - found["n_tokens"] / found["n_positions"]),
        gflops_per_s=gflops,
        peak_pct=100 * gflops * 1e9 * min(products) / (2 * 1024**3),
        rate_pct=100 * gflops * 1e9 * statistics.median(products) / (2 * 1024**3),
        memory_mib=found["memory_mib"],
        first_step_s=found["first_step_s"],
    )


def median(runs: list[Figures]) -> Figures:
    """Of each figure by itself."""
    return Figures(**{key: statistics.median(asdict(run)[key] for run in runs) for key in asdict(runs[0])})


def print_table(title: str, medians: dict[str, Figures]) -> None:
    """One row a contestant; the last column is against the fastest of Hugging Face's."""
    theirs = [f.tokens_per_s for name, f in medians.items() if name in ("marian", "t5", "trainer")]
    print(f"\n{title}\n")
    print(
        "| | tokens/s | padding % | useful GFLOP/s | of fastest GEMM % | of median GEMM % | memory MiB | "
        "first step s | of the fastest HF |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, f in sorted(medians.items(), key=lambda item: -item[1].tokens_per_s):
        ratio = f"{f.tokens_per_s / max(theirs):.2f}" if theirs else "-"
        print(
            f"| {name} | {f.tokens_per_s:,.0f} | {f.padding_pct:.1f} | {f.gflops_per_s:.1f} | {f.peak_pct:.0f} | "
            f"{f.rate_pct:.0f} | {f.memory_mib:,.0f} | {f.first_step_s:.1f} | {ratio} |",
            flush=True,
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="section.key=value of our configuration")
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["small"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1])
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pairs, vocab_size = read_pairs(options.shards)
    everything = {}
    for shape in options.shape:
        for ranks in options.ranks:
            setting = Setting(
                options.shards,
                shape,
                ranks,
                max(1, options.cores // ranks),
                options.steps,
                options.warm_up,
                target_len(pairs, ROW_LEN),
                tuple(options.overrides),
            )
            runs: dict[str, list[Figures]] = {name: [] for name in options.contestants}
            for _ in range(options.repeats):
                for name in options.contestants:
                    runs[name].append(measure(name, setting, vocab_size))
                    print(f"  {name}: {runs[name][-1]}", file=sys.stderr, flush=True)
            title = (
                f"{shape}, {ranks} process(es) x {setting.threads} thread(s), medians of {options.repeats}"
            )
            print_table(title, {name: median(found) for name, found in runs.items()})
            everything[f"{shape}-{ranks}x{setting.threads}"] = {
                name: [asdict(run) for run in found] for name, found in runs.items()
            }
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
