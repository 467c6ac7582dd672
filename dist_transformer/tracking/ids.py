"""`tracking.json`: the dashboard ids of a run, created once and kept for all its restarts."""

import json
import os
import re
import secrets
import string
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from dist_transformer.tracking.feed import Report

FILE_NAME = "tracking.json"

_RUN_ID = re.compile(r"[A-Za-z0-9_-]{4,64}")
_RUN_FOLDER = re.compile(r"(?:offline-)?run-\d{8}_\d{6}-(?P<run_id>[A-Za-z0-9_]{4,64})(?:-\d+)?")


@dataclass(frozen=True)
class TrackingIds:
    """What ties a run directory to its dashboard run."""

    wandb_run_id: str
    """Random, created once: never derived from a job's id, which changes when a job is requeued."""
    wandb_project: str
    """The project in which the run was created."""


def load_or_create_ids(run_dir: Path, project: str, report: Report) -> TrackingIds:
    """The ids of `run_dir`: read where it has them, else created and written.

    A damaged file is kept as `tracking.json.damaged`; the run id is then taken from the W&B folders in the
    run directory where there are any, so that the dashboard run goes on.
    """
    path = run_dir / FILE_NAME
    try:
        ids = _read(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        report(
            f"{path} cannot be read ({error.strerror or error}): this start gets a dashboard run of its own"
        )
        return TrackingIds(_new_run_id(), project)
    except ValueError as error:
        kept = _set_aside(path)
        origin = "the run id was found in wandb/" if _run_id_in_folders(run_dir) else "a new run id is made"
        report(f"{path} is damaged ({error}): {origin}; the damaged file is kept as {kept}")
    else:
        if ids.wandb_project != project:
            report(
                f"{path} belongs to the W&B project {ids.wandb_project}, not {project}: the run stays there; "
                "a new run directory starts a run in another project"
            )
        return ids
    found = _run_id_in_folders(run_dir)
    ids = TrackingIds(found or _new_run_id(), project)
    try:
        _write(path, ids)
    except OSError as error:
        report(f"{path} cannot be written ({error.strerror or error}): a restart gets another dashboard run")
    return ids


def read_ids(run_dir: Path) -> TrackingIds | None:
    """The ids of a run, None where the file is missing or damaged."""
    try:
        return _read(run_dir / FILE_NAME)
    except (OSError, ValueError):
        return None


def _read(path: Path) -> TrackingIds:
    """Parse the file; raises ValueError saying what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError("it is not JSON") from error
    wandb = content.get("wandb") if isinstance(content, dict) else None
    if not isinstance(wandb, dict):
        raise ValueError("it has no wandb section")
    run_id, project = wandb.get("run_id"), wandb.get("project")
    if not isinstance(run_id, str) or not _RUN_ID.fullmatch(run_id):
        raise ValueError("wandb.run_id is missing or no valid id")
    if not isinstance(project, str) or not project:
        raise ValueError("wandb.project is missing")
    return TrackingIds(run_id, project)


def _write(path: Path, ids: TrackingIds) -> None:
    """Make the file visible only when it is whole and on disk."""
    content = {
        "version": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "wandb": {"run_id": ids.wandb_run_id, "project": ids.wandb_project},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(prefix=f".{FILE_NAME}.", dir=path.parent)
    beside = Path(name)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            os.fchmod(fd, 0o644)
            file.write(json.dumps(content, indent=2) + "\n")
            file.flush()
            os.fsync(fd)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _set_aside(path: Path) -> str:
    """Rename a damaged file to a name that is free; the name."""
    target = path.with_name(f"{FILE_NAME}.damaged")
    number = 2
    while target.exists():
        target = path.with_name(f"{FILE_NAME}.damaged-{number}")
        number += 1
    try:
        path.replace(target)
    except OSError:
        return path.name
    return target.name


def _run_id_in_folders(run_dir: Path) -> str | None:
    """The run id that the newest W&B folder of the run directory was written with."""
    matches = [
        match
        for folder in (run_dir / "wandb").glob("*run-*")
        if (match := _RUN_FOLDER.fullmatch(folder.name))
    ]
    newest = max(matches, key=lambda match: match.string.removeprefix("offline-"), default=None)
    return newest["run_id"] if newest else None


def _new_run_id() -> str:
    alphabet = string.ascii_lowercase + string.digits
    return "".join(secrets.choice(alphabet) for _ in range(12))
