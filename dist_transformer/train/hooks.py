"""Side work of the loop, each with its own cadence: logging, evaluation, checkpoints."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dist_transformer.checkpoints.folder import TrainerState
from dist_transformer.config import Config
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.engine.engine import Engine, StepResult
from dist_transformer.engine.saving import SaveOutcome, Saver
from dist_transformer.errors import CheckpointError
from dist_transformer.model.flops import Work
from dist_transformer.parallel.collectives import gather_objects
from dist_transformer.tracking import Console, MetricsLog
from dist_transformer.tracking.metrics import Value
from dist_transformer.train.evaluate import (
    Evaluation,
    EvaluationInterruptedError,
    Sample,
    StopWishes,
    evaluate,
)
from dist_transformer.train.selection import Selection


@dataclass
class StepTotals:
    """Counts of one global batch, over all ranks."""

    n_source_tokens: int
    n_target_tokens: int
    n_pairs: int
    n_truncated: int
    n_dropped: int
    useful: Work
    """Real tokens, and each sample's own pairs."""
    executed: Work
    """Positions and pairs of whole rows."""
    fingerprint: int
    n_bad: int = 0
    """Samples lost to bad shards."""
    problems: list[str] = field(default_factory=list)
    """Sentences about the lost samples."""


@dataclass
class StepReport:
    """What hooks see after an update."""

    step: int
    is_last: bool
    """The run's last step, or the last one before it is stopped."""
    is_stopped: bool
    """Something is left to do that the next start does: steps, or an evaluation."""
    save: bool
    """A checkpoint is due."""
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

    def alert(self, step: int, text: str, kind: str = "run") -> None:
        """Something that should be looked at; `kind` is a word that tools filter by."""
        if self.log is not None:
            self.log.log("alert", step, {"alert/kind": kind, "alert/text": text})
        self.message(f"alert: {text}")


class Hook(Protocol):
    """Called on every rank after every update; does its work when its turn has come."""

    account: str
    """Where its time goes, one of `tracking.accounts.ACCOUNTS`."""

    def after_step(self, report: StepReport) -> None: ...


@dataclass
class EvaluateHook:
    """Every `evaluate.every` steps and at the end: held-out loss, scores, samples, and what follows from them."""

    config: Config
    engine: Engine
    tokenizer: TextTokenizer
    state: TrainerState
    outlets: Outlets
    selection: Selection
    wishes: StopWishes
    account = "evaluation"

    def after_step(self, report: StepReport) -> None:
        """Evaluate when it is time; the best weights so far are saved, and those that the run is done with.

        A run that is told to stop, be it in the middle of an evaluation, saves first: its time may be up before the
        evaluation ends. The next start evaluates.
        """
        if report.is_stopped or not self._is_due(report.step):
            return
        try:
            is_best = self._evaluate(report.step)
        except EvaluationInterruptedError:
            report.save = report.is_last = report.is_stopped = True
            return
        report.save |= is_best
        if self.selection.why_done is not None:
            report.save = report.is_last = True

    @property
    def is_missing(self) -> bool:
        """Whether the checkpoint that the run goes on from was saved by a stop in place of an evaluation."""
        return self.state.is_unevaluated and self._is_due(self.state.step)

    def catch_up(self) -> None:
        """Evaluate what the run goes on from. A collective.

        Raises:
            EvaluationInterruptedError: on every rank, if the run is to stop again.
        """
        self._evaluate(self.state.step)

    def _is_due(self, step: int) -> bool:
        return step % self.config.evaluate.every == 0 or step == self.config.train.steps

    def _evaluate(self, step: int) -> bool:
        """Whether these weights are the best so far."""
        # All ranks must decide alike, whatever rounding there may be between them.
        figures = gather_objects(self.run(step).metrics, self.engine.mesh)[0]
        self.state.evaluated_step = step
        return self.selection.record(step, figures)

    def run(self, step: int) -> Evaluation:
        """Evaluate now. A collective."""
        if self.outlets.console is not None:
            self.outlets.console.pause()
        start = time.perf_counter()
        found = evaluate(self.engine, self.config, self.tokenizer, self.wishes)
        values = {**found.metrics, "trainer/tokens_seen": self.state.tokens_seen}
        if self.outlets.log is not None and self.outlets.console is not None:
            seconds = time.perf_counter() - start
            if found.metrics:
                texts = {
                    f"samples/{name}": [[each.source, each.output, each.reference] for each in samples]
                    for name, samples in found.samples.items()
                }
                row: dict[str, Value] = {**values, **found.signatures, **texts, "perf/eval_time_s": seconds}
                self.outlets.log.log("eval", step, row)
                self.outlets.console.evaluation(step, values)
            try:
                for name, samples in found.samples.items():
                    of_set = name if self.config.data.mixture else ""
                    write_samples(Path(self.config.run.dir), step, samples, of_set)
            except OSError as error:
                text = f"samples of step {step} were not written: {error.strerror or error}"
                self.outlets.alert(step, text, kind="disk")
            for problem in found.problems:
                self.outlets.alert(step, problem, kind="data")
        return found


@dataclass
class CheckpointHook:
    """Every `checkpoint.every` steps and at the end: save.

    A save that fails is an alert, and the next one tries again; the run fails if its last save did, and with
    `checkpoint.on_failed_save=end` if any did.

    Raises:
        CheckpointError: on every rank, if there is no room for a checkpoint before the first step.
    """

    config: Config
    engine: Engine
    state: TrainerState
    outlets: Outlets
    selection: Selection
    position: Callable[[], dict[str, Any]]
    """Where the stream is, over all ranks; a collective."""
    account = "checkpoint"

    def __post_init__(self) -> None:
        self.saver = Saver(self.engine)
        self.saver.check_space()

    def after_step(self, report: StepReport) -> None:
        """Save when it is time, and see how the save before goes.

        Raises:
            CheckpointError: on every rank, if the run's last save failed, or any where that is to end it.
        """
        for outcome in self.saver.poll():
            self._record(report.step, outcome)
            self._refuse_to_go_on(outcome, must_hold=self.config.checkpoint.on_failed_save == "end")
        if report.save:
            self.save(report.step, is_last=report.is_last)

    def save(self, step: int, *, is_last: bool) -> None:
        """Save now. A collective.

        Args:
            step: Updates done.
            is_last: Nothing follows: wait for it.

        Raises:
            CheckpointError: as `after_step`.
        """
        if self.outlets.console is not None:
            self.outlets.console.pause()
        self.state.data = self.position()
        ended = self.saver.begin(self.state)
        if is_last or not self.config.checkpoint.asynchronous:
            ended += self.saver.finish()
        for outcome in ended:
            self._record(step, outcome)
            must_hold = is_last and outcome is ended[-1]
            self._refuse_to_go_on(
                outcome, must_hold=must_hold or self.config.checkpoint.on_failed_save == "end"
            )

    @staticmethod
    def _refuse_to_go_on(outcome: SaveOutcome, *, must_hold: bool) -> None:
        if must_hold and outcome.error is not None:
            failure = CheckpointError(f"{outcome.error}: mend it, and the same command goes on from there")
            failure.on_every_rank = True
            raise failure

    def finish(self) -> None:
        """Complete a save under way, where a run ends with an error that all ranks know of. A collective."""
        for outcome in self.saver.finish():
            self._record(self.state.step, outcome)

    def _record(self, step: int, outcome: SaveOutcome) -> None:
        if outcome.error is not None:
            self.selection.forget(outcome.step)
            self.outlets.alert(step, outcome.error, kind="checkpoint")
        elif self.outlets.log is not None:
            values = {
                "checkpoint/step": outcome.step,
                "checkpoint/save_s": outcome.total_s,
                "checkpoint/blocked_s": outcome.blocked_s,
                "checkpoint/gib": outcome.n_bytes / 2**30,
            }
            self.outlets.log.log("checkpoint", step, values)


def write_samples(run_dir: Path, step: int, samples: list[Sample], of_set: str = "") -> Path:
    """Decoded samples as text that a person reads: three lines each, line ends shown as ⏎.

    Args:
        run_dir: Of the run.
        step: Updates done.
        samples: What was decoded.
        of_set: Name of the held-out set, where the run has several.
    """
    path = run_dir / "samples" / f"step-{step:08d}{'-' if of_set else ''}{of_set}.txt"
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


__all__ = [
    "CheckpointHook",
    "EvaluateHook",
    "Hook",
    "Outlets",
    "StepReport",
    "StepTotals",
    "write_samples",
]
