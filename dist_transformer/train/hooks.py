"""Side work of the loop, each with its own cadence: logging, evaluation, checkpoints."""

import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from dist_transformer.checkpoints.folder import TrainerState
from dist_transformer.config import Config
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.engine.engine import Engine, StepResult
from dist_transformer.engine.saving import SaveOutcome, Saver
from dist_transformer.errors import CheckpointError
from dist_transformer.parallel.collectives import sum_over_data_parallel
from dist_transformer.tracking import Console, MetricsLog
from dist_transformer.train.evaluate import Evaluation, Sample, evaluate
from dist_transformer.train.faults import BadSteps


@dataclass
class StepTotals:
    """Counts of one global batch, over all ranks."""

    n_source_tokens: int
    n_target_tokens: int
    n_pairs: int
    n_positions: int
    n_truncated: int
    n_dropped: int
    fingerprint: int | None = None


@dataclass
class StepReport:
    """What hooks see after an update."""

    step: int
    is_last: bool
    """The run's last step, or the last one before it is stopped."""
    totals: StepTotals
    result: StepResult
    step_time_s: float
    data_time_s: float


@dataclass
class Outlets:
    """Where rank zero shows and records what happens; None on the other ranks."""

    log: MetricsLog | None = None
    console: Console | None = None

    def message(self, text: str) -> None:
        """A line for the person who watches."""
        if self.console is not None:
            self.console.message(text)

    def alert(self, step: int, text: str) -> None:
        """Something that should be looked at."""
        if self.log is not None:
            self.log.log("alert", step, {"alert/text": text})
        self.message(f"alert: {text}")


class Hook(Protocol):
    """Called on every rank after every update; does its work when its turn has come."""

    def after_step(self, report: StepReport) -> None: ...


@dataclass
class LogHook:
    """Every `tracking.every` steps: a row in `metrics.jsonl` and a line on the screen.

    The loss is that step's, over the global batch; speeds are over all steps since the last row.
    """

    config: Config
    engine: Engine
    state: TrainerState
    bad_steps: BadSteps
    outlets: Outlets
    _since: list[StepReport] = field(default_factory=list)

    def after_step(self, report: StepReport) -> None:
        """Record the step; write a row when it is time."""
        self._since.append(report)
        if not report.result.applied:
            self.outlets.alert(report.step, f"update {report.step} skipped: loss or gradient not finite")
        if report.step % self.config.tracking.every == 0 or report.is_last or report.step == 1:
            self._write(report)
            self._since.clear()

    def _write(self, report: StepReport) -> None:
        objective, cross_entropy, n_correct = sum_over_data_parallel(
            report.result.sums.double(), self.engine.mesh
        ).tolist()
        if self.outlets.log is None:
            return
        n_targets = max(1, report.totals.n_target_tokens)
        seconds = sum(r.step_time_s for r in self._since)
        n_tokens = sum(r.totals.n_source_tokens + r.totals.n_target_tokens for r in self._since)
        n_positions = sum(r.totals.n_positions for r in self._since)
        values: dict[str, float | int | str] = {
            "trainer/tokens_seen": self.state.tokens_seen,
            "train/loss": cross_entropy / n_targets,
            "train/objective": objective / n_targets,
            "train/accuracy": n_correct / n_targets,
            "train/lr": report.result.learning_rate,
            "train/grad_norm": report.result.grad_norm,
            "train/bad_steps": self.bad_steps.total,
            "train/target_tokens": report.totals.n_target_tokens,
            "train/pairs": report.totals.n_pairs,
            "data/truncated": self.state.n_truncated,
            "data/dropped": self.state.n_dropped,
            "perf/tokens_per_sec": n_tokens / max(seconds, 1e-9),
            "perf/padding_pct": 100.0 * (1.0 - n_tokens / max(1, n_positions)),
            "perf/step_time_s": seconds / len(self._since),
            "perf/data_time_s": sum(r.data_time_s for r in self._since) / len(self._since),
            "memory/max_allocated_gib": _max_memory_gib(self.engine.mesh.device),
        }
        if report.totals.fingerprint is not None:
            values["data/fingerprint"] = f"{report.totals.fingerprint:016x}"
        self.outlets.log.log("train", report.step, values)
        if self.outlets.console is not None:
            self.outlets.console.train(report.step, values)


@dataclass
class EvaluateHook:
    """Every `evaluate.every` steps and at the end: held-out loss, BLEU, samples."""

    config: Config
    engine: Engine
    tokenizer: TextTokenizer
    state: TrainerState
    outlets: Outlets

    def after_step(self, report: StepReport) -> None:
        """Evaluate when it is time."""
        if report.step % self.config.evaluate.every == 0 or report.step == self.config.train.steps:
            self.run(report.step)

    def run(self, step: int) -> Evaluation:
        """Evaluate now. A collective."""
        if self.outlets.console is not None:
            self.outlets.console.pause()
        start = time.perf_counter()
        found = evaluate(self.engine, self.config, self.tokenizer)
        values = {**found.metrics, "trainer/tokens_seen": self.state.tokens_seen}
        if self.outlets.log is not None and self.outlets.console is not None:
            seconds = time.perf_counter() - start
            self.outlets.log.log("eval", step, {**values, "perf/eval_time_s": seconds})
            self.outlets.console.evaluation(step, values)
            if found.samples:
                write_samples(Path(self.config.run.dir), step, found.samples)
        return found


@dataclass
class CheckpointHook:
    """Every `checkpoint.every` steps and at the end: save.

    A save that fails is an alert, and the next one tries again; the run fails only if its last save did.

    Raises:
        CheckpointError: on every rank, if there is no room for a checkpoint before the first step.
    """

    config: Config
    engine: Engine
    state: TrainerState
    outlets: Outlets

    def __post_init__(self) -> None:
        self.saver = Saver(self.engine)
        self.saver.check_space()

    def after_step(self, report: StepReport) -> None:
        """Save when it is time, and see how the save before goes.

        Raises:
            CheckpointError: on every rank, if the run's last save failed.
        """
        for outcome in self.saver.poll():
            self._record(report.step, outcome)
        if report.step % self.config.checkpoint.every and not report.is_last:
            return
        if self.outlets.console is not None:
            self.outlets.console.pause()
        ended = self.saver.begin(self.state)
        if report.is_last or not self.config.checkpoint.asynchronous:
            ended += self.saver.finish()
        for outcome in ended:
            self._record(report.step, outcome)
        if report.is_last and ended[-1].error is not None:
            failure = CheckpointError(f"{ended[-1].error}: mend it, and the same command goes on from there")
            failure.on_every_rank = True
            raise failure

    def finish(self) -> None:
        """Complete a save under way, where a run ends with an error that all ranks know of. A collective."""
        for outcome in self.saver.finish():
            self._record(self.state.step, outcome)

    def _record(self, step: int, outcome: SaveOutcome) -> None:
        if outcome.error is not None:
            self.outlets.alert(step, outcome.error)
        elif self.outlets.log is not None:
            values = {
                "checkpoint/step": outcome.step,
                "checkpoint/save_s": outcome.total_s,
                "checkpoint/blocked_s": outcome.blocked_s,
                "checkpoint/gib": outcome.n_bytes / 2**30,
            }
            self.outlets.log.log("checkpoint", step, values)


def write_samples(run_dir: Path, step: int, samples: list[Sample]) -> Path:
    """Decoded samples as text that a person reads: three lines each, line ends shown as ⏎."""
    path = run_dir / "samples" / f"step-{step:08d}.txt"
    path.parent.mkdir(exist_ok=True)
    blocks = [
        f"source:    {_one_line(sample.source)}\n"
        f"output:    {_one_line(sample.output)}\n"
        f"reference: {_one_line(sample.reference)}\n"
        for sample in samples
    ]
    path.write_text("\n".join(blocks), encoding="utf-8")
    return path


def _one_line(text: str) -> str:
    return "⏎".join(text.splitlines())


def _max_memory_gib(device: torch.device) -> float:
    """Most memory used so far: of the GPU's allocator, or of this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


__all__ = [
    "CheckpointHook",
    "EvaluateHook",
    "Hook",
    "LogHook",
    "Outlets",
    "StepReport",
    "StepTotals",
    "write_samples",
]
