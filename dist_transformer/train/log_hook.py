"""The row of a training step: what was learned, how fast, how well the devices and the run's time were used."""

import resource
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dist_transformer.checkpoints.folder import TrainerState
from dist_transformer.config import Config
from dist_transformer.engine.engine import Engine
from dist_transformer.model.flops import Work, hardware_flops, training_flops
from dist_transformer.parallel.collectives import gather_objects, sum_over_data_parallel
from dist_transformer.tracking import read_metrics
from dist_transformer.tracking.accounts import ACCOUNTS, PRODUCTIVE, Goodput, TimeAccounts
from dist_transformer.tracking.alerts import AlertMonitor, StallWatch
from dist_transformer.tracking.console import human_time
from dist_transformer.tracking.peak import Peak, device_peak
from dist_transformer.train.faults import BadSteps
from dist_transformer.train.hooks import Outlets, StepReport

Values = dict[str, float | int | str]


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
    accounts: TimeAccounts
    account = "other"
    _since: list[StepReport] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._n_bad_told = self.state.n_bad_samples
        self._before = self.accounts.totals()
        self._peak: Peak | None = None
        if (log := self.outlets.log) is not None:
            run_dir = Path(self.config.run.dir)
            self._monitor = AlertMonitor(self.config.tracking.alerts, run_dir)
            started = time.time() - sum(self._before.values())
            before = read_metrics(run_dir) if log.n_restarts else []
            self._goodput = Goodput(before, self.state.step, started)
            dtype = torch.float32 if self.config.train.precision == "fp32" else torch.bfloat16
            self._peak = device_peak(self.engine.mesh.device, dtype, self.config.tracking.peak_tflops)
            self._mark_restart()
        # The watch runs from the first step on: what comes before may take long.
        self._stall: StallWatch | None = None

    def close(self) -> None:
        """Stop watching; the log may be closed after this."""
        if self._stall is not None:
            self._stall.close()

    def after_step(self, report: StepReport) -> None:
        """Record the step; write a row when it is time."""
        self._since.append(report)
        if self.outlets.log is not None:
            if self._stall is None:
                self._stall = StallWatch(self.config.tracking.alerts.stall_s, self._tell_of_stall)
            self._stall.beat(report.step)
        if not report.result.applied:
            text = f"update {report.step} skipped: loss or gradient not finite"
            self.outlets.alert(report.step, text, kind="nonfinite")
        if report.totals.n_bad:
            self._tell_of_bad_samples(report)
        if report.step % self.config.tracking.every == 0 or report.is_last or report.step == 1:
            self.finish(report)

    def finish(self, report: StepReport) -> None:
        """Write the row of the steps that have none yet, if there are any. A collective."""
        if self._since:
            self._write(report)
            self._since.clear()

    def _tell_of_stall(self, step: int, seconds: float) -> None:
        busy = self.accounts.current
        text = f"no step has ended for {human_time(seconds)} after step {step:,} (busy with: {busy})"
        self.outlets.alert(step, text, kind="stall")

    def _tell_of_bad_samples(self, report: StepReport) -> None:
        """The first time, and whenever twice as many are lost as at the last."""
        n_bad = self.state.n_bad_samples
        if n_bad < 2 * self._n_bad_told:
            return
        self._n_bad_told = n_bad
        why = f": {report.totals.problems[0]}" if report.totals.problems else ""
        self.outlets.alert(
            report.step, f"{n_bad:,} samples of bad shards are left out so far{why}", kind="data"
        )

    def _write(self, report: StepReport) -> None:
        sums = sum_over_data_parallel(report.result.sums.double(), self.engine.mesh).tolist()
        ranks = gather_objects(self._own_figures(), self.engine.mesh)
        if self.outlets.log is None:
            return
        values = {
            "trainer/tokens_seen": self.state.tokens_seen,
            **self._learning(report, *sums),
            **self._speed(),
            **self._ranks(ranks),
            **self._times(),
        }
        if (free := self._monitor.disk_free_gib()) is not None:
            values["health/disk_free_gib"] = free
        if self.config.data.fingerprint:
            values["data/fingerprint"] = f"{report.totals.fingerprint:016x}"
        self.outlets.log.log("train", report.step, values)
        if self.outlets.console is not None:
            self.outlets.console.train(report.step, values)
        for alert in self._monitor.check(values):
            self.outlets.alert(report.step, alert.text, kind=alert.kind)

    def _learning(
        self, report: StepReport, objective: float, cross_entropy: float, n_correct: float
    ) -> Values:
        n_targets = max(1, report.totals.n_target_tokens)
        return {
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
            "data/bad_samples": self.state.n_bad_samples,
        }

    def _speed(self) -> Values:
        """Over all steps since the last row and all ranks. FLOP/s are one device's."""
        seconds = max(1e-9, sum(r.step_time_s for r in self._since))
        useful = sum((r.totals.useful for r in self._since), Work())
        executed = sum((r.totals.executed for r in self._since), Work())
        n_tokens, n_positions = useful.n_source + useful.n_target, executed.n_source + executed.n_target
        model = self.config.model
        device_s = seconds * self.engine.mesh.world_size
        passes = 2 if self.config.train.r_drop else 1
        model_flops = passes * training_flops(model, useful) / device_s
        hardware = hardware_flops(model, executed, self.config.recompute, self._is_fused())
        executed_flops = passes * hardware / device_s
        assert self._peak is not None
        return {
            "perf/tokens_per_sec": n_tokens / seconds,
            "perf/source_tokens_per_sec": useful.n_source / seconds,
            "perf/target_tokens_per_sec": useful.n_target / seconds,
            "perf/padding_pct": _missing_pct(n_tokens, n_positions),
            "perf/source_padding_pct": _missing_pct(useful.n_source, executed.n_source),
            "perf/target_padding_pct": _missing_pct(useful.n_target, executed.n_target),
            "perf/tflops_per_sec": model_flops / 1e12,
            "perf/mfu_pct": 100.0 * model_flops / self._peak.flops_per_s,
            "perf/hfu_pct": 100.0 * executed_flops / self._peak.flops_per_s,
            "perf/step_time_s": seconds / len(self._since),
            "perf/data_time_s": sum(r.data_time_s for r in self._since) / len(self._since),
        }

    def _own_figures(self) -> dict[str, float]:
        """This rank's seconds since the last row, by account, and its memory."""
        totals = self.accounts.totals()
        spent = {name: totals[name] - self._before[name] for name in PRODUCTIVE}
        self._before = totals
        return {**spent, "memory": _max_memory_gib(self.engine.mesh.device)}

    def _ranks(self, ranks: list[dict[str, float]]) -> Values:
        """What differs between ranks. The slowest is the one that works longest: in a step all wait for it."""
        n_steps = len(self._since)
        steps = [sum(rank[name] for name in PRODUCTIVE) for rank in ranks]
        work = [rank["compute"] + rank["input"] for rank in ranks]
        all_s = max(1e-9, sum(steps))
        slowest = max(range(len(ranks)), key=work.__getitem__)
        values: Values = {
            "perf/data_time_pct": 100.0 * sum(rank["input"] for rank in ranks) / all_s,
            "perf/straggler_rank": slowest,
            "perf/work_time_max_rank_s": work[slowest] / n_steps,
            "perf/work_time_mean_rank_s": sum(work) / len(work) / n_steps,
            "perf/step_time_max_rank_s": max(steps) / n_steps,
            "memory/max_allocated_gib": max(rank["memory"] for rank in ranks),
        }
        if self.engine.mesh.device.type != "cuda":
            # NCCL works while the host goes on: there, only a profile tells (profile.steps).
            values["perf/communication_pct"] = 100.0 * sum(rank["communication"] for rank in ranks) / all_s
        return values

    def _times(self) -> Values:
        """Rank zero's accounts since its process started, and the whole run's goodput."""
        totals = self.accounts.totals()
        return {
            **{f"time/{name}_s": totals[name] for name in ACCOUNTS},
            "time/wall_s": sum(totals.values()),
            "time/productive_s": self._goodput.productive_s(totals),
            "perf/goodput_pct": self._goodput.pct(totals, time.time()),
        }

    def _is_fused(self) -> bool:
        """Whether attention's kernel forgets its scores; on CPU, dropout and a learned bias take the plain path."""
        model = self.config.model
        dropout = model.dropout if model.attention_dropout is None else model.attention_dropout
        on_gpu = self.engine.mesh.device.type == "cuda"
        return on_gpu or (not dropout and model.positions != "relative_bias")

    def _mark_restart(self) -> None:
        log = self.outlets.log
        assert log is not None
        if not log.n_restarts:
            return
        text = f"restart {log.n_restarts}: goes on after step {self.state.step:,}"
        if self._goodput.n_lost_steps > 0:
            text += f"; {self._goodput.n_lost_steps:,} steps are trained again"
        log.log("alert", self.state.step, {"alert/kind": "restart", "alert/text": text})


def _missing_pct(n_present: int, n_places: int) -> float:
    return 100.0 * (1.0 - n_present / max(1, n_places))


def _max_memory_gib(device: torch.device) -> float:
    """Most memory used so far: of the GPU's allocator, or of this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
