"""Time accounts, goodput over restarts, the peak of a device."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_transformer.tracking import peak
from dist_transformer.tracking.accounts import ACCOUNTS, Goodput, TimeAccounts, process_age_s


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_every_moment_belongs_to_the_innermost_account() -> None:
    clock = Clock()
    accounts = TimeAccounts(clock, age_s=2.0)
    clock.now += 1  # other
    with accounts.spend("compute"):
        clock.now += 10
        with accounts.spend("communication", only_in="compute"):
            clock.now += 3
        clock.now += 1
    with accounts.spend("evaluation"):
        with accounts.spend("communication", only_in="compute"):
            clock.now += 5  # evaluating, whatever it waits for
        assert accounts.current == "evaluation"
    with pytest.raises(ValueError, match="bad"), accounts.spend("input"):
        clock.now += 7
        raise ValueError("bad")
    clock.now += 1
    totals = accounts.totals()
    assert totals == {
        "compute": 11, "communication": 3, "input": 7, "checkpoint": 0, "evaluation": 5, "other": 4,
    }  # fmt: skip
    assert tuple(totals) == ACCOUNTS
    assert sum(totals.values()) == 2 + (clock.now - 100)


def test_a_thread_that_leaves_late_does_not_mix_up_the_accounts() -> None:
    clock = Clock()
    accounts = TimeAccounts(clock, age_s=0.0)
    inside, leave = threading.Event(), threading.Event()

    def other_thread() -> None:
        with accounts.spend("communication"):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other_thread)
    with accounts.spend("compute"):
        thread.start()
        assert inside.wait(10)
        clock.now += 2
    leave.set()
    thread.join(10)
    clock.now += 1
    assert accounts.totals()["communication"] == 2
    assert accounts.totals()["other"] == 1 and accounts.current == "other"


def test_this_process_has_an_age() -> None:
    assert 0 < process_age_s() < 24 * 3600


def row(step: int, time_: float, wall: float, productive: float, restarts: int) -> dict[str, Any]:
    return {
        "event": "train", "step": step, "time": time_, "time/wall_s": wall, "time/productive_s": productive,
        "trainer/restarts": restarts,
    }  # fmt: skip


def totals(productive: float, other: float) -> dict[str, float]:
    return {**dict.fromkeys(ACCOUNTS, 0.0), "compute": productive, "other": other}


def test_goodput_forgets_what_a_crash_threw_away() -> None:
    """Started at 1000; trained 60 s for 30 steps, of which a checkpoint kept 20; down until 1200."""
    before = [row(10, 1040.0, 40.0, 20.0, 0), row(20, 1060.0, 60.0, 40.0, 0), row(30, 1080.0, 80.0, 60.0, 0)]
    goodput = Goodput(before, resumed_step=20, started=1200.0)
    assert goodput.n_lost_steps == 10
    assert goodput.productive_s(totals(0.0, 10.0)) == 40.0
    assert goodput.pct(totals(0.0, 10.0), now=1210.0) == pytest.approx(100 * 40 / 210)
    assert goodput.pct(totals(20.0, 10.0), now=1230.0) == pytest.approx(100 * 60 / 230)
    # A third process: the rows of the second go on from 40, not from 60.
    before += [row(30, 1230.0, 30.0, 60.0, 1)]
    assert Goodput(before, 30, 1300.0).pct(totals(0.0, 0.0), now=1300.0) == pytest.approx(100 * 60 / 300)
    # Back to the beginning: nothing of it counts.
    assert Goodput(before, 0, 1300.0).pct(totals(0.0, 0.0), now=1300.0) == 0.0


def test_goodput_of_a_first_start_and_of_old_rows() -> None:
    assert Goodput([], 0, 50.0).pct(totals(5.0, 5.0), now=60.0) == 50.0
    old = [{"event": "train", "step": 5, "time": 10.0}]
    assert Goodput(old, 5, 50.0).pct(totals(5.0, 5.0), now=60.0) == 50.0


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0, 19.5),
        ("NVIDIA H100 80GB HBM3", 989.4, 67.0),
        ("NVIDIA H100 PCIe", 756.4, 51.0),
        ("NVIDIA GH200 480GB", 989.4, 67.0),
        ("NVIDIA H200", 989.4, 67.0),
        ("NVIDIA B200", 2250.0, 75.0),
        ("NVIDIA GB200", 2500.0, 80.0),
        ("NVIDIA A10G", 70.0, 35.0),
        ("NVIDIA L40S", 362.0, 91.6),
        ("NVIDIA L4", 121.0, 30.3),
    ],
)
def test_peaks_of_gpus(name: str, bf16: float, fp32: float) -> None:
    """Longer names before shorter ones: no GB200 is taken for a B200."""
    for dtype, tflops in ((torch.bfloat16, bf16), (torch.float32, fp32)):
        found = peak.table_peak(name, dtype)
        assert found is not None and found.flops_per_s == tflops * 1e12
    assert peak.table_peak("NVIDIA GeForce 256", torch.bfloat16) is None


def test_a_measured_peak_is_kept_and_never_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(peak, "_SECONDS", 0.02)
    cpu = torch.device("cpu")
    measured = peak.device_peak(cpu, torch.float32)
    assert 1e8 < measured.flops_per_s < 1e14 and measured.source.startswith("measured on ")
    assert peak.cache_file().is_relative_to(tmp_path)
    monkeypatch.setattr(peak, "_measure", lambda *_: 1.0)
    assert peak.device_peak(cpu, torch.float32).flops_per_s == measured.flops_per_s
    assert peak.device_peak(cpu, torch.bfloat16).flops_per_s == 1.0
    monkeypatch.setattr(peak, "_measure", lambda *_: 1e15)
    assert peak.device_peak(cpu, torch.float32).flops_per_s == 1e15
    assert peak.device_peak(cpu, torch.float32, given_tflops=2.5).flops_per_s == 2.5e12
    # A damaged cache and a folder that cannot be written cost a measurement.
    peak.cache_file().write_text("[not what we wrote")
    assert peak.device_peak(cpu, torch.float32).flops_per_s == 1e15
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert peak.device_peak(cpu, torch.float32).flops_per_s == 1e15
