"""Where a step's time goes, and what held the memory when there was no more: files in `RUN_DIR/profile/`."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dist_transformer.config import ProfileConfig
from dist_transformer.parallel.mesh import Mesh
from dist_transformer.tracking.accounts import PRODUCTIVE, TimeAccounts

_N_OPERATORS = 10
_HISTORY = 100_000
"""Allocations that are remembered."""


class Profiling:
    """Traces some steps of this rank; keeps a history of GPU memory where it is asked for.

    Writes for a rank: `rank0-steps10-13.json.gz` (https://ui.perfetto.dev), and a table of its dearest operators
    and of time in computing, communication and input as `.txt` and, for programs, as `.summary.json`. When GPU
    memory runs out: `rank0-out-of-memory.pickle` (https://pytorch.org/memory_viz).
    """

    def __init__(
        self,
        config: ProfileConfig,
        run_dir: Path,
        mesh: Mesh,
        accounts: TimeAccounts,
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.mesh, self.accounts, self.say = run_dir / "profile", mesh, accounts, say
        self.steps = config.steps if mesh.rank in config.ranks else None
        self._profiler: Any = None
        self._first = 0
        self._before: dict[str, float] = {}
        self._remembers = config.memory_snapshot and mesh.device.type == "cuda"
        if self._remembers:
            torch.cuda.memory._record_memory_history(max_entries=_HISTORY)

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around one whole step, from waiting for its data to its update."""
        first, last = self.steps or (0, 0)
        if self._profiler is None and first <= step <= last:
            self._start(step)
        try:
            with (
                torch.profiler.record_function(f"step {step}") if self._profiler else contextlib.nullcontext()
            ):
                yield
        except torch.OutOfMemoryError:
            self._dump_memory()
            raise
        finally:
            # Also after an error: what was traced up to it may tell why.
            if self._profiler is not None and (step >= last or _is_failing()):
                self._stop(step)

    def _start(self, step: int) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.mesh.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()
        self._first, self._before = step, self.accounts.totals()

    def _stop(self, step: int) -> None:
        profiler, self._profiler = self._profiler, None
        after = self.accounts.totals()
        seconds = {name: after[name] - self._before[name] for name in PRODUCTIVE}
        try:
            with self.accounts.spend("other"):
                profiler.stop()
                trace = self._write(profiler, step, seconds)
        except OSError as error:  # A full disk is no reason to stop training.
            self.say(f"the profile of steps {self._first} to {step} could not be written: {error}")
            return
        self.say(f"profile of steps {self._first} to {step}: {trace} (open it in https://ui.perfetto.dev)")

    def _write(self, profiler: Any, step: int, seconds: dict[str, float]) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"rank{self.mesh.rank}-steps{self._first}-{step}"
        trace = self.folder / f"{name}.json.gz"
        profiler.export_chrome_trace(str(trace))
        events = profiler.key_averages()
        summary = summarize(events, seconds, step - self._first + 1)
        (self.folder / f"{name}.summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
        (self.folder / f"{name}.txt").write_text(as_table(summary), encoding="utf-8")
        return trace

    def _dump_memory(self) -> None:
        if not self._remembers:
            return
        path = self.folder / f"rank{self.mesh.rank}-out-of-memory.pickle"
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
            self.say(
                f"GPU memory ran out: {path} tells what held it (open it in https://pytorch.org/memory_viz)"
            )


def summarize(events: Any, seconds: dict[str, float], n_steps: int) -> dict[str, Any]:
    """The dearest operators by their own time (on the GPU where there is one), and the steps' time by kind.

    Args:
        events: `torch.profiler`'s averages by operator.
        seconds: the host's accounts of these steps.
    """
    on_gpu = any(event.self_device_time_total > 0 for event in events)

    def own_us(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)

    operators = [event for event in events if not event.key.startswith(("step ", "ProfilerStep"))]
    total_us = sum(map(own_us, operators)) or 1.0
    dearest = sorted(operators, key=own_us, reverse=True)[:_N_OPERATORS]
    kinds = dict(seconds)
    if on_gpu:
        # The host does not wait for NCCL, so the account says nothing: its kernels do.
        kinds["communication"] = sum(own_us(event) for event in operators if "nccl" in event.key) / 1e6
        kinds["compute"] = sum(map(own_us, operators)) / 1e6 - kinds["communication"]
    return {
        "steps": n_steps,
        "time_of": "device" if on_gpu else "cpu",
        "seconds_per_step": {name: value / n_steps for name, value in kinds.items()},
        "operators": [
            {
                "name": event.key,
                "calls_per_step": event.count / n_steps,
                "ms_per_step": own_us(event) / 1e3 / n_steps,
                "share_pct": 100.0 * own_us(event) / total_us,
            }
            for event in dearest
        ],
    }


def as_table(summary: dict[str, Any]) -> str:
    """The summary for a person."""
    whole = sum(summary["seconds_per_step"].values()) or 1.0
    lines = [f"a step of {1e3 * whole:,.1f} ms, mean of {summary['steps']}", ""]
    for name, seconds in summary["seconds_per_step"].items():
        lines.append(f"{name:<16}{1e3 * seconds:>12,.2f} ms{100 * seconds / whole:>8.1f} %")
    lines += [
        "",
        f"{'operator (own time on ' + summary['time_of'] + ')':<60}{'calls':>9}{'ms':>12}{'share':>9}",
    ]
    for operator in summary["operators"]:
        lines.append(
            f"{operator['name'][:58]:<60}{operator['calls_per_step']:>9,.1f}{operator['ms_per_step']:>12,.2f}"
            f"{operator['share_pct']:>7.1f} %"
        )
    return "\n".join([*lines, "", "calls and ms: of one step"]) + "\n"


def _is_failing() -> bool:
    return sys.exc_info()[0] is not None
