"""What tracking costs a step: against no dashboard, and against a W&B server in every mood.

    python benchmarks/tracking.py [--rows 60] [--step-ms 100] [--every 10]

Each case is a process of its own that "trains" (one thread multiplies matrices for `--step-ms`) and logs 40 numbers
every `--every` steps. Its cost is counted, not timed against another run, so that other work on the machine changes
little: seconds inside `MetricsLog.log`, and processor seconds of every other thread and of wandb's helper process
while the loop runs. Their sum, as a share of the steps' own time, is the most that training can be slowed down where
no core is idle. Start-up and the end are told apart: they happen once a run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CASES = (
    "none",
    "offline",
    "online",
    "refused key",
    "503",
    "hang",
    "drop in mid-run",
    "stop button",
    "helper killed",
)
LIMIT_PCT = 2.0


def _faults(case: str, server: Any) -> None:
    """What the server does from the start on."""
    outcome: Any = {"refused key": (401, {}), "503": (503, {}), "hang": "hang"}.get(case)
    if outcome is not None:
        server.state.fault = lambda path, operation, body: outcome
    server.state.stop = case == "stop button"


def _cpu_of(pid: int) -> float:
    """Processor seconds of a process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _train(case: str, rows: int, step_ms: float, every: int, run_dir: Path) -> dict[str, float]:
    import torch

    from dist_transformer.config import TrackingConfig, WandbConfig
    from dist_transformer.tracking import MetricsLog, build_sinks, read_metrics
    from dist_transformer.tracking.wandb_sink import core_pid

    torch.set_num_threads(1)
    mode: Any = {"none": "disabled", "offline": "offline"}.get(case, "auto")
    began = time.perf_counter()
    sinks = build_sinks(TrackingConfig(wandb=WandbConfig(mode=mode)), run_dir, {"seed": 1}, resumed_step=0)
    log = MetricsLog(run_dir, sinks, lambda _: None, open_timeout=120.0)
    open_s = time.perf_counter() - began
    a = torch.randn(256, 256)
    values = {f"perf/figure_{n}": n * 1.5 for n in range(38)} | {"train/loss": 2.5}
    helper = core_pid() or 0 if sinks else 0
    log_s, steps_s, slowest_s = 0.0, 0.0, 0.0
    cpu_before, helper_before = time.process_time() - time.thread_time(), _cpu_of(helper)
    for step in range(1, rows * every + 1):
        start = time.perf_counter()
        while time.perf_counter() - start < step_ms / 1e3:
            a = torch.tanh(a @ a)
        steps_s += time.perf_counter() - start
        if step == rows * every // 2:
            if case == "drop in mid-run":
                print("DROP", flush=True)
            if case == "helper killed" and helper:
                os.kill(helper, 9)
        if step % every == 0:
            start = time.perf_counter()
            log.log("train", step, {**values, "trainer/tokens_seen": step * 1000})
            spent = time.perf_counter() - start
            log_s, slowest_s = log_s + spent, max(slowest_s, spent)
    others_s = time.process_time() - time.thread_time() - cpu_before
    last_helper = core_pid() or 0 if sinks else 0
    helper_s = _cpu_of(last_helper) - (helper_before if last_helper == helper else 0.0)
    began = time.perf_counter()
    log.close(timeout=5.0)
    return {
        "rows_in_jsonl": len(read_metrics(run_dir)),
        "open_s": open_s,
        "close_s": time.perf_counter() - began,
        "log_ms": 1e3 * log_s / rows,
        "slowest_log_ms": 1e3 * slowest_s,
        "background_ms_per_row": 1e3 * (others_s + helper_s) / rows,
        "slow_down_pct": 100.0 * (log_s + others_s + helper_s) / steps_s,
    }


def _run_case(case: str, options: argparse.Namespace) -> dict[str, float]:
    from tests.tools.fake_wandb import FakeWandb

    server = FakeWandb().start()
    _faults(case, server)
    with tempfile.TemporaryDirectory() as folder:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
        environment |= {
            "WANDB_BASE_URL": server.url,
            "WANDB_API_KEY": "k" * 40,
            "HOME": folder,
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, __file__, "--child", case, "--dir", f"{folder}/run"]
        command += [
            "--rows",
            str(options.rows),
            "--step-ms",
            str(options.step_ms),
            "--every",
            str(options.every),
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        result: dict[str, float] = {}
        for line in process.stdout:
            if line.startswith("DROP"):
                server.state.fault = lambda path, operation, body: "drop"
            elif line.startswith("{"):
                result = json.loads(line)
        if process.wait() or not result:
            raise SystemExit(f"{case}: the run did not end normally")
    threading.Thread(target=server.stop, daemon=True).start()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--step-ms", type=float, default=100.0)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--dir", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        result = _train(options.child, options.rows, options.step_ms, options.every, options.dir)
        print(json.dumps(result), flush=True)
        return
    names = ("log_ms", "slowest_log_ms", "background_ms_per_row", "slow_down_pct", "open_s", "close_s")
    print(
        f"{options.rows} rows, one every {options.every} steps of {options.step_ms:.0f} ms; 39 numbers a row\n"
    )
    print("| W&B | rows in JSONL | " + " | ".join(names) + " |")
    print("|---|---|" + "---|" * len(names))
    failed = []
    for case in CASES:
        result = _run_case(case, options)
        cells = " | ".join(f"{result[name]:.2f}" for name in names)
        print(f"| {case} | {result['rows_in_jsonl']} | {cells} |", flush=True)
        if result["slow_down_pct"] > LIMIT_PCT or result["rows_in_jsonl"] != options.rows:
            failed.append(case)
    if failed:
        raise SystemExit(f"above {LIMIT_PCT} % or rows missing: {', '.join(failed)}")


if __name__ == "__main__":
    main()
