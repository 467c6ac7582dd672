"""W&B with a server: the real client against a stand-in backend, and all the ways in which there is none."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_transformer.config import TrackingConfig, WandbConfig
from dist_transformer.tracking import MetricsLog, build_sinks, read_metrics
from dist_transformer.tracking.wandb_log import history, wandb_files
from dist_transformer.tracking.wandb_server import ask_server, find_api_key
from dist_transformer.tracking.wandb_sink import core_pid
from tests.tools.fake_wandb import FakeWandb

pytestmark = pytest.mark.usefixtures("clean_wandb")
AUTO = TrackingConfig(wandb=WandbConfig(mode="auto", project="unit"))
KEY = "k" * 40


@pytest.fixture
def server(clean_wandb: None) -> Iterator[FakeWandb]:
    fake = FakeWandb().start()
    os.environ.update(WANDB_BASE_URL=fake.url, WANDB_API_KEY=KEY)
    yield fake
    fake.stop()


def run_id(run_dir: Path) -> str:
    return str(json.loads((run_dir / "tracking.json").read_text())["wandb"]["run_id"])


def log_steps(
    run_dir: Path, steps: range, tracking: TrackingConfig = AUTO, **close: Any
) -> tuple[list[str], list[str]]:
    """One process's worth of a run; what was said, and where it can be seen."""
    said: list[str] = []
    sinks = build_sinks(tracking, run_dir, {"seed": 1}, said.append)
    log = MetricsLog(run_dir, sinks, said.append, open_timeout=60)
    for step in steps:
        log.log("train", step, {"train/loss": 1.0, "trainer/tokens_seen": step * 10})
    log.log("alert", steps[-1], {"alert/kind": "spike"})
    where = log.where()
    assert not log.stop_requested
    assert log.close(timeout=30, **close), said
    return said, where


def test_online_rows_arrive_once_over_restarts_with_replayed_steps(
    server: FakeWandb, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said, where = log_steps(tmp_path, range(20), exit_code=143, preempted=True)
    run = server.state.runs[run_id(tmp_path)]
    assert (run.complete, run.exitcode, run.preempting) == (True, 143, True)
    assert log_steps(tmp_path, range(10, 40))[0] == said == []
    assert len(server.state.runs) == 1
    assert [row["trainer/step"] for row in run.history] == [*range(20), 19, *range(10, 40), 39]
    assert [row["_step"] for row in run.history] == list(range(52))
    assert run.about["displayName"] == tmp_path.name and run.config["seed"]["value"] == 1
    assert len(server.state.alerts) == 2 and run.exitcode == 0
    assert where == [f"W&B run: {server.url}/someteam/unit/runs/{run_id(tmp_path)}"]
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""


def test_a_helper_killed_online_costs_no_row(server: FakeWandb, tmp_path: Path) -> None:
    said: list[str] = []
    log = MetricsLog(tmp_path, build_sinks(AUTO, tmp_path, {}, said.append), said.append)
    for step in range(100):
        log.log("train", step, {"train/loss": 1.0})
        if step == 60:
            time.sleep(0.5)
            helper = core_pid()
            assert helper is not None
            os.kill(helper, signal.SIGKILL)
    assert log.close(timeout=30), said
    run = server.state.runs[run_id(tmp_path)]
    assert [row["trainer/step"] for row in run.history] == list(range(100))
    assert run.exitcode == 0 and len(said) == 1 and "goes on: W&B run: http" in said[0]


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_an_unreachable_server_means_offline_within_seconds(tmp_path: Path) -> None:
    os.environ.update(WANDB_BASE_URL=closed_port(), WANDB_API_KEY=KEY)
    started = time.monotonic()
    said, (where,) = log_steps(tmp_path, range(5))
    assert time.monotonic() - started < 10
    assert said == [] and "Connection refused" in where and "track sync" in where
    (file,) = wandb_files(tmp_path)
    assert len(history(file)) == 6


def test_asking_for_online_and_not_getting_it_is_said(server: FakeWandb, tmp_path: Path) -> None:
    server.state.fault = lambda path, operation, body: (503, {"error": "down"})
    said, (where,) = log_steps(tmp_path, range(5), TrackingConfig(wandb=WandbConfig(mode="online")))
    assert said == [f"W&B goes on offline: {server.url} answered 503 Service Unavailable"]
    assert "offline run" in where and len(history(wandb_files(tmp_path)[0])) == 6


def test_a_server_that_fails_after_the_question_means_offline_with_the_same_id(
    server: FakeWandb, tmp_path: Path
) -> None:
    def refuse_the_run(
        path: str, operation: str | None, body: dict[str, Any]
    ) -> tuple[int, dict[str, Any]] | None:
        return (403, {"errors": [{"message": "permission denied"}]}) if operation == "UpsertBucket" else None

    server.state.fault = refuse_the_run
    _, (where,) = log_steps(tmp_path, range(5))
    assert "going online failed" in where and "permission denied" in where
    offline = [file for file in wandb_files(tmp_path) if "offline" in file.parent.name]
    assert len(offline) == 1 and run_id(tmp_path) in offline[0].name and len(history(offline[0])) == 6


def test_a_connection_lost_in_mid_run_stops_nothing(server: FakeWandb, tmp_path: Path) -> None:
    said: list[str] = []
    log = MetricsLog(tmp_path, build_sinks(AUTO, tmp_path, {}, said.append), said.append)
    log.log("train", 0, {"train/loss": 1.0})
    server.state.fault = lambda path, operation, body: "drop"
    slowest = 0.0
    for step in range(1, 500):
        started = time.perf_counter()
        log.log("train", step, {"train/loss": 1.0})
        slowest = max(slowest, time.perf_counter() - started)
    started = time.monotonic()
    assert not log.close(timeout=2.0)
    assert time.monotonic() - started < 5 and slowest < 0.5
    assert len(read_metrics(tmp_path)) == 500
    # The transaction log of the online run has them too, for `wandb sync`.
    assert len(history(wandb_files(tmp_path)[0])) == 500


@pytest.mark.parametrize("mode", ["auto", "online"])
@pytest.mark.parametrize("outcome", [(401, {}), (503, {}), "hang", "drop"])
def test_a_run_is_whole_whatever_the_server_does(
    server: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any, outcome: Any
) -> None:
    """Nothing raises, nothing is asked of the person; all rows are in JSONL and in a local log that can be synced."""
    monkeypatch.setattr("dist_transformer.tracking.wandb_server._PATIENCE", {"auto": 0.5, "online": 1.0})
    server.state.fault = lambda path, operation, body: outcome
    said, (where,) = log_steps(tmp_path, range(30), TrackingConfig(wandb=WandbConfig(mode=mode)))
    assert len(said) == (mode == "online")
    assert "offline run" in where and "track sync" in where
    assert [row["step"] for row in read_metrics(tmp_path)] == [*range(30), 29]
    (file,) = wandb_files(tmp_path)
    assert [row["trainer/step"] for row in history(file)] == [*range(30), 29]


def test_the_stop_button_is_passed_on(
    server: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wandb.sdk.lib.run_stopping import RunStopChecker

    # wandb asks its helper every 15 s, and that the server every 15 s, from the start on.
    monkeypatch.setitem(RunStopChecker.__init__.__kwdefaults__, "poll_interval", 0.2)
    server.state.stop = True
    log = MetricsLog(tmp_path, build_sinks(AUTO, tmp_path, {}))
    log.log("train", 0, {"train/loss": 1.0})
    until = time.monotonic() + 40
    while not log.stop_requested and time.monotonic() < until:
        time.sleep(0.05)
    assert log.stop_requested
    assert log.close(timeout=30) and len(read_metrics(tmp_path)) == 1


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        ((401, {}), "refused the API key"),
        ((200, {"data": {"viewer": None}}), "does not know the API key"),
        ((200, {"hello": "login page"}), "did not answer as a W&B server"),
        ((503, {}), "answered 503"),
        ("drop", "cannot be reached"),
        ("hang", "did not answer within 1 s"),
    ],
)
def test_each_bad_answer_is_told_apart_in_time(server: FakeWandb, outcome: Any, reason: str) -> None:
    server.state.fault = lambda path, operation, body: outcome
    started = time.monotonic()
    answer = ask_server(server.url, timeout=1.0)
    assert not answer.usable and reason in answer.reason
    assert time.monotonic() - started < 2


def test_a_page_that_is_not_json_and_an_address_that_is_none_are_no_servers(tmp_path: Path) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def greet() -> None:
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>")
        connection.close()

    threading.Thread(target=greet, daemon=True).start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    assert "proxy or login page" in ask_server(url, KEY).reason
    listener.close()
    for nonsense in ("", "no scheme", "http://[::1"):
        assert not ask_server(nonsense, KEY).usable


def test_the_key_comes_from_the_environment_or_the_netrc_file(tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    netrc.chmod(0o600)
    environment = {"NETRC": str(netrc)}
    assert find_api_key("https://api.wandb.ai", environment) == "secret"
    assert find_api_key("https://other.example", environment) is None
    assert find_api_key("https://api.wandb.ai", {**environment, "WANDB_API_KEY": "first"}) == "first"
    netrc.write_text("garbage {{{")
    assert find_api_key("https://api.wandb.ai", environment) is None
    assert 'run "wandb login"' in ask_server("https://api.wandb.ai", environment=environment).reason
