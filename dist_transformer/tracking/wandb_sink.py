"""Rows to Weights & Biases: one dashboard run a training run, online where possible, offline otherwise.

wandb hands everything to a helper process (wandb-core) that can die, hang, or wait for a network. This sink
runs in its feed's thread and treats each of these as a reason to begin again with the same run id, never as
an error of the run.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from dist_transformer.config import WandbConfig
from dist_transformer.tracking.feed import Report
from dist_transformer.tracking.ids import TrackingIds
from dist_transformer.tracking.jsonl import Row
from dist_transformer.tracking.wandb_log import X_STEP, is_uploaded, last_step, marker_of, wandb_files
from dist_transformer.tracking.wandb_replay import Replay
from dist_transformer.tracking.wandb_server import ServerAnswer, ask_server, patience

_X_TOKENS = "trainer/tokens_seen"
_AXES = {"train/*": _X_TOKENS, "eval/*": _X_TOKENS} | dict.fromkeys(
    ("perf/*", "memory/*", "time/*", "data/*", "health/*", "checkpoint/*"), X_STEP
)
_SAMPLE_COLUMNS = ["source", "output", "reference"]
_NOT_LOGGED = frozenset({"event", "step", "row", "time"})

# Rows that may be with the helper: it passes them on every second, or to a server every 15 s.
_N_RECENT = 1000
_MAX_REOPENED = 5
_REOPEN_WINDOW_S = 3600.0


class WandbSink:
    """One W&B run, fed with rows.

    The row number is W&B's `step`, because it never falls: W&B ignores rows whose step was seen before,
    which would be all those that a restart replays. The real axes come from `define_metric`.

    Args:
        resumed_step: the step after which this process goes on (0: from the beginning): what the dashboard has of
            later steps is replaced where no server has it yet, and else not drawn twice. None: every row is drawn.
    """

    name = "wandb"

    def __init__(
        self,
        config: WandbConfig,
        ids: TrackingIds,
        run_dir: Path,
        run_config: Mapping[str, Any],
        report: Report,
        resumed_step: int | None = None,
    ) -> None:
        self._replay = None if resumed_step is None else Replay(run_dir.resolve(), resumed_step)
        self._caught_up = False
        self._config = config
        self._ids = ids
        self._run_dir = run_dir.resolve()
        self._run_config = dict(run_config)
        self._report = report
        self._run: Any = None
        self._online = False
        self._why_offline = ""
        self._next_step = 0
        self._safe_until = 0
        self._tokens_seen: Any = None
        self._stop = threading.Event()
        self._abandoned = False
        self._reopened: deque[float] = deque(maxlen=_MAX_REOPENED)
        self._recent: deque[tuple[int, Row]] = deque(maxlen=_N_RECENT)

    @property
    def stop_requested(self) -> bool:
        """Whether somebody pressed the stop button of the run's page."""
        return self._stop.is_set()

    def open(self) -> None:
        """Start the run: online where the server answers, else offline."""
        self._prepare_environment()
        logs_before = wandb_files(self._run_dir)
        mode = self._decide()
        if mode == "online":
            try:
                self._start("online")
                self._catch_up(logs_before)
                return
            except Exception as error:
                self._why_offline = f"going online failed: {_first_line(error)}"
                # Without this the id counts as in use.
                self._teardown()
        if self._config.mode == "online":
            self._report(f"W&B goes on offline: {self._why_offline}")
        try:
            self._start("offline")
            self._catch_up(logs_before)
        except BaseException:
            self._teardown()
            raise

    def write(self, row: Row) -> None:
        """Log one row; where wandb-core is gone, begin again with the same run id and log it there."""
        if self._replay is not None and self._replay.is_known(row):
            return
        values, step = self._values(row), max(row["row"], self._next_step)
        try:
            self._log(values, step)
        except Exception as error:
            if self._abandoned:
                raise
            self._reopen(error)
            self._log(values, max(step, self._next_step))
        if row["event"] == "alert" and self._online:
            self._alert(row)

    def _values(self, row: Row) -> Row:
        """The row as it is logged."""
        values = {key: value for key, value in row.items() if key not in _NOT_LOGGED}
        values[X_STEP] = row["step"] if self._replay is None else self._replay.place(row["step"])
        # Rows without a token count (an alert, a checkpoint) are placed where the run was.
        self._tokens_seen = values.setdefault(_X_TOKENS, self._tokens_seen)
        if self._tokens_seen is None:
            del values[_X_TOKENS]
        return values

    def _catch_up(self, logs_before: list[Path]) -> None:
        """Once a process: log the rows that count and that the process before took with it when it was killed."""
        if self._replay is None or self._caught_up:
            return
        if self._online:
            self._send(self._replay.missing_online(self._run.starting_step))
        else:
            self._send(self._replay.missing_offline())
        self._caught_up = True
        if self._online:
            # What offline logs of earlier processes hold has just been sent.
            for path in logs_before:
                if not is_uploaded(path):
                    marker_of(path).touch()

    def _send(self, rows: list[Row]) -> None:
        """Log rows of earlier processes, at the time when they were written."""
        for row in rows:
            self._log({**self._values(row), "_timestamp": row["time"]}, max(row["row"], self._next_step))

    def send_missing(self) -> int:
        """Go online, send the run's rows that the server has not got, and finish; how many that were.

        Raises:
            RuntimeError: if the server is not there.
        """
        assert self._replay is not None
        self._prepare_environment()
        try:
            if not (answer := self._ask()).usable:
                raise RuntimeError(answer.reason)
            self._start("online")
            missing = self._replay.missing_online(self._run.starting_step)
            self._send(missing)
            self._run.finish(exit_code=0)
        except Exception as error:
            raise RuntimeError(_first_line(error)) from error
        finally:
            self._teardown()
        return len(missing)

    def close(self, exit_code: int, preempted: bool) -> None:
        """Finish the run; on a preemption the page says that it will come back."""
        if self._run is None:
            return
        try:
            try:
                self._say_goodbye(exit_code, preempted)
            except Exception as error:
                if self._abandoned:
                    raise
                # A job's signals go to all its processes, and the helper dies of SIGTERM and SIGINT.
                self._reopen(error)
                self._say_goodbye(exit_code, preempted)
        finally:
            # Also after a failure: wandb would wait for its helper when the process ends.
            self._teardown()

    def interrupt(self) -> None:
        """Kill wandb-core, which may be stuck: calls that wait for it then fail."""
        _kill_core()

    def abandon(self) -> None:
        """Give the run up: interrupt, and do not begin again."""
        self._abandoned = True
        _kill_core()

    def where(self) -> str:
        """Where the run can be seen, or how it gets there."""
        run = self._run
        if run is None:
            return ""
        if self._online:
            return f"W&B run: {run.url}"
        folder = _short(Path(run.sync_dir))
        why = f" ({self._why_offline})" if self._why_offline else ""
        return f"W&B offline run in {folder}{why}; upload with: dist-transformer track sync {_short(self._run_dir)}"

    def _decide(self) -> str:
        """Online or offline, in a few seconds; keeps the reason for offline."""
        mode = self._config.mode
        environment_mode = os.environ.get("WANDB_MODE")
        if mode == "auto" and environment_mode in ("offline", "dryrun"):
            self._why_offline = f"WANDB_MODE={environment_mode}"
            return "offline"
        if mode == "offline":
            return "offline"
        answer = self._ask()
        if answer.usable:
            return "online"
        self._why_offline = answer.reason
        return "offline"

    def _ask(self) -> ServerAnswer:
        import wandb

        settings = wandb.setup(settings=self._settings("offline")).settings
        verify_tls = not settings.insecure_disable_ssl
        return ask_server(
            settings.base_url, settings.api_key, timeout=patience(self._config.mode), verify_tls=verify_tls
        )

    def _start(self, mode: Literal["online", "offline"]) -> None:
        import wandb

        self._run_dir.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            id=self._ids.wandb_run_id,
            resume="allow",
            project=self._ids.wandb_project,
            entity=self._config.entity,
            name=self._config.name or self._run_dir.name,
            tags=list(self._config.tags) or None,
            dir=str(self._run_dir),
            config=self._run_config,
            allow_val_change=True,
            mode=mode,
            reinit="create_new",
            settings=self._settings(mode),
        )
        for pattern, axis in _AXES.items():
            run.define_metric(pattern, step_metric=axis)
        self._online = mode == "online"
        self._next_step = max(self._next_step, run.starting_step)
        self._run = run

    def _settings(self, mode: str) -> Any:
        import wandb

        return wandb.Settings(
            mode=mode,
            silent=True,
            quiet=True,
            show_info=False,
            show_warnings=False,
            show_errors=False,
            console="off",
            save_code=False,
            init_timeout=20,
            finish_timeout=60,
            stop_fn=self._stop.set,
            x_stats_disk_paths=(str(self._run_dir),),
            # The default of 15 s is what a killed process would lose.
            x_transaction_log_flush_interval=1,
        )

    def _prepare_environment(self) -> None:
        """What wandb reads only from the environment: quiet from the first line on, files under the run."""
        home = self._run_dir / "wandb"
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_DATA_DIR", str(home / "data"))
        os.environ.setdefault("WANDB_CACHE_DIR", str(home / "cache"))
        # Another process's helper, inherited from whoever started us, would end with that process.
        os.environ.pop("WANDB_SERVICE", None)
        logging.getLogger("wandb").setLevel(logging.CRITICAL)

    def _log(self, values: Row, step: int) -> None:
        # commit: with a step of our own, wandb would otherwise hold the row back until the next one.
        self._run.log(_with_tables(values), step=step, commit=True)
        self._recent.append((step, values))
        self._next_step = step + 1

    def _say_goodbye(self, exit_code: int, preempted: bool) -> None:
        if preempted:
            self._run.mark_preempting()
        self._run.finish(exit_code=exit_code)

    def _alert(self, row: Row) -> None:
        text = ", ".join(f"{key}={value}" for key, value in row.items() if key not in _NOT_LOGGED)
        self._run.alert(
            title=f"{self._run_dir.name}: alert at step {row['step']}"[:64], text=text, level="WARN"
        )

    def _reopen(self, error: Exception) -> None:
        """Begin again with the same id; bounded: a helper that dies at once must not keep us busy."""
        now = time.monotonic()
        if len(self._reopened) == _MAX_REOPENED and now - self._reopened[0] < _REOPEN_WINDOW_S:
            raise RuntimeError(f"wandb-core was lost {_MAX_REOPENED} times within an hour") from error
        self._reopened.append(now)
        log = Path(self._run.sync_dir) / f"run-{self._ids.wandb_run_id}.wandb" if self._run else None
        self._teardown()
        self.open()
        self._send_again(log)
        self._report(f"W&B lost its helper process ({_first_line(error)}) and goes on: {self.where()}")

    def _send_again(self, lost_helper_log: Path | None) -> None:
        """Log the rows that the lost helper had taken and not passed on."""
        if self._online:
            first = self._run.starting_step
        else:
            kept = last_step(lost_helper_log) if lost_helper_log else None
            first = self._safe_until if kept is None else max(self._safe_until, kept + 1)
        self._safe_until = first
        for step, values in list(self._recent):
            if step >= first:
                self._run.log(_with_tables(values), step=step, commit=True)

    def _teardown(self) -> None:
        """Leave wandb's process-wide state behind, whatever state it is in."""
        import wandb

        self._run = None
        # wandb-core's own exit code comes back as SystemExit.
        with contextlib.suppress(Exception, SystemExit):
            wandb.teardown()
        os.environ.pop("WANDB_SERVICE", None)


def _kill_core() -> None:
    """Kill the helper process that this process started, if it did."""
    pid = core_pid()
    if pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def core_pid() -> int | None:
    """The process id of the wandb-core that this process started."""
    from wandb.sdk import wandb_setup

    # wandb offers no public way; without this id a stuck helper could only be waited for.
    connection = getattr(getattr(wandb_setup, "_singleton", None), "_connection", None)
    process = getattr(getattr(connection, "_proc", None), "_process", None)
    pid = getattr(process, "pid", None)
    return pid if isinstance(pid, int) else None


def _short(path: Path) -> str:
    """The path from here where it lies below, else in full."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _with_tables(values: Row) -> Row:
    """Rows of texts as W&B shows them; made anew each time, since a table belongs to one run."""
    import wandb

    return {
        key: wandb.Table(columns=_SAMPLE_COLUMNS, data=value) if isinstance(value, list) else value
        for key, value in values.items()
    }
