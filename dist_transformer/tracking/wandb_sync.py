"""Uploads what runs without a network left behind: `dist-transformer track sync`.

`wandb sync` exits with 0 on every error, gives up on a file without content, and sends a file twice that it could not
mark, whose rows then stand twice on the dashboard. So logs of processes that have ended are mended, sent one by one,
and counted as sent only where the mark is there. A run that is still going on, or whose upload broke off, is sent
row by row from `metrics.jsonl` instead: the server says which rows it has, so that none can arrive twice.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_transformer.config import WandbConfig, load_config
from dist_transformer.errors import UserError
from dist_transformer.tracking.feed import Report
from dist_transformer.tracking.ids import TrackingIds, read_ids
from dist_transformer.tracking.wandb_log import (
    cut_torn,
    has_header,
    is_uploaded,
    last_step,
    marker_of,
    wandb_files,
)
from dist_transformer.tracking.wandb_server import ask_server
from dist_transformer.tracking.wandb_sink import WandbSink

_STATE = "sync.json"
_EVERY_STEP = 1 << 62
_MAX_ROUNDS = 5
LIVE_S = 120.0
"""A log written to more recently belongs to a process that still runs: wandb notes system figures every 15 s."""


@dataclass(frozen=True)
class Synced:
    """What was done for one run."""

    run_dir: Path
    n_logs: int = 0
    """Logs that were sent whole."""
    n_rows: int = 0
    """Rows that were sent one by one."""
    is_live: bool = False
    """Whether a process still writes."""
    problem: str = ""
    """Why something is left; empty where nothing is."""

    def describe(self) -> str:
        """One line for a person."""
        did = [f"{self.n_logs} log(s) uploaded"] if self.n_logs else []
        did += [f"{self.n_rows:,} rows sent"] if self.n_rows else []
        text = ", ".join(did) or "nothing to upload"
        if self.is_live:
            text += "; the run is still being written"
        return f"{self.run_dir}: {text}{f'; LEFT: {self.problem}' if self.problem else ''}"


def sync_runs(run_dirs: Sequence[Path], report: Report, watch_s: float | None = None) -> None:
    """Upload the runs and say what was done; with `watch_s`, again and again, live runs too.

    Raises:
        UserError: if there is no server, or something could not be uploaded.
    """
    _check_server()
    shown: dict[Path, str] = {}
    while True:
        results = [sync_run(run_dir, report, live_too=watch_s is not None) for run_dir in run_dirs]
        for result in results:
            line = result.describe()
            if watch_s is None or result.n_logs or result.n_rows or line != shown.get(result.run_dir):
                report(line)
            shown[result.run_dir] = line
        if watch_s is None:
            break
        time.sleep(watch_s)
    n_left = sum(bool(result.problem) for result in results)
    if n_left:
        raise UserError(f"{n_left} of {len(results)} run(s) could not be uploaded whole: see above")


def sync_run(run_dir: Path, report: Report, live_too: bool = False) -> Synced:
    """Upload one run as far as it is not on the server.

    Raises:
        UserError: if there is no run.
    """
    run_dir = run_dir.resolve()
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no run directory there")
    logs = [path for path in wandb_files(run_dir) if not is_uploaded(path)]
    is_live = any(_is_live(path) for path in wandb_files(run_dir))
    try:
        if (is_live and live_too) or _by_rows(run_dir):
            _remember(run_dir, by_rows=True)
            return Synced(run_dir, n_rows=_send_rows(run_dir, logs, is_live, report), is_live=is_live)
        return _send_logs(run_dir, [path for path in logs if not _is_live(path)], is_live, report)
    except (OSError, RuntimeError) as error:
        return Synced(run_dir, is_live=is_live, problem=" ".join(str(error).split())[:300])


def _send_logs(run_dir: Path, logs: Sequence[Path], is_live: bool, report: Report) -> Synced:
    """Whole logs, oldest first: a row's number must not fall on the server."""
    n_sent = 0
    for path in logs:
        if not has_header(path) or last_step(path, look_back=1 << 62) is None:
            _quarantine(path, run_dir, report)
            continue
        if n_bytes := cut_torn(path):
            report(f"{path}: {n_bytes:,} bytes of a record that a crash cut off were removed")
        # Should this process be killed meanwhile, the next one must not send the whole log again.
        _remember(run_dir, by_rows=True)
        problem = _wandb_sync(path)
        if problem:
            return Synced(run_dir, n_sent, is_live=is_live, problem=f"{path.parent.name}: {problem}")
        _remember(run_dir, by_rows=False)
        n_sent += 1
    return Synced(run_dir, n_sent, is_live=is_live)


def _wandb_sync(path: Path) -> str:
    """Run `wandb sync` on one log; what went wrong, empty where the mark is there."""
    environment = {
        key: value for key, value in os.environ.items() if key not in ("WANDB_MODE", "WANDB_SERVICE")
    }
    # wandb keeps logs and caches in the home directory otherwise.
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        environment.setdefault(name, str(path.parent.parent / name.split("_")[1].lower()))
    command = [sys.executable, "-m", "wandb", "sync", "--yes", str(path.parent)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=1800, env=environment, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return "wandb sync did not end within 30 minutes"
    if marker_of(path).exists():
        return ""
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return f"wandb sync did not finish it: {said[-1].strip() if said else f'exit code {done.returncode}'}"


def _send_rows(run_dir: Path, logs: Sequence[Path], is_live: bool, report: Report) -> int:
    """Rows that the server has not got, from `metrics.jsonl`; how many that were."""
    ids = read_ids(run_dir)
    if ids is None:
        raise RuntimeError("tracking.json is missing or damaged: the run's id is not known")
    wandb, config = _config_of(run_dir, ids)
    n_sent = 0
    for _ in range(_MAX_ROUNDS):
        sink = WandbSink(wandb, ids, run_dir, config, report, resumed_step=_EVERY_STEP)
        n_rows = sink.send_missing()
        n_sent += n_rows
        # The server is asked again what it has, until it has everything; of a live run there is always more.
        if not n_rows or is_live:
            # The run's next start must know that these rows cannot be taken back.
            for path in logs:
                marker_of(path).touch()
            return n_sent
    raise RuntimeError("the server does not keep up: the next sync goes on from here")


def _quarantine(path: Path, run_dir: Path, report: Report) -> None:
    """A log without any row: nothing is lost by setting it aside, and `wandb sync` stumbles over it."""
    target = run_dir / "wandb" / "empty" / path.parent.name
    target.parent.mkdir(exist_ok=True)
    path.parent.replace(target)
    report(f"{path.parent.name}: no row in it (its process died at once): set aside in {target.parent}")


def _is_live(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime < LIVE_S
    return False


def _by_rows(run_dir: Path) -> bool:
    """Whether this run has been sent row by row, or an upload broke off."""
    try:
        return bool(json.loads((run_dir / "wandb" / _STATE).read_text(encoding="utf-8"))["by_rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _remember(run_dir: Path, by_rows: bool) -> None:
    path = run_dir / "wandb" / _STATE
    beside = path.with_name(f".{_STATE}.{os.getpid()}")
    beside.write_text(json.dumps({"by_rows": by_rows}), encoding="utf-8")
    beside.replace(path)


def _config_of(run_dir: Path, ids: TrackingIds) -> tuple[WandbConfig, Mapping[str, Any]]:
    """How the run wants to be shown; without its configuration, under its folder's name."""
    try:
        config = load_config(run_dir / "config.yaml")
    except UserError:
        return WandbConfig(mode="online", project=ids.wandb_project), {}
    wandb = config.tracking.wandb.model_copy(update={"mode": "online"})
    return wandb, config.model_dump(mode="json")


def _check_server() -> None:
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        settings = wandb.setup().settings
        answer = ask_server(settings.base_url, settings.api_key, timeout=10.0)
    finally:
        wandb.teardown()
    if not answer.usable:
        raise UserError(f"nothing was uploaded: {answer.reason}")
