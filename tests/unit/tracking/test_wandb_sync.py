"""`track sync`: whatever a run without a network left behind, every row arrives, and once."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_transformer import cli
from dist_transformer.tracking import read_metrics
from dist_transformer.tracking.wandb_log import find_tail, is_uploaded, last_step, wandb_files
from dist_transformer.tracking.wandb_sync import Synced, sync_run
from tests.tools.fake_wandb import FakeWandb
from tests.unit.tracking.test_wandb_restarts import _PROCESS, train

pytestmark = pytest.mark.usefixtures("clean_wandb")


@pytest.fixture
def server(clean_wandb: None) -> Iterator[FakeWandb]:
    fake = FakeWandb().start()
    os.environ.update(WANDB_BASE_URL=fake.url, WANDB_API_KEY="k" * 40)
    yield fake
    fake.stop()


def offline(run_dir: Path, *arguments: Any, **keywords: Any) -> None:
    """A process without a network, whatever the environment says."""
    saved = {key: os.environ.pop(key) for key in ("WANDB_BASE_URL", "WANDB_API_KEY") if key in os.environ}
    train(run_dir, *arguments, **keywords)
    os.environ.update(saved)


def age(run_dir: Path) -> None:
    """As if the run had ended some time ago."""
    for path in wandb_files(run_dir):
        os.utime(path, (time.time() - 3600, time.time() - 3600))


def steps_on(server: FakeWandb) -> list[int]:
    (run,) = server.state.runs.values()
    return [row["trainer/step"] for row in run.history if "train/loss" in row]


def sync(run_dir: Path, **keywords: Any) -> tuple[Synced, list[str]]:
    said: list[str] = []
    return sync_run(run_dir, said.append, **keywords), said


def test_torn_tails_and_stubs_are_mended_and_nothing_is_sent_twice(
    server: FakeWandb, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    offline(tmp_path, 0, 10**6, kill_at=90)  # some seconds: wandb flushes once a second
    torn = wandb_files(tmp_path)[0]
    whole = find_tail(torn)
    torn.write_bytes(torn.read_bytes()[: whole.end] + b"\x12\x34\x56\x78\xff\x7f\x01half a record")
    kept = last_step(torn)
    assert kept is not None and find_tail(torn).n_torn_bytes > 0
    stub = tmp_path / "wandb" / "offline-run-20200101_000000-abcdefgh" / "run-abcdefgh.wandb"
    stub.parent.mkdir()
    stub.write_bytes(b":W&B\xe1\xbe\x00")
    age(tmp_path)

    assert cli.main(["track", "sync", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "1 log(s) uploaded" in said and "no row in it" in said and "cut off were removed" in said
    assert is_uploaded(torn) and not stub.parent.exists()
    first = steps_on(server)
    assert first == list(range(1, len(first) + 1)) and len(first) > 5

    assert cli.main(["track", "sync", str(tmp_path)]) == 0
    assert "nothing to upload" in capsys.readouterr().out
    assert steps_on(server) == first

    # The run goes on where there is no network: what the server has of lost steps is not drawn again.
    offline(tmp_path, 20, 120)
    age(tmp_path)
    assert cli.main(["track", "sync", str(tmp_path)]) == 0
    assert steps_on(server) == list(range(1, 121))
    assert len(server.state.runs) == 1


def test_an_upload_that_breaks_off_is_completed(server: FakeWandb, tmp_path: Path) -> None:
    offline(tmp_path, 0, 30)
    age(tmp_path)
    seen = 0

    def break_off(
        path: str, operation: str | None, body: dict[str, Any]
    ) -> tuple[int, dict[str, Any]] | None:
        """From the second batch of rows on, nothing is taken any more."""
        nonlocal seen
        if "file_stream" not in path:
            return None
        seen += "wandb-history.jsonl" in (body.get("files") or {})
        return (400, {"error": "broken"}) if seen > 1 else None

    server.state.fault = break_off
    (log,) = wandb_files(tmp_path)
    # `wandb sync` is killed in the middle: rows have arrived, no mark has been set.
    command = [sys.executable, "-m", "wandb", "sync", "--yes", str(log.parent)]
    (tmp_path / "wandb" / "sync.json").write_text('{"by_rows": true}')  # what we note before we begin
    subprocess.run(command, capture_output=True, timeout=60, check=False)
    marker = log.with_name(log.name + ".synced")
    marker.unlink(missing_ok=True)
    server.state.fault = None
    result, _ = sync(tmp_path)
    assert not result.problem
    assert steps_on(server) == list(range(1, 31))
    assert marker.exists()


def test_a_live_run_is_sent_row_by_row(server: FakeWandb, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    command = [sys.executable, "-c", _PROCESS, str(tmp_path), "offline", "0", "1000000", "0.05"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        while int(process.stdout.readline()) < 12:
            pass
        assert sync(tmp_path)[0] == Synced(tmp_path, is_live=True), (
            "without --watch, a live run is left alone"
        )
        result, _ = sync(tmp_path, live_too=True)
        assert result.is_live and result.n_rows >= 12
        first = steps_on(server)
        assert first == list(range(1, len(first) + 1)) and len(first) >= 12
        while int(process.stdout.readline()) < len(first) + 8:
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    sync(tmp_path, live_too=True)
    assert len(steps_on(server)) > len(first) + 5
    # Restarted from step 10 without a network; ended; uploaded.
    offline(tmp_path, 10, 60)
    age(tmp_path)
    result, _ = sync(tmp_path)
    assert not result.problem and not result.is_live
    n_steps = max(row["step"] for row in read_metrics(tmp_path))
    assert steps_on(server) == list(range(1, n_steps + 1))
    assert all(is_uploaded(path) for path in wandb_files(tmp_path))
    assert sync(tmp_path)[0].n_rows == 0


def test_what_cannot_be_uploaded_is_said(
    server: FakeWandb, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    offline(tmp_path, 0, 5)
    age(tmp_path)
    server.state.fault = lambda path, operation, body: (
        (403, {"errors": [{"message": "permission denied"}]}) if operation == "UpsertBucket" else None
    )
    assert cli.main(["track", "sync", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "LEFT:" in said.out and "could not be uploaded whole" in said.err
    server.state.fault = lambda path, operation, body: (401, {})
    assert cli.main(["track", "sync", str(tmp_path)]) == 1
    assert "nothing was uploaded" in capsys.readouterr().err
    assert cli.main(["track", "sync", str(tmp_path / "missing")]) == 1
    server.state.fault = None
    assert cli.main(["track", "sync", str(tmp_path)]) == 0
    assert steps_on(server) == [1, 2, 3, 4, 5]
