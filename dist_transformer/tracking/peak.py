"""What a device could do at most: the denominator of MFU. From a table for GPUs, measured for everything else."""

import contextlib
import json
import os
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

# Dense TFLOP/s of matrix products from the makers' data sheets (never the figures "with sparsity"): bf16, fp32.
# The first part that a device's name contains counts, so that longer names stand before shorter ones.
_GPUS: tuple[tuple[str, float, float], ...] = (
    ("GB200", 2500.0, 80.0),
    ("B200", 2250.0, 75.0),
    ("B100", 1750.0, 60.0),
    ("GH200", 989.4, 67.0),
    ("H200 NVL", 835.5, 60.0),
    ("H200", 989.4, 67.0),
    ("H100 NVL", 835.5, 60.0),
    ("H100 PCIe", 756.4, 51.0),
    ("H100", 989.4, 67.0),
    ("H800", 989.4, 67.0),
    ("A100", 312.0, 19.5),
    ("A800", 312.0, 19.5),
    ("A10G", 70.0, 35.0),
    ("A10", 125.0, 31.2),
    ("A30", 165.0, 10.3),
    ("A40", 149.7, 37.4),
    ("RTX A6000", 154.8, 38.7),
    ("RTX 6000 Ada", 364.2, 91.1),
    ("L40S", 362.0, 91.6),
    ("L40", 181.0, 90.5),
    ("L4", 121.0, 30.3),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71.0, 35.6),
    ("MI300X", 1307.4, 163.4),
    ("MI250X", 383.0, 47.9),
)
_SIZES = (512, 1024)
_SECONDS, _SECONDS_AGAIN = 0.4, 0.1
"""How long the first start on a machine measures, and every later one."""


@dataclass(frozen=True)
class Peak:
    """FLOP/s of one device in one precision, and where the figure comes from."""

    flops_per_s: float
    source: str
    """For a person: `data sheet of H100`, `measured`, `tracking.peak_tflops`."""


def device_peak(device: torch.device, dtype: torch.dtype, given_tflops: float | None = None) -> Peak:
    """The peak of this rank's device: given, from the table, or measured with matrix products (cached).

    A measured peak is the best that this machine has shown so far: a start on a busy machine cannot lower it.
    """
    if given_tflops is not None:
        return Peak(given_tflops * 1e12, "tracking.peak_tflops")
    name = device_name(device)
    if device.type == "cuda" and (known := table_peak(name, dtype)) is not None:
        return known
    key = f"{name} | {torch.get_num_threads()} thread(s) | {dtype} | torch {torch.__version__}"
    known_flops = _cached(key)
    best = max(known_flops, _measure(device, dtype, _SECONDS_AGAIN if known_flops else _SECONDS))
    _cache(key, best)
    return Peak(best, f"measured on {name}")


def table_peak(name: str, dtype: torch.dtype) -> Peak | None:
    """The data sheet's figure for a GPU, None where it is unknown."""
    for part, bf16, fp32 in _GPUS:
        if part in name:
            tflops = fp32 if dtype == torch.float32 else bf16
            return Peak(tflops * 1e12, f"data sheet of {part}")
    return None


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cache_file() -> Path:
    """Where measured peaks are kept: in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "dist_transformer" / "peaks.json"


def _measure(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """FLOP/s of the fastest of some square products, about as many seconds long."""
    best, deadline = 0.0, time.perf_counter() + seconds
    for size in _SIZES:
        a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        out = a @ b
        while True:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            now = time.perf_counter()
            best = max(best, 2.0 * size**3 / (now - start))
            if now > deadline - seconds * (size != _SIZES[-1]) / 2:
                break
    return best


def _cached(key: str) -> float:
    try:
        value = json.loads(cache_file().read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError):
        return 0.0
    return float(value) if isinstance(value, int | float) else 0.0


def _cache(key: str, value: float) -> None:
    """Keep a figure; a folder that cannot be written costs the next start a measurement, nothing else."""
    path = cache_file()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        known: dict[str, object] = {}
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(path.read_text(encoding="utf-8"))
            known = content if isinstance(content, dict) else {}
        fd, beside = tempfile.mkstemp(prefix=".peaks.", dir=path.parent)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            json.dump({**known, key: value}, file, indent=1)
        Path(beside).replace(path)
