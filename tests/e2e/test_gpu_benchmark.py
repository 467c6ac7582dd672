"""benchmarks/gpu.py on a CPU with tiny shapes: every section gives figures or says why not, and none ends another."""

import json
import math
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_sections.__main__ import check_device
from benchmarks.gpu_sections.measure import Figures, search
from benchmarks.gpu_sections.plan import Section, Setting, chosen, plan
from benchmarks.gpu_sections.profile import ELEMENTWISE, busy_ns, group_of
from benchmarks.gpu_sections.report import targets, write_table
from benchmarks.gpu_sections.task import Task
from tests.e2e.conftest import ROOT, environment

PRESETS = ("modern_large", "t5_v1_1_large", "no_such_preset")
TRAINED = ("ours/modern_large/none", "ours/modern_large/selective", "ours/t5_v1_1_large/full")
PEERS = ("hf/t5_v1_1_large/plain", "hf/t5_v1_1_large/compile")
BROKEN = "ours/no_such_preset/full"
UNAVAILABLE = "ours/largest/full"
OTHERS = ("environment", "parity", "profile/modern_large", "attention/modern_large")
VOCAB = 512
Found = dict[str, Any]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one run leaves; one of its presets does not exist."""
    folder = tmp_path_factory.mktemp("gpu")
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--device",
        "cpu",
        "--tiny",
        "--out",
        str(folder / "out"),
    ]
    variables = {**environment(), "XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run(
        [*command, "--presets", *PRESETS],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert BROKEN in done.stdout
    return folder / "out"


@pytest.fixture(scope="module")
def results(out: Path) -> Found:
    """results.json."""
    content: Found = json.loads((out / "results.json").read_text())
    return content


def figures(results: Found, section: str) -> Found:
    """Of a section that went well."""
    found: Found = results["sections"][section]
    assert found["status"] == "ok", found
    return dict(found["figures"])


def test_a_section_that_fails_ends_no_other(results: Found) -> None:
    sections = results["sections"]
    assert set(sections) == {*TRAINED, *PEERS, *OTHERS, BROKEN, UNAVAILABLE, "tests"}
    ends = {name: section["status"] for name, section in sections.items()}
    assert ends.pop("tests") == "unavailable" and "CUDA" in sections["tests"]["reason"]
    assert ends.pop(BROKEN) == "failed"
    assert "no_such_preset is not a preset" in sections[BROKEN]["reason"]
    assert ends.pop(UNAVAILABLE) == "unavailable"
    assert "CUDA" in sections[UNAVAILABLE]["reason"]
    assert set(ends.values()) == {"ok"}, sections
    names = list(sections)
    assert names.index(BROKEN) < names.index(PEERS[0])  # others came after it


def test_the_device_is_described(results: Found) -> None:
    found = figures(results, "environment")
    assert found["peak_tflops"] > 0
    assert found["gemm_peak_tflops"] == max(found["gemm_tflops"].values()) > 0
    assert found["copy_gb_per_s"] > 0
    assert found["packages"]["deepspeed"]


@pytest.mark.parametrize("name", [*TRAINED, *PEERS])
def test_training_is_measured(results: Found, name: str) -> None:
    found, device = figures(results, name), figures(results, "environment")
    assert [size["rows"] for size in found["sizes"]] == [2, 4][: len(found["sizes"])]
    assert found["stopped"]
    assert found["first_step_s"] > 0
    for best in found["sizes"]:
        assert best["tokens_per_s"] > 0
        assert best["n_steps"] >= 3
        assert best["n_compiled"] == 0
        assert math.isfinite(best["loss"])
        assert 0 < best["padding_pct"] < 60
        assert best["peak_memory_gib"] > 0
        for share, peak in (("mfu_pct", "peak_tflops"), ("mfu_of_gemm_pct", "gemm_peak_tflops")):
            assert best[share] == pytest.approx(100 * best["useful_tflops"] / device[peak])
    assert found["best"] in found["sizes"]


def test_ours_learns_what_was_asked_for(results: Found) -> None:
    found = figures(results, "ours/modern_large/selective")
    assert (found["mode"], found["zero_stage"], found["precision"]) == ("selective", 1, "bf16")
    assert found["n_bad_steps"] == 0
    assert found["planned"]["gpu"] == "H100"
    assert found["planned"]["tokens_per_s"] > 0 and 0 < found["planned"]["peak_memory_gib"] < 5
    # Fresh weights know nothing.
    assert found["best"]["loss"] == pytest.approx(math.log(VOCAB), rel=0.2)


def test_the_peer_has_our_shape(results: Found) -> None:
    ours, theirs = (figures(results, name) for name in ("ours/t5_v1_1_large/full", PEERS[0]))
    assert ours["n_parameters"] == theirs["n_parameters"]
    assert theirs["attention"] in ("sdpa", "eager")


def test_parity(results: Found) -> None:
    found = figures(results, "parity")
    compared = found["modern_small"]
    assert compared["packing_relative"] < 1e-5
    assert 0 < compared["bf16_relative"] < 2e-2
    assert len(compared["losses"]["bf16"]) == 5


def test_the_profile_says_where_time_goes(out: Path, results: Found) -> None:
    found = figures(results, "profile/modern_large")
    fastest = max(
        (figures(results, name) for name in TRAINED if "modern" in name),
        key=lambda run: run["best"]["tokens_per_s"],
    )
    assert (found["mode"], found["rows"]) == (fastest["mode"], fastest["best"]["rows"])
    shares = {name: part["share_pct"] for name, part in found["groups"].items()}
    assert shares["gemm"] > 0
    assert shares[ELEMENTWISE] > 0
    # Backward runs in a thread of its own: a little of both may overlap.
    assert 95 < sum(shares.values()) < 120
    counted = found["counted"]
    assert counted["n_steps"] == 3
    assert counted["n_waits"] == sum(counted["waits"].values()) + sum(counted["where"].values())
    assert counted["n_waits_of_update"] == sum(counted["waits_of_update"].values()) > 0  # is the update good?
    assert counted["n_recompilations"] == 0
    assert "gemm" in (out / "profile-modern_large.txt").read_text()
    assert json.loads((out / "trace-modern_large.json").read_text())["kernels"]


def test_attention_kernels_agree(results: Found) -> None:
    cases = figures(results, "attention/modern_large")["cases"]
    assert set(cases) == {"encoder", "decoder", "cross"}
    for kernels in cases.values():
        assert "CUDA" in kernels["varlen, with packing and unpacking"]["why_not"]
        assert kernels["sdpa, boolean mask"]["forward_backward_ms"] > 0
        assert "relative_error" in kernels["sdpa, the model's mask"]
        for found in kernels.values():
            if "relative_error" in found:
                assert found["forward_ms"] > 0
                assert max(found["relative_error"].values()) < 3e-2
    assert set(cases["encoder"]["sdpa, T5 bias"]["relative_error"]) == {
        "heads", "queries", "keys", "values", "bias",
    }  # fmt: skip


def test_tables_and_log_hold_everything(out: Path, results: Found) -> None:
    table, log = (out / "table.md").read_text(), (out / "log.txt").read_text()
    for name in [*TRAINED, *PEERS, BROKEN, UNAVAILABLE]:
        assert name in table
        assert f"=== {name}: " in log
    assert "Traceback" in log
    claims = {target["claim"]: target for target in results["targets"]}
    ratio = next(target for claim, target in claims.items() if "Hugging Face" in claim)
    ours, theirs = (figures(results, name)["best"]["tokens_per_s"] for name in (TRAINED[2], PEERS[0]))
    other = figures(results, PEERS[1])["best"]["tokens_per_s"]
    assert ratio["value"] == pytest.approx(ours / max(theirs, other))


def test_without_time_all_is_skipped_and_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu", "--tiny", "--minutes", "0", "--out", str(tmp_path)]) == 0
    sections = json.loads((tmp_path / "results.json").read_text())["sections"]
    assert {name.split("/")[0] for name in sections} == {
        "environment", "parity", "tests", "ours", "hf", "profile", "attention",
    }  # fmt: skip
    for section in sections.values():
        assert section["status"] == "skipped"
        assert section["reason"].startswith("no time left")
    assert "no time left" in capsys.readouterr().out
    assert "skipped" in (tmp_path / "table.md").read_text()


def test_a_section_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    setting, began = Setting.build("cpu", True, out=str(tmp_path)), time.time()
    section = Section("environment", "environment", limit_s=0.2, least_s=0.1)
    results = gpu.Results(tmp_path, setting, 1.0, ["environment"])
    gpu.Runner(setting, results, began + 60, None).run(section)
    assert time.time() - began < 20
    found = results.sections["environment"]
    assert found["status"] == "timed_out"
    assert "0 s" in found["reason"]


def test_a_child_that_is_killed_is_told_from_one_that_ends() -> None:
    code = "import os, signal; print('so far', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    assert gpu.run_child([sys.executable, "-c", code], {}, 30.0) == (-9, "so far\n")
    assert gpu.run_child([sys.executable, "-c", "print(1)"], {}, 30.0) == (0, "1\n")


def test_without_a_gpu_nothing_trains_on_the_cpu_by_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_device(Setting("cpu"))
    with pytest.raises(RuntimeError, match="finds no CUDA device"):
        check_device(Setting("cuda"))


def test_the_search_ends_where_memory_does(tmp_path: Path) -> None:
    task = Task(Setting("cuda", first_rows=4), {}, time.time(), time.time() + 100, tmp_path / "result.json")

    def measure(rows: int) -> Figures:
        if rows > 8:
            raise RuntimeError("CUDA out of memory")
        return Figures(rows, 3, 1.0, 100.0 * rows, 1.0, 10.0, None, 5.0, 1.0, 2.0, 0)

    search(task, measure)
    assert [size["rows"] for size in task.figures["sizes"]] == [4, 8]
    assert task.figures["best"]["rows"] == 8
    assert task.figures["stopped"] == "out of memory at 16 rows"
    # Of the first size it is a failure, which the section reports.
    task.arguments["first_rows"] = 16
    with pytest.raises(RuntimeError, match="out of memory"):
        search(task, measure)


def test_the_plan_begins_with_what_is_wanted_most() -> None:
    names = [section.name for section in plan(Setting.build("cuda", False))]
    assert names[:3] == ["environment", "parity", "ours/modern_large/none"]
    assert {"hf/t5_v1_1_base/compile", "ours/t5_v1_1_base/full", "profile/t5_v1_1_large"} < set(names)
    assert len(names) == len(set(names))
    modes = [
        name.removeprefix("ours/modern_large/") for name in names if name.startswith("ours/modern_large/")
    ]
    assert modes == ["none", "compile", "compile_flex", "selective", "full"]
    compiled = {s.name: s.arguments for s in plan(Setting.build("cuda", False), modes=["none", "compile"])}
    assert compiled["ours/modern_large/compile"]["first_rows"] == 64 > Setting("cuda").first_rows
    only = [section.name for section in plan(Setting.build("cuda", False), modes=["compile"])]
    assert only.count("ours/modern_large/compile") == 1 and "ours/modern_large/none" not in only
    some = chosen(plan(Setting.build("cuda", False)), ["environment", "hf/*"])
    assert {section.kind for section in some} == {"environment", "hf"}


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "gemm"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x256_32x3_nn_align8>", "gemm"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        (
            "void at::native::multi_tensor_apply_kernel<..., at::native::FusedAdamMathFunctor<float>>",
            "optimizer",
        ),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, float, float>", "loss"),
        ("Memcpy HtoD (Pageable -> Device)", "memcpy"),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", ELEMENTWISE),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
    ],
)
def test_kernels_are_grouped(kernel: str, group: str) -> None:
    assert group_of(kernel) == group


def test_busy_time_counts_overlaps_once() -> None:
    assert busy_ns([(10, 20), (0, 5), (15, 30), (16, 18), (40, 41)]) == 5 + 20 + 1
    assert busy_ns([]) == 0


def test_targets_and_tables_of_a_gpu(tmp_path: Path) -> None:
    def trained(tokens: float, mfu: float, **others: Any) -> Found:
        best = {
            "rows": 64, "tokens_per_s": tokens, "mfu_pct": mfu, "useful_tflops": 500.0, "mfu_of_gemm_pct": None,
            "padding_pct": 2.0, "peak_memory_gib": 70.0,
        }  # fmt: skip
        return {"status": "ok", "reason": "", "figures": {"best": best, "first_step_s": 9.0, **others}}

    counted = {"n_steps": 100, "rows": 16, "n_waits": 0, "n_recompilations": 0, "waits": {}, "where": {}}
    sections = {
        "ours/t5_v1_1_large/none": trained(90e3, 46.0, mode="none"),
        "ours/t5_v1_1_large/full": trained(110e3, 55.0, mode="full"),
        "hf/t5_v1_1_large/plain": trained(40e3, 20.0, attention="sdpa"),
        "hf/t5_v1_1_large/compile": trained(60e3, 30.0, attention="sdpa"),
        "profile/t5_v1_1_large": {"status": "ok", "reason": "", "figures": {"counted": counted}},
    }
    found = {target["claim"]: (target["value"], target["holds"]) for target in targets(sections)}
    assert list(found.values()) == [
        (None, None), (55.0, True), (pytest.approx(110 / 60), False), (0, True),
    ]  # fmt: skip
    write_table({"sections": sections, "targets": targets(sections)}, tmp_path / "table.md")
    table = (tmp_path / "table.md").read_text()
    assert (
        "| ours/t5_v1_1_large/full | 64 | 110,000 | 500.00 | 55.0 | - | 2.0 | 70.0 | - | - | 9.0 |" in table
    )
    assert "Hugging Face's T5 | 1.83 | **no** |" in table


def test_only_missing_wheels_are_installed(tmp_path: Path) -> None:
    for name, version in (("gpu_benchmark_probe", "1.0"), ("numpy", "0.0.1")):
        info = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(tmp_path / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "VALUE = 7\n")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    site = tmp_path / "site"
    assert gpu.install_wheels(tmp_path, site) == ["gpu_benchmark_probe-1.0-py3-none-any.whl"]
    assert (site / "gpu_benchmark_probe.py").read_text() == "VALUE = 7\n"
    assert not (site / "numpy.py").exists()
