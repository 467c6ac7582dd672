"""The training loop: batches in, updates out, side work in hooks. Resumes by itself where the run has a checkpoint."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_transformer.checkpoints.folder import TrainerState, read_trainer_state
from dist_transformer.config import Config
from dist_transformer.config.layout import grad_accum_steps
from dist_transformer.data.batch import Batch
from dist_transformer.data.stream import TrainStream, merge_states
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.engine.checkpoint import describe_change, load_checkpoint
from dist_transformer.engine.engine import Engine
from dist_transformer.errors import DataError, UserError
from dist_transformer.parallel.collectives import (
    barrier,
    gather_objects,
    raise_together,
)
from dist_transformer.parallel.mesh import Mesh, open_mesh
from dist_transformer.tracking import Console, MetricsLog, build_sinks
from dist_transformer.tracking.accounts import TimeAccounts
from dist_transformer.tracking.startup import StartClock
from dist_transformer.train.agreement import agree
from dist_transformer.train.collective_clock import time_collectives
from dist_transformer.train.evaluate import EvaluationInterruptedError
from dist_transformer.train.faults import BadSteps, StopSignals
from dist_transformer.train.guard import Guard
from dist_transformer.train.hooks import (
    CheckpointHook,
    EvaluateHook,
    Hook,
    Outlets,
    StepReport,
)
from dist_transformer.train.log_hook import LogHook
from dist_transformer.train.prepare_run import (
    find_checkpoint,
    initial_weights,
    prepare_run,
    record_inputs,
    unwritable,
)
from dist_transformer.train.profiling import Profiling
from dist_transformer.train.selection import Selection


def train(config: Config) -> None:
    """Train as configured, on all ranks of this world; start, or go on from the newest checkpoint.

    Raises:
        UserError: for everything that a person can mend, on every rank, before the first step where possible.
    """
    signals, accounts, clock = StopSignals(), TimeAccounts(), StartClock()
    clock.begin("process group")
    with time_collectives(accounts), open_mesh(config.parallel.tp_degree) as mesh:
        clock.begin("data")
        config, tokenizer = prepare_run(config, mesh)
        checkpoint = find_checkpoint(config, mesh)
        state = read_trainer_state(checkpoint) if checkpoint else TrainerState(evaluated_step=0)
        clock.begin("dashboard")
        outlets = _open_outlets(config, mesh, state.step)
        exit_code = 1
        try:
            with (
                Guard(config, mesh, outlets, signals, state.step, clock) as guard,
                _open_stream(config, mesh, state) as stream,
            ):
                trainer = Trainer(
                    config, mesh, tokenizer, outlets, guard, checkpoint, state, stream, accounts
                )
                # Now nothing refuses this start any more: a refused one must leave the run as it was.
                record_inputs(config, mesh, state.step)
                trainer.run()
            exit_code = 0
        finally:
            stopped = signals.received is not None
            if outlets.console is not None:
                outlets.console.close()
            if outlets.log is not None:
                outlets.log.close(
                    exit_code=143 if stopped and not exit_code else exit_code, preempted=stopped
                )
        barrier(mesh)


class Trainer:
    """A run on this rank: engine, stream, state and hooks."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        tokenizer: TextTokenizer,
        outlets: Outlets,
        guard: Guard,
        checkpoint: Path | None,
        state: TrainerState,
        stream: TrainStream,
        accounts: TimeAccounts,
    ) -> None:
        self.config, self.mesh, self.outlets, self.guard = config, mesh, outlets, guard
        self.accounts = accounts
        self.state, self.stream = state, stream
        self._batches = iter(stream)  # its workers start while the model is built
        self.engine = Engine(config, mesh, weights=None if checkpoint else initial_weights(config))
        if checkpoint is not None:
            load_checkpoint(self.engine, checkpoint)
        self.bad_steps = BadSteps(config.train.max_bad_steps, self.state.n_bad_steps)
        self.selection = Selection(config, self.state)
        self.evaluation = (
            EvaluateHook(
                config,
                self.engine,
                tokenizer,
                self.state,
                outlets,
                self.selection,
                guard,
            )
            if any(corpus.eval for corpus in config.data.corpora())
            else None
        )
        self.saving = CheckpointHook(config, self.engine, self.state, outlets, self.selection, self._position)
        self.logging = LogHook(config, self.engine, self.state, self.bad_steps, outlets, accounts)
        self.profiling = Profiling(config.profile, Path(config.run.dir), mesh, accounts, outlets.message)
        self.hooks: list[Hook] = [
            self.logging,
            *([self.evaluation] if self.evaluation else []),
            self.saving,
        ]
        if checkpoint is not None and (change := describe_change(checkpoint, config, mesh)):
            outlets.message(change)

    def run(self) -> None:
        """All steps that are left."""
        self._say_hello()
        with contextlib.closing(self.logging):
            try:
                self._run()
            except UserError as error:
                # Where every rank knows, the checkpoint that is being written need not be lost.
                if error.on_every_rank:
                    self.saving.finish()
                raise

    def _run(self) -> None:
        try:
            self._evaluate_first()
        except EvaluationInterruptedError:
            self._stop()
            return
        batches = self._global_batches()
        while self.state.step < self.config.train.steps and self.selection.why_done is None:
            with self.profiling.step(self.state.step + 1):
                report = self._step(batches)
            for hook in self.hooks:
                with self.accounts.spend(hook.account), self.guard.side_work(hook.account, report.step):
                    hook.after_step(report)
            if report.is_last:  # also where only an evaluation has decided so
                self.logging.finish(report)
            self.bad_steps.check(report.step)
            if report.is_stopped:
                self._stop()
                return
        if self.state.step < self.config.train.steps and (why := self.selection.why_done) is not None:
            self.guard.early_stopped = f"stopped early after step {self.state.step:,}: {why}"
            self.outlets.message(f"done: {self.guard.early_stopped}")
            return
        self.outlets.message(f"done: {self.config.train.steps:,} steps in {self.config.run.dir}")

    def _evaluate_first(self) -> None:
        """The weights that the run starts from, where that is asked for, or was left out when it was stopped."""
        step, evaluation = self.state.step, self.evaluation
        if evaluation is None:
            return
        if step == 0 and self.config.evaluate.at_start:
            with self.accounts.spend("evaluation"), self.guard.side_work("evaluation", 0):
                evaluation.run(0)
        elif evaluation.is_missing:
            with self.accounts.spend("evaluation"), self.guard.side_work("evaluation", step):
                evaluation.catch_up()
            if step == self.config.train.steps or self.selection.why_done is not None:
                # No later checkpoint tells of it.
                with self.accounts.spend("checkpoint"), self.guard.side_work("checkpoint", step):
                    self.saving.save(step, is_last=True)

    def _stop(self) -> None:
        """All is saved, and something is left to do."""
        self.guard.learn_why()
        self.guard.is_stopped = True
        step = self.state.step
        when = f"after step {step:,}: saved" if step else "before the first step"
        self.outlets.message(f"stopped by {self.guard.why_stopped()} {when}; the same command goes on")

    def _step(self, batches: Iterator[list[Batch]]) -> StepReport:
        step, start = self.state.step + 1, time.perf_counter()
        self.guard.enter("waiting for data", step)
        micro_batches: list[Batch] = []
        error: DataError | None = None
        with self.accounts.spend("input"):
            try:
                micro_batches = next(batches)
            except DataError as problem:
                error = problem
        data_time_s = time.perf_counter() - start
        with self.accounts.spend("compute"):
            self.guard.enter("training", step)
            wishes = self.guard.stop_requested, self.guard.save_requested
            totals, stop, save = agree(micro_batches, error, *wishes, self.mesh)
            result = self.engine.train_step(micro_batches, totals.n_target_tokens, step)
        for batch in micro_batches:
            self.stream.advance(batch)
        self.bad_steps.record(result.applied)
        self.state.step = self.guard.step = step
        self.state.tokens_seen += totals.n_source_tokens + totals.n_target_tokens
        self.state.n_truncated += totals.n_truncated
        self.state.n_dropped += totals.n_dropped
        self.state.n_bad_samples += totals.n_bad
        self.state.n_bad_steps = self.bad_steps.total
        is_last = stop or step == self.config.train.steps
        is_stopped = stop and step < self.config.train.steps
        save = save or is_last or step % self.config.checkpoint.every == 0
        seconds = time.perf_counter() - start
        return StepReport(step, is_last, is_stopped, save, totals, result, seconds, data_time_s)

    def _position(self) -> dict[str, Any]:
        return merge_states(gather_objects(self.stream.state(), self.mesh))

    def _global_batches(self) -> Iterator[list[Batch]]:
        """This rank's micro-batches, a step's at a time."""
        n = grad_accum_steps(self.config, self.mesh.dp_size)
        while True:
            yield [next(self._batches) for _ in range(n)]

    def _say_hello(self) -> None:
        config, mesh = self.config, self.mesh
        self.outlets.message(
            f"{self.engine.n_parameters / 1e6:,.1f} M parameters, {mesh.world_size} rank(s) on {mesh.device.type}, "
            f"ZeRO {config.parallel.zero_stage}, {config.train.precision}, "
            f"{config.train.global_batch_size} rows a step = {mesh.dp_size} x {config.train.micro_batch_size} "
            f"x {grad_accum_steps(config, mesh.dp_size)} micro-steps"
        )
        for corpus in self.stream.corpora:
            self.outlets.message(corpus.describe(config.train.steps * config.train.global_batch_size))
        if self.state.step:
            self.outlets.message(f"resuming after step {self.state.step:,} of {config.train.steps:,}")


def _open_stream(config: Config, mesh: Mesh, state: TrainerState) -> TrainStream:
    return TrainStream(
        config.data,
        seed=config.run.seed,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        micro_batch_size=config.train.micro_batch_size,
        state=state.data,
    )


def _open_outlets(config: Config, mesh: Mesh, start_step: int) -> Outlets:
    """Rank zero's log and screen. A collective: if they cannot be opened, no rank goes on."""
    outlets, error = Outlets(), None
    if mesh.is_rank_zero:
        try:
            outlets = _outlets_of_rank_zero(config, start_step)
        except UserError as problem:
            error = problem
    raise_together(error, mesh)
    return outlets


def _outlets_of_rank_zero(config: Config, start_step: int) -> Outlets:
    run_dir = Path(config.run.dir)
    console = Console(config.train.steps, start_step)
    try:
        sinks = build_sinks(
            config.tracking, run_dir, config.model_dump(mode="json"), console.message, resumed_step=start_step
        )
        # Dashboards connect while the model is built.
        log = MetricsLog(run_dir, sinks, report=console.message, announce=console.message, open_timeout=0)
    except OSError as problem:
        raise unwritable(run_dir, problem) from None
    return Outlets(log, console)
