"""Traced steps: which ones, and what is written about them."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_transformer.config import ProfileConfig
from dist_transformer.tracking.accounts import TimeAccounts
from dist_transformer.train.profiling import Profiling, as_table, summarize

CPU_RANK_0: Any = SimpleNamespace(rank=0, device=torch.device("cpu"))


def run(profiling: Profiling, accounts: TimeAccounts, steps: range, fail_at: int | None = None) -> None:
    a = torch.randn(64, 64)
    for step in steps:
        with profiling.step(step):
            with accounts.spend("input"):
                b = torch.randn(64, 64)
            with accounts.spend("compute"):
                for _ in range(20):
                    a = (a @ b).tanh()
            if step == fail_at:
                raise ValueError("the step failed")


def build(run_dir: Path, **fields: Any) -> tuple[Profiling, TimeAccounts, list[str]]:
    said: list[str] = []
    accounts = TimeAccounts()
    return Profiling(ProfileConfig(**fields), run_dir, CPU_RANK_0, accounts, said.append), accounts, said


def test_the_steps_asked_for_are_traced(tmp_path: Path) -> None:
    profiling, accounts, said = build(tmp_path, steps=(3, 5))
    run(profiling, accounts, range(1, 9))
    folder = tmp_path / "profile"
    assert sorted(path.name for path in folder.iterdir()) == [
        "rank0-steps3-5.json.gz",
        "rank0-steps3-5.summary.json",
        "rank0-steps3-5.txt",
    ]
    with gzip.open(folder / "rank0-steps3-5.json.gz", "rt") as file:
        trace = json.load(file)
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"step 3", "step 4", "step 5", "aten::mm"} <= names and not {"step 2", "step 6"} & names
    summary = json.loads((folder / "rank0-steps3-5.summary.json").read_text())
    assert summary["steps"] == 3 and 1 < len(summary["operators"]) <= 10
    calls = {entry["name"]: entry["calls_per_step"] for entry in summary["operators"]}
    assert calls["aten::mm"] == 20
    shares = [entry["share_pct"] for entry in summary["operators"]]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100.001
    assert set(summary["seconds_per_step"]) == {"compute", "communication", "input"}
    assert summary["seconds_per_step"]["compute"] > summary["seconds_per_step"]["communication"] == 0
    table = (folder / "rank0-steps3-5.txt").read_text()
    assert "aten::mm" in table and "compute" in table
    assert len(said) == 1 and "profile of steps 3 to 5" in said[0]


@pytest.mark.parametrize("fields", [{}, {"steps": (3, 4), "ranks": (1,)}])
def test_others_are_not(tmp_path: Path, fields: dict[str, Any]) -> None:
    profiling, accounts, said = build(tmp_path, **fields)
    run(profiling, accounts, range(1, 6))
    assert not (tmp_path / "profile").exists() and said == []


def test_a_run_that_goes_on_in_the_middle_traces_the_rest(tmp_path: Path) -> None:
    profiling, accounts, _ = build(tmp_path, steps=(3, 5))
    run(profiling, accounts, range(4, 9))
    assert (tmp_path / "profile" / "rank0-steps4-5.json.gz").exists()


def test_a_step_that_fails_leaves_its_trace(tmp_path: Path) -> None:
    profiling, accounts, _ = build(tmp_path, steps=(2, 50))
    with pytest.raises(ValueError, match="the step failed"):
        run(profiling, accounts, range(1, 9), fail_at=4)
    assert (tmp_path / "profile" / "rank0-steps2-4.json.gz").exists()


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    profiling, accounts, said = build(tmp_path, steps=(1, 2))
    run(profiling, accounts, range(1, 5))
    assert len(said) == 1 and "could not be written" in said[0]


def test_on_a_gpu_kernels_tell_what_communication_takes() -> None:
    """The host does not wait for NCCL; its kernels are counted instead."""

    def event(name: str, device_us: float) -> SimpleNamespace:
        return SimpleNamespace(key=name, count=4, self_device_time_total=device_us, self_cpu_time_total=9e9)

    events = [event("aten::mm", 6e6), event("ncclDevKernel_AllReduce", 2e6), event("step 1", 8e6)]
    summary = summarize(events, {"compute": 99.0, "communication": 0.0, "input": 0.5}, n_steps=2)
    assert summary["time_of"] == "device"
    assert summary["seconds_per_step"] == {"compute": 3.0, "communication": 1.0, "input": 0.25}
    assert [entry["name"] for entry in summary["operators"]] == ["aten::mm", "ncclDevKernel_AllReduce"]
    assert summary["operators"][0]["share_pct"] == 75.0
    assert "ncclDevKernel_AllReduce" in as_table(summary)
