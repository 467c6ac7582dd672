"""Where a step's time goes on the device, and what makes it wait: kernels by kind, synchronisations, recompilations."""

import contextlib
import functools
import json
import re
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu_sections.measure import WARM_UP, n_compilations, synchronize
from benchmarks.gpu_sections.ours import Trainee, config_of
from benchmarks.gpu_sections.plan import COMPILED, COMPILED_FLEX, FLEX, Setting
from benchmarks.gpu_sections.rows import Pool
from benchmarks.gpu_sections.task import Task
from dist_transformer.data.batch import Batch
from dist_transformer.parallel.mesh import open_mesh

TRACED = 3
"""Steps whose kernels are listed."""
COUNTED_ROWS = 16
"""Rows of the steps in which synchronisations are counted, at most: their number does not depend on it. Not so where
another number of rows would have to be compiled.
"""
CHUNK, N_CHUNKS = 10, 2
"""Steps of one trace (the profiler keeps so many kernels and no more), and traces; in the other steps torch itself says
what waits.
"""
TOP = 30
MARGIN_S = 20.0
"""To read a trace and write it down."""

GROUPS: tuple[tuple[str, str], ...] = (
    ("attention", r"flash|fmha|attention|sdpa|flex_att"),
    ("communication", r"nccl|c10d"),
    ("memcpy", r"memcpy|memset|^aten::(copy_|_to_copy|fill_|zero_)$"),
    ("optimizer", r"adam|multi_tensor|foreach|optimizer"),
    ("loss", r"softmax|nll|cross_entropy|logsumexp"),
    ("gemm", r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitk|^aten::(mm|addmm|bmm|baddbmm)$"),
)
"""By a kernel's name, the first that fits; all others are norms, activations and other element-wise work."""
ELEMENTWISE = "norm and elementwise"
WAITS = (
    "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize",
    "cuCtxSynchronize", "aten::_local_scalar_dense",
)  # fmt: skip
"""Calls in which the host waits for the device; `.item()` ends in the last one."""


@dataclass(frozen=True)
class Event:
    """What the profiler saw."""

    name: str
    on_device: bool
    start_ns: int
    duration_ns: int


def group_of(kernel: str) -> str:
    """Which part of a step a kernel (or, on a CPU, an operator) belongs to."""
    name = kernel.lower()
    return next((group for group, pattern in GROUPS if re.search(pattern, name)), ELEMENTWISE)


def busy_ns(intervals: Iterable[tuple[int, int]]) -> int:
    """Time in which at least one of them runs."""
    total, until = 0, 0
    for start, end in sorted(intervals):
        total += max(0, end - max(start, until))
        until = max(until, end)
    return total


class Trace:
    """A profiler around some steps, and the time between their begin and end.

    Args:
        operators: With the host's operators, which cost time; else only the device's work and calls to it.
    """

    def __init__(self, setting: Setting, operators: bool) -> None:
        self.setting = setting
        kinds = [torch.profiler.ProfilerActivity.CPU] if operators or setting.device == "cpu" else []
        if setting.device == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=kinds)
        self.wall_s = 0.0

    def __enter__(self) -> "Trace":
        synchronize(self.setting)
        self.profiler.start()
        self._began_ns, self._began = time.time_ns(), time.perf_counter()
        return self

    def __exit__(self, *failure: Any) -> None:
        # Waits of ours and of the profiler are not the steps'.
        self._ended_ns = time.time_ns()
        synchronize(self.setting)
        self.wall_s = time.perf_counter() - self._began
        self.profiler.stop()

    @functools.cached_property
    def events(self) -> list[Event]:
        """Kernels, copies and calls, without the names that code gives to its parts."""
        raw = self.profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
        cuda = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
        return [
            Event(event.name(), event.device_type() == cuda, event.start_ns(), event.duration_ns())
            for event in raw
            if not event.is_user_annotation()
        ]

    def waits(self, within: Sequence[tuple[int, int]] | None = None) -> Counter[str]:
        """How often the host waited for the device while the steps ran, by call.

        Args:
            within: Count in these parts alone, from and to in nanoseconds.
        """
        parts = [(self._began_ns, self._ended_ns)] if within is None else within
        return Counter(
            event.name
            for event in self.events
            if event.name in WAITS and any(began <= event.start_ns <= ended for began, ended in parts)
        )

    def seconds_by_kernel(self) -> tuple[dict[str, tuple[float, int]], float]:
        """(seconds and calls of each kernel or operator, seconds in which any ran)."""
        found: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
        if self.setting.device == "cpu":
            for row in self.profiler.key_averages():
                found[row.key] = (row.self_cpu_time_total / 1e6, row.count)
            return found, min(self.wall_s, sum(seconds for seconds, _ in found.values()))
        kernels = [event for event in self.events if event.on_device]
        for event in kernels:
            seconds, calls = found[event.name]
            found[event.name] = (seconds + event.duration_ns / 1e9, calls + 1)
        busy = busy_ns((event.start_ns, event.start_ns + event.duration_ns) for event in kernels)
        return found, busy / 1e9


def profile(task: Task) -> None:
    """Kernels by group at the best size, and what waits or compiles in many steps; two files beside the results."""
    setting, pool, preset = task.setting, Pool(task.setting), task.arguments["preset"]
    mode = task.arguments.get("mode", "none")
    rows = task.arguments.get("rows", setting.first_rows)
    task.add(preset=preset, mode=mode, rows=rows)
    with open_mesh() as mesh:
        config = config_of(setting, preset, mode, rows, pool.vocab_size, micro_batches=setting.micro_batches)
        trainee = Trainee(config, mesh, pool)
        _list_kernels(task, trainee, rows)
        is_compiled = mode in (COMPILED, FLEX, COMPILED_FLEX)
        _count_waits(task, trainee, rows if is_compiled else min(rows, COUNTED_ROWS))
    path = Path(setting.out) / f"trace-{preset}.json"
    path.write_text(json.dumps(task.figures, indent=1))


def _list_kernels(task: Task, trainee: Trainee, rows: int) -> None:
    batches, n = trainee.batches(rows), task.setting.micro_batches
    for _ in range(WARM_UP):
        trainee.step(list(islice(batches, n)))
    with Trace(task.setting, operators=True) as trace:
        for _ in range(TRACED):
            trainee.step(list(islice(batches, n)))
    kernels, busy_s = trace.seconds_by_kernel()
    groups: dict[str, float] = defaultdict(float)
    for name, (seconds, _) in kernels.items():
        groups[group_of(name)] += seconds
    groups["idle"] = max(0.0, trace.wall_s - busy_s)
    top = sorted(kernels.items(), key=lambda item: -item[1][0])[:TOP]
    task.add(
        step_s=trace.wall_s / TRACED,
        groups={
            name: {"ms": 1e3 * seconds / TRACED, "share_pct": 100 * seconds / trace.wall_s}
            for name, seconds in sorted(groups.items(), key=lambda item: -item[1])
        },
        kernels=[
            {"name": name[:160], "group": group_of(name), "ms": 1e3 * seconds / TRACED, "calls": calls / TRACED}
            for name, (seconds, calls) in top
        ],
        n_kernels=sum(calls for _, calls in kernels.values()) / TRACED,
        waits_per_step={name: count / TRACED for name, count in trace.waits().items()},
    )  # fmt: skip
    _write_text(task, trace)


def _write_text(task: Task, trace: Trace) -> None:
    figures = task.figures
    lines = [
        f"{figures['preset']}, recomputation {figures['mode']}, {figures['rows']} rows: "
        f"{1e3 * figures['step_s']:.1f} ms a step, {figures['n_kernels']:,.0f} kernels",
        "",
        f"{'':<24}{'ms a step':>12}{'share %':>10}",
        *(f"{name:<24}{part['ms']:>12.2f}{part['share_pct']:>10.1f}" for name, part in figures["groups"].items()),
        "",
        f"{'ms a step':>12}{'calls':>8}  {'group':<22}kernel",
        *(f"{k['ms']:>12.3f}{k['calls']:>8.0f}  {k['group']:<22}{k['name']}" for k in figures["kernels"]),
        "",
    ]  # fmt: skip
    order = "self_device_time_total" if task.setting.device == "cuda" else "self_cpu_time_total"
    lines.append(trace.profiler.key_averages().table(sort_by=order, row_limit=TOP, max_name_column_width=60))
    (Path(task.setting.out) / f"profile-{figures['preset']}.txt").write_text("\n".join(lines))


def _count_waits(task: Task, trainee: Trainee, rows: int) -> None:
    """Many small steps: what waits for the device, where in the code, and what is compiled anew."""
    setting = task.setting
    batches, n = trainee.batches(rows), setting.micro_batches
    for _ in range(WARM_UP):
        trainee.step(list(islice(batches, n)))
    compiled, n_steps, wall_s = n_compilations(), 0, 0.0
    waits, waits_of_update = Counter[str](), Counter[str]()

    def some_steps() -> None:
        nonlocal n_steps
        for _ in range(min(CHUNK, setting.n_steps - n_steps)):
            trainee.step(list(islice(batches, n)))
            n_steps += 1

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        while n_steps < setting.n_steps and (n_steps == 0 or task.time_left() > MARGIN_S):
            if n_steps < N_CHUNKS * CHUNK:
                with Trace(setting, operators=False) as trace, _clocked(trainee) as computing:
                    some_steps()
                inside = trace.waits(computing)
                waits += inside
                waits_of_update += trace.waits() - inside
                wall_s += trace.wall_s
                continue
            began = time.perf_counter()
            with _warned(trainee, setting):
                some_steps()
            synchronize(setting)
            wall_s += time.perf_counter() - began
    places = Counter(
        f"{'/'.join(Path(warning.filename).parts[-3:])}:{warning.lineno}"
        for warning in caught
        if "synchronizing CUDA operation" in str(warning.message)
    )
    task.add(
        counted={
            "n_steps": n_steps, "rows": rows, "step_s": wall_s / n_steps, "waits": dict(waits),
            "n_waits": waits.total() + places.total(), "waits_of_update": dict(waits_of_update),
            "n_waits_of_update": waits_of_update.total(), "where": dict(places.most_common(20)),
            "n_recompilations": n_compilations() - compiled,
        }
    )  # fmt: skip


@contextlib.contextmanager
def _clocked(trainee: Trainee) -> Iterator[list[tuple[int, int]]]:
    """When forward and backward passes are computed, meanwhile: from and to in nanoseconds."""
    found: list[tuple[int, int]] = []
    accumulate = trainee.engine.accumulate

    def clocked(batches: Sequence[Batch], n_target_tokens: int) -> Tensor:
        began = time.time_ns()
        sums = accumulate(batches, n_target_tokens)
        found.append((began, time.time_ns()))
        return sums

    with mock.patch.object(trainee.engine, "accumulate", clocked):
        yield found


@contextlib.contextmanager
def _warned(trainee: Trainee, setting: Setting) -> Iterator[None]:
    """torch then names each line of forward and backward passes that waits."""
    accumulate = trainee.engine.accumulate

    def warned(batches: Sequence[Batch], n_target_tokens: int) -> Tensor:
        if setting.device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            return accumulate(batches, n_target_tokens)
        finally:
            if setting.device == "cuda":
                torch.cuda.set_sync_debug_mode("default")

    with mock.patch.object(trainee.engine, "accumulate", warned):
        yield
