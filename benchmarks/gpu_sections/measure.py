"""Clock, memory and the search for the best micro-batch: the same for our model and for its peer."""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_sections.plan import Setting
from benchmarks.gpu_sections.rows import work_of
from benchmarks.gpu_sections.task import Task, is_out_of_memory
from dist_transformer.config import ModelConfig
from dist_transformer.data.batch import Batch
from dist_transformer.model.flops import Work, training_flops
from dist_transformer.tracking.peak import device_peak

WARM_UP = 2
"""Steps of each size before the clock starts."""
LONGEST_WARM_UP = 12
"""It goes on while every step still compiles something, up to here."""
ENOUGH = 1.02
"""Twice the rows must give so many times the tokens a second, or the search ends."""
MARGIN_S = 5.0
"""Before the end of a section's time no further size is begun."""


@dataclass(frozen=True)
class Peaks:
    """What useful operations are compared with; FLOP/s."""

    sheet: float
    source: str
    """Of `sheet`: which data sheet, or that it was measured."""
    gemm: float | None
    """What matrix products reached in the section `environment`; None: it did not run."""

    @classmethod
    def of(cls, task: Task) -> "Peaks":
        """From the section `environment`, or from the device's name."""
        given = task.arguments.get("peaks")
        if given is not None:
            return cls(**given)
        peak = device_peak(torch.device(task.setting.device), torch.bfloat16)
        return cls(peak.flops_per_s, peak.source, None)


@dataclass(frozen=True)
class Figures:
    """Some steps of one size."""

    rows: int
    """Packed rows of a micro-batch; of a peer, the positions of its buckets in such rows."""
    n_steps: int
    step_s: float
    tokens_per_s: float
    """Real tokens of both sides."""
    useful_tflops: float
    """Per second: operations that the real tokens need."""
    mfu_pct: float
    """Of the data sheet's dense peak."""
    mfu_of_gemm_pct: float | None
    """Of what matrix products reached on this device."""
    padding_pct: float
    peak_memory_gib: float
    """Allocated on the device; on a CPU, of the whole process."""
    loss: float
    """Of the last step."""
    n_compiled: int
    """Graphs that torch's compiler made while the clock ran."""


@dataclass
class Counts:
    """What went through the model while the clock ran."""

    work: Work
    n_tokens: int = 0
    n_positions: int = 0

    def add(self, batch: Batch) -> None:
        """One more batch."""
        self.work += work_of(batch)
        self.n_tokens += batch.n_source_tokens + batch.n_target_tokens
        self.n_positions += batch.n_positions


def n_compilations() -> int:
    """Graphs that torch's compiler has made in this process so far."""
    # Never imported only to be asked: that takes seconds.
    module = sys.modules.get("torch._dynamo.utils")
    return 0 if module is None else int(module.counters["stats"]["unique_graphs"])


def synchronize(setting: Setting) -> None:
    """Wait for the device."""
    if setting.device == "cuda":
        torch.cuda.synchronize()


def peak_memory_gib(setting: Setting) -> float:
    """The most that was allocated since `forget_peak`."""
    if setting.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def forget_peak(setting: Setting) -> None:
    """Count memory from here on."""
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def time_size(
    task: Task,
    rows: int,
    batches: Iterator[Batch],
    step: Callable[[Sequence[Batch]], Tensor],
    model: ModelConfig,
    peaks: Peaks,
) -> Figures:
    """Train on batches of one size until about `Setting.seconds` have passed.

    Args:
        batches: As many as are asked for, made before the clock starts.
        step: One whole update on `Setting.micro_batches` of them; returns the loss a target token, and may leave
            work on the device.
        model: Whose operations are counted.
    """
    setting = task.setting
    forget_peak(setting)
    for number in range(1, LONGEST_WARM_UP + 1):
        update = list(islice(batches, setting.micro_batches))
        compiled, began = n_compilations(), time.perf_counter()
        step(update)
        synchronize(setting)
        took = time.perf_counter() - began
        # Since the process was started: with the imports, the model's first weights and the first kernels.
        task.figures.setdefault("first_step_s", round(time.time() - task.started, 2))
        if number >= WARM_UP and n_compilations() == compiled:
            break
    n_steps = max(3, min(50, round(setting.seconds / took)))
    timed = [list(islice(batches, setting.micro_batches)) for _ in range(n_steps)]
    synchronize(setting)
    compiled = n_compilations()
    began = time.perf_counter()
    for update in timed:
        loss = step(update)
    synchronize(setting)
    seconds = time.perf_counter() - began
    counts = Counts(Work())
    for batch in chain.from_iterable(timed):
        counts.add(batch)
    flops_per_s = training_flops(model, counts.work) / seconds
    return Figures(
        rows=rows,
        n_steps=n_steps,
        step_s=seconds / n_steps,
        tokens_per_s=counts.n_tokens / seconds,
        useful_tflops=flops_per_s / 1e12,
        mfu_pct=100 * flops_per_s / peaks.sheet,
        mfu_of_gemm_pct=None if peaks.gemm is None else 100 * flops_per_s / peaks.gemm,
        padding_pct=100 * (1 - counts.n_tokens / counts.n_positions),
        peak_memory_gib=peak_memory_gib(setting),
        loss=float(loss),
        n_compiled=n_compilations() - compiled,
    )


def search(task: Task, measure: Callable[[int], Figures]) -> None:
    """Double the rows until they do not fit, or bring nothing, or time is over; report every size, and the best.

    After an out-of-memory nothing more is run: the engine may have been stopped anywhere.

    Raises:
        Exception: what the first size failed with.
    """
    sizes: list[dict[str, Any]] = []
    rows: int = task.arguments.get("first_rows") or task.setting.first_rows
    best: dict[str, Any] = {}
    stopped = f"at {task.setting.last_rows} rows, the most that is tried"
    while rows <= task.setting.last_rows:
        began = time.time()
        try:
            found = asdict(measure(rows))
        except Exception as error:
            if not (sizes and is_out_of_memory(error)):
                raise
            stopped = f"out of memory at {rows} rows"
            break
        sizes.append(found)
        gain = found["tokens_per_s"] / best["tokens_per_s"] if best else ENOUGH
        if not best or gain > 1:
            best = found
        task.add(sizes=sizes, best=best)
        if gain < ENOUGH:
            stopped = f"{rows} rows bring no more"
            break
        rows *= 2
        if task.time_left() < 2.5 * (time.time() - began) + MARGIN_S:
            stopped = f"no time left for {rows} rows"
            break
    task.add(stopped=stopped)
