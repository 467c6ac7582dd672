"""What surrounds the loop: preflight before it, the watchdog beside it, and one line about how it ended after it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from dist_transformer.config import Config
from dist_transformer.errors import DivergenceError, PreflightError, UserError
from dist_transformer.parallel.collectives import gather_objects
from dist_transformer.parallel.mesh import Mesh
from dist_transformer.tracking.exits import (
    FINISHED,
    FOR_A_PERSON,
    ON_REQUEST,
    Reason,
    begin_attempt,
    end_attempt,
    read_exits,
    signal_reason,
)
from dist_transformer.tracking.heartbeats import clear_beats
from dist_transformer.tracking.startup import StartClock, describe_start, record_start
from dist_transformer.tracking.switches import SAVE_NAME, STOP_NAME, ask_to_stop, is_set, take_away
from dist_transformer.train.faults import StopSignals
from dist_transformer.train.hooks import Outlets
from dist_transformer.train.preflight import describe_facts, run_preflight
from dist_transformer.train.watchdog import Watchdog, give_last_words

_SWITCH_INTERVAL_S = 1.0
_LET_RANK_ZERO_SPEAK_S = 8.0


class Guard:
    """Beside the loop on every rank; a context that begins before the engine is built and ends last.

    Args:
        step: Updates done before.
        clock: How long the start takes.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        outlets: Outlets,
        signals: StopSignals,
        step: int,
        clock: StartClock,
    ) -> None:
        self.config, self.mesh, self.outlets, self.signals = config, mesh, outlets, signals
        self.run_dir, self.step, self.clock = Path(config.run.dir), step, clock
        self.early_stopped: str | None = None
        """Why the run is done before its last step; the loop says so."""
        self.is_stopped = False
        """The loop has ended with something left to do."""
        self._switches_seen = 0.0
        self._stop_switch = False

    def __enter__(self) -> "Guard":
        self.clock.begin("preflight")
        if self.mesh.is_rank_zero:
            take_away(self.run_dir, STOP_NAME)  # it was meant for an earlier start
            clear_beats(self.run_dir)
            begin_attempt(self.run_dir, self.step)
            self._tell_of_the_last_end()
        attempt = gather_objects(f"{time.time():.6f}", self.mesh)[0]
        self.watchdog = Watchdog(self.run_dir, self.mesh.rank, attempt, self.config.faults, self._on_hang)
        if self.config.faults.preflight:
            try:
                facts = run_preflight(self.config, self.mesh)
            except PreflightError as error:
                self.__exit__(PreflightError, error, None)
                raise
            if len({each.host for each in facts}) > 1:
                for line in describe_facts(facts):
                    self.outlets.message(line)
        self.clock.begin("model")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.watchdog.close()
        reason, message = self._reason(error)
        # Any rank may be the first to know of a failure; that all is well, rank zero says for all.
        if self.mesh.is_rank_zero or error is not None:
            who = "" if self.mesh.is_rank_zero or not message else f"rank {self.mesh.rank}: "
            end_attempt(self.run_dir, reason, self.step, who + message)

    def enter(self, phase: str, step: int) -> None:
        """The main thread begins something that must not take longer than a step may."""
        self._time_start(phase)
        is_start = not self.clock.is_over  # first batch, compiling
        self.watchdog.enter(phase, step, self.config.faults.start_limit_s if is_start else None)

    @contextmanager
    def side_work(self, account: str, step: int) -> Iterator[None]:
        """Work between two steps, by the account that its time is put on."""
        phase = {"evaluation": "evaluating", "checkpoint": "saving"}.get(account)
        if phase is None:
            yield
            return
        self._time_start(phase)
        with self.watchdog.side_work(phase, step):
            yield

    @property
    def stop_requested(self) -> bool:
        """Whether this rank knows of a wish to stop: a signal, the dashboard, the switch file."""
        self._look_at_switches()
        return self.signals.received is not None or self._stop_on_dashboard or self._stop_switch

    @property
    def stop_is_known(self) -> bool:
        """Whether a wish to stop has come in a way in which every rank learns of it by itself.

        Of one on the dashboard rank zero alone knows: it sets the switch file for the others.
        """
        if self.mesh.world_size == 1:
            return self.stop_requested
        if self._stop_on_dashboard and not self._stop_switch:
            ask_to_stop(self.run_dir)
            self._stop_switch = True
        self._look_at_switches(everywhere=True)
        return self.signals.received is not None or self._stop_switch

    @property
    def save_requested(self) -> bool:
        """Whether the switch for saving is set; asked once a step, on rank zero."""
        if not self.mesh.is_rank_zero or not is_set(self.run_dir, SAVE_NAME):
            return False
        take_away(self.run_dir, SAVE_NAME)
        return True

    def learn_why(self) -> None:
        """Tell each other of signals: a drained node's ranks alone may have got one. A collective."""
        self.signals.learn(gather_objects(self.signals.received, self.mesh))

    def why_stopped(self) -> str:
        """What asked the run to stop, as far as this rank knows."""
        if self.signals.received is not None:
            return self.signals.received
        if self._stop_on_dashboard:
            return "the dashboard"
        return f"the file {STOP_NAME}" if self._stop_switch else "another rank"

    @property
    def _stop_on_dashboard(self) -> bool:
        return self.outlets.log is not None and self.outlets.log.stop_requested

    def _time_start(self, phase: str) -> None:
        if self.clock.is_over:
            return
        if self.clock.phase != "first step":
            names = {"waiting for data": "first batch", "training": "first step"}
            self.clock.begin(names.get(phase, "evaluation"))
            return
        seconds, cpu_seconds = self.clock.finish()
        if self.mesh.is_rank_zero:
            record_start(self.run_dir, self.step, seconds, cpu_seconds)
            self.outlets.message(describe_start(seconds, cpu_seconds))

    def _look_at_switches(self, everywhere: bool = False) -> None:
        # A shared file system need not be asked more often, nor, while steps go on, by more than one rank.
        is_asked = everywhere or self.mesh.is_rank_zero
        if is_asked and time.monotonic() - self._switches_seen > _SWITCH_INTERVAL_S:
            self._switches_seen = time.monotonic()
            self._stop_switch = self._stop_switch or is_set(self.run_dir, STOP_NAME)

    def _reason(self, error: BaseException | None) -> tuple[Reason, str]:
        if isinstance(error, DivergenceError):
            return "nonfinite", str(error)
        if isinstance(error, PreflightError):
            return "preflight", str(error)
        if isinstance(error, UserError):
            return "error", str(error)
        if isinstance(error, KeyboardInterrupt):
            return "stopped", "interrupted, not saved"
        if error is not None:
            first = str(error).splitlines()
            return "crash", f"{type(error).__name__}: {first[0] if first else ''}"
        if self.step >= self.config.train.steps and not self.is_stopped:
            return "done", ""
        if self.early_stopped is not None:
            return "early_stopped", self.early_stopped
        if self.signals.received is not None:
            return signal_reason(self.signals.received), self.signals.received
        if self._stop_switch:
            take_away(self.run_dir, STOP_NAME)
        return "stopped", self.why_stopped()

    def _on_hang(self, sentence: str) -> None:
        end_attempt(self.run_dir, "watchdog", self.step, sentence)
        if not self.mesh.is_rank_zero:
            # Once one rank has ended, the launcher ends the others: rank zero alone has the dashboard.
            time.sleep(_LET_RANK_ZERO_SPEAK_S)
            return

        def speak() -> None:
            self.outlets.alert(self.step, sentence, kind="hang")
            if self.outlets.log is not None:
                self.outlets.log.close(exit_code=1, preempted=False)

        give_last_words(speak)

    def _tell_of_the_last_end(self) -> None:
        exits = read_exits(self.run_dir)
        if exits and exits[-1].reason not in (*FINISHED, *ON_REQUEST):
            last = exits[-1]
            again = " (it may end the same way again)" if last.reason in FOR_A_PERSON else ""
            text = f"the last start ended at step {last.step} by {last.reason}{again}: {last.message}"
            self.outlets.alert(self.step, text, kind="exit")
