"""What the device is and reaches at most, and whether it computes the right thing."""

import importlib.metadata
import importlib.util
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_sections.measure import synchronize
from benchmarks.gpu_sections.plan import Setting
from benchmarks.gpu_sections.task import Task, UnavailableError

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("deepspeed", "transformers", "triton", "pytest", "numpy", "pydantic")
GEMMS = (
    (4096, 4096, 4096),
    (8192, 8192, 8192),
    (16384, 8192, 8192),
    (32768, 1024, 2816),
    (8192, 1024, 32128),
)
"""(M, K, N): large squares, and the feed-forward and output projection of the large presets."""
TINY_GEMMS = ((64, 64, 64), (128, 32, 96))
RELATIVE_BF16 = 2e-2
RELATIVE_FP32 = 1e-4
PARITY_STEPS = 5
PARITY_PRESETS = ("t5_v1_1_small", "modern_small")
PARITY_ROWS = 8
TESTS_MARGIN_S = 20.0


def environment(task: Task) -> None:
    """Versions, the device, its data sheet's peak and what matrix products and copies reach on it."""
    from dist_transformer.tracking.peak import device_name, device_peak

    setting = task.setting
    device = torch.device(setting.device)
    task.add(
        device=device_name(device), python=platform.python_version(), torch=torch.__version__,
        cores=len(os.sched_getaffinity(0)), packages={name: _version(name) for name in PACKAGES},
    )  # fmt: skip
    if setting.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        task.add(
            capability=f"{properties.major}.{properties.minor}", cuda=torch.version.cuda,
            memory_gib=properties.total_memory / 2**30, multiprocessors=properties.multi_processor_count,
            nvidia_smi=_nvidia_smi(),
        )  # fmt: skip
    peak = device_peak(device, torch.bfloat16)
    task.add(peak_tflops=peak.flops_per_s / 1e12, peak_source=peak.source)
    gemms = {
        "x".join(map(str, shape)): _gemm_tflops(setting, shape)
        for shape in (TINY_GEMMS if setting.tiny else GEMMS)
    }
    task.add(gemm_tflops=gemms, gemm_peak_tflops=max(gemms.values()), copy_gb_per_s=_copy_gb_per_s(setting))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi() -> str:
    """Driver, power limit and clocks, as the driver's own tool says."""
    fields = "driver_version,power.limit,clocks.max.sm,clocks.max.memory,temperature.gpu"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        return f"not known: {error}"
    return f"{fields}: {done.stdout.strip()}"


def _seconds(setting: Setting, action: Any, limit_s: float) -> float:
    """Of one call, over as many as fit into about `limit_s`."""
    action()
    synchronize(setting)
    began = time.perf_counter()
    action()
    synchronize(setting)
    n = max(1, min(200, int(limit_s / max(1e-6, time.perf_counter() - began))))
    began = time.perf_counter()
    for _ in range(n):
        action()
    synchronize(setting)
    return (time.perf_counter() - began) / n


def _gemm_tflops(setting: Setting, shape: tuple[int, int, int]) -> float:
    """Of a bf16 product of random numbers: of zeros, which cost less power, it would be more."""
    m, k, n = shape
    a, b = (torch.randn(size, device=setting.device, dtype=torch.bfloat16) for size in ((m, k), (k, n)))
    out = torch.empty(m, n, device=setting.device, dtype=torch.bfloat16)
    seconds = _seconds(setting, lambda: torch.mm(a, b, out=out), 0.01 if setting.tiny else 0.4)
    return 2.0 * m * k * n / seconds / 1e12


def _copy_gb_per_s(setting: Setting) -> float:
    """Bytes read and written a second by a copy on the device: what bounds norms and activations."""
    n = 2**18 if setting.tiny else 2**30
    source = torch.zeros(n, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    return 2 * n / _seconds(setting, lambda: target.copy_(source), 0.01 if setting.tiny else 0.2) / 1e9


def parity(task: Task) -> None:
    """bf16 beside fp32, packed beside unpacked rows.

    Raises:
        AssertionError: if any of them is off; the figures stand in the result.
    """
    from dist_transformer.parallel.mesh import open_mesh

    wrong = []
    with open_mesh() as mesh:
        for preset in PARITY_PRESETS[-1:] if task.setting.tiny else PARITY_PRESETS:
            found = _compare(task.setting, preset, mesh)
            task.add(**{preset: found})
            for name, limit in (("bf16", RELATIVE_BF16), ("packing", RELATIVE_FP32)):
                if not found[f"{name}_relative"] <= limit:  # a NaN is wrong too
                    wrong.append(f"{preset}: {name} differs by {found[f'{name}_relative']:.1e}")
    assert not wrong, "; ".join(wrong)


def tests(task: Task) -> None:
    """tests/gpu, as many as there is time for.

    Raises:
        UnavailableError: if they cannot be run here.
        AssertionError: if one of them failed, or not all have run.
    """
    if importlib.util.find_spec("pytest") is None:
        raise UnavailableError("pytest is not installed")
    if task.setting.device != "cuda":
        raise UnavailableError("tests/gpu needs a CUDA device")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # Not the project's own options: they ask for plugins that a bare machine may not have.
        command: Sequence[str] = (
            sys.executable, "-m", "pytest", "-v", "-c", os.devnull, f"--rootdir={ROOT}", "-p", "no:cacheprovider",
            f"--junit-xml={report}", str(ROOT / "tests" / "gpu"),
        )  # fmt: skip
        process, is_over = subprocess.Popen(command, cwd=ROOT), False
        try:
            process.wait(max(1.0, task.time_left() - TESTS_MARGIN_S))
        except subprocess.TimeoutExpired:
            is_over = True
            process.send_signal(signal.SIGINT)  # pytest then reports of those that have run
            try:
                process.wait(TESTS_MARGIN_S / 2)
            except subprocess.TimeoutExpired:
                process.kill()
        if not report.exists():
            raise AssertionError(f"pytest ended with {process.wait()} and no report")
        task.add(**_counts(report))
    figures = task.figures
    assert not figures["failed"], (
        f"{len(figures['failed'])} of tests/gpu failed: {', '.join(figures['failed'])}"
    )
    assert not is_over, f"time was over after {figures['passed']} tests had passed"


def _compare(setting: Setting, preset: str, mesh: Any) -> dict[str, Any]:
    """Losses of the first steps in both precisions; loss and gradient norm of the same samples in other rows."""
    from benchmarks.gpu_sections.ours import config_of
    from benchmarks.gpu_sections.rows import Pool
    from dist_transformer.engine.engine import Engine

    pool = Pool(setting)
    packed = pool.batches(PARITY_ROWS, 1)[0]
    losses: dict[str, list[float]] = {}
    norms: dict[str, float] = {}
    for name, precision, batch, n_steps in (
        ("fp32", "fp32", packed, PARITY_STEPS),
        ("bf16", "bf16", packed, PARITY_STEPS),
        ("unpacked", "fp32", pool.unpacked(PARITY_ROWS), 1),
    ):
        config = config_of(setting, preset, "none", PARITY_ROWS, pool.vocab_size, precision)
        engine = Engine(config, mesh)
        results = [engine.train_step([batch], batch.n_target_tokens, number + 1) for number in range(n_steps)]
        losses[name] = [float(result.sums[1]) / batch.n_target_tokens for result in results]
        norms[name] = results[0].grad_norm
        # Otherwise the next engine would stand beside it.
        del engine, results
    return {
        "losses": losses,
        "grad_norms": norms,
        "bf16_relative": max(map(_relative, losses["bf16"], losses["fp32"])),
        "packing_relative": max(
            _relative(losses["unpacked"][0], losses["fp32"][0]), _relative(norms["unpacked"], norms["fp32"])
        ),
    }


def _relative(found: float, expected: float) -> float:
    return abs(found - expected) / abs(expected) if math.isfinite(found) else math.inf


def _counts(report: Path) -> dict[str, Any]:
    """What pytest's report says: how many passed and were skipped, and which failed."""
    cases = list(ET.parse(report).getroot().iter("testcase"))
    failed = [
        case.attrib["name"] for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]  # fmt: skip
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {"passed": len(cases) - len(failed) - len(skipped), "skipped": len(skipped), "failed": failed}
