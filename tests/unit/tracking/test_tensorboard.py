"""TensorBoard: refused in a sentence where it is not installed, event files where it is."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from dist_transformer.config import TrackingConfig, WandbConfig
from dist_transformer.errors import ConfigError
from dist_transformer.tracking import MetricsLog, build_sinks, check_tracking
from dist_transformer.tracking.tensorboard_sink import TensorBoardSink

TENSORBOARD = TrackingConfig(tensorboard=True, wandb=WandbConfig(mode="disabled"))


def test_its_absence_is_a_configuration_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name)
    )
    with pytest.raises(ConfigError, match=r"pip install tensorboard.*or set tracking.tensorboard=false"):
        check_tracking(TENSORBOARD)
    with pytest.raises(ConfigError):
        build_sinks(TENSORBOARD, tmp_path, {})


class RecordingWriter:
    """Stands where SummaryWriter does; the event file's own format is TensorBoard's business."""

    made: "list[RecordingWriter]" = []

    def __init__(self, folder: str, purge_step: int | None, flush_secs: int) -> None:
        self.purge_step, self.scalars, self.texts, self.closed = purge_step, list[Any](), list[Any](), False
        (Path(folder) / f"events{len(self.made)}").write_text("")
        self.made.append(self)

    def add_scalar(self, key: str, value: float, step: int, walltime: float) -> None:
        self.scalars.append((key, value, step))

    def add_text(self, key: str, text: str, step: int, walltime: float) -> None:
        self.texts.append((key, text, step))

    def close(self) -> None:
        self.closed = True


def test_scalars_lie_over_the_step_and_a_restart_hides_what_it_replays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    class Module:
        SummaryWriter = RecordingWriter

    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", Module)
    RecordingWriter.made = []
    for first in (1, 3):
        log = MetricsLog(tmp_path, [TensorBoardSink(tmp_path)])
        for step in range(first, first + 4):
            log.log("train", step, {"train/loss": 1.0 / step, "data/fingerprint": "ab"})
        log.log("alert", first + 4, {"alert/kind": "spike"})
        assert log.close() and "tensorboard --logdir" in log.where()[0]
    one, two = RecordingWriter.made
    assert (one.purge_step, two.purge_step) == (None, 3) and one.closed and two.closed
    assert [entry for entry in two.scalars if entry[0] == "train/loss"] == [
        ("train/loss", 1.0 / step, step) for step in range(3, 7)
    ]
    assert all(isinstance(value, int | float) for _, value, _ in one.scalars)
    assert one.texts == [("alert", "trainer/restarts=0, alert/kind=spike", 5)]


def test_real_event_files_can_be_read_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the optional package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, build_sinks(TENSORBOARD, tmp_path, {}))
    for step in range(1, 6):
        log.log("train", step, {"train/loss": 1.0 / step})
    assert log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (step, pytest.approx(1.0 / step)) for step in range(1, 6)
    ]
