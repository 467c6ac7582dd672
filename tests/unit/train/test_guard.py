"""How a wish to stop gets about among ranks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dist_transformer.config import build_config
from dist_transformer.tracking.startup import StartClock
from dist_transformer.tracking.switches import STOP_NAME, ask_to_stop
from dist_transformer.train import guard as guard_module
from dist_transformer.train.guard import Guard


def guards(run_dir: Path, world_size: int) -> list[Guard]:
    """One for each rank; rank zero alone has a dashboard."""
    config = build_config(
        {
            "run": {"dir": str(run_dir)},
            "data": {"train": "unused"},
            "train": {"steps": 9},
        }
    )

    def guard(rank: int) -> Guard:
        mesh: Any = SimpleNamespace(world_size=world_size, rank=rank, is_rank_zero=rank == 0)
        log = SimpleNamespace(stop_requested=False) if rank == 0 else None
        signals: Any = SimpleNamespace(received=None)
        return Guard(config, mesh, cast("Any", SimpleNamespace(log=log)), signals, 0, StartClock())

    return [guard(rank) for rank in range(world_size)]


@pytest.fixture(autouse=True)
def _look_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "_SWITCH_INTERVAL_S", -1.0)


def test_rank_zero_hands_on_what_the_dashboard_wants(tmp_path: Path) -> None:
    zero, one = guards(tmp_path, 2)
    assert not (zero.stop_is_known or one.stop_is_known or zero.stop_requested)
    cast("Any", zero.outlets.log).stop_requested = True
    assert zero.stop_requested
    assert not one.stop_is_known  # nobody has told it
    assert zero.stop_is_known
    assert one.stop_is_known
    assert (zero.why_stopped(), one.why_stopped()) == ("the dashboard", f"the file {STOP_NAME}")


def test_one_rank_tells_nobody(tmp_path: Path) -> None:
    (alone,) = guards(tmp_path, 1)
    cast("Any", alone.outlets.log).stop_requested = True
    assert alone.stop_is_known
    assert not (tmp_path / STOP_NAME).exists()


def test_every_rank_looks_for_the_file_while_texts_are_decoded(tmp_path: Path) -> None:
    zero, one = guards(tmp_path, 2)
    ask_to_stop(tmp_path)
    assert not one.stop_requested  # between steps rank zero looks for all
    assert zero.stop_requested and zero.stop_is_known and one.stop_is_known


def test_a_signal_is_known_where_it_came(tmp_path: Path) -> None:
    zero, one = guards(tmp_path, 2)
    one.signals.received = "SIGUSR1"
    assert one.stop_is_known and not zero.stop_is_known
    assert (one.why_stopped(), zero.why_stopped()) == ("SIGUSR1", "another rank")
