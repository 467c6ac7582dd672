"""What one GPU gives: parity, tokens/s, MFU and memory by preset and recomputation, beside Hugging Face's T5; profiles.

    python -m benchmarks.gpu [--out DIR] [--minutes 9] [--wheels DIR] [--only 'ours/*' ...] [section.key=value ...]
    python -m benchmarks.gpu --device cpu --tiny

Run it from the top of a checkout; it needs no installation of this project, no network and no corpus. Packages that are
missing come from wheels in `--wheels`. Every section is a process of its own with a time limit; where the time of all
is over, the rest is skipped and said so. Written as they come: OUT/results.json, table.md, log.txt, profile-PRESET.txt
and trace-PRESET.json. docs/benchmarks.md says what the figures mean. Exit code 1 if a section failed.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu_sections.plan import (
    COMPILED,
    COMPILED_FLEX,
    FLEX,
    MODES,
    PRESETS,
    Section,
    Setting,
    chosen,
    plan,
)
from benchmarks.gpu_sections.report import best_of, describe, targets, write_table

ROOT = Path(__file__).resolve().parents[1]
FAILED = ("failed", "timed_out")
"""Ends of a section that mean a mistake; the others are `ok`, `unavailable`, `out_of_memory` and `skipped`."""


class Results:
    """What all sections have found, on disk after each of them."""

    def __init__(self, out: Path, setting: Setting, minutes: float, names: Sequence[str]) -> None:
        self.out = out
        self.content: dict[str, Any] = {
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "minutes": minutes,
            "setting": asdict(setting),
            # So that also what was never reached stands there.
            "sections": {name: {"status": "skipped", "reason": "not reached"} for name in names},
        }
        self.write()

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        """By name: status, reason, seconds, figures."""
        found: dict[str, dict[str, Any]] = self.content["sections"]
        return found

    def record(self, name: str, section: dict[str, Any]) -> None:
        """The end of a section."""
        self.sections[name] = section
        self.write()

    def write(self) -> None:
        """results.json and table.md, each replaced at once."""
        self.content["targets"] = targets(self.sections)
        beside = self.out / "results.partial"
        beside.write_text(json.dumps(self.content, indent=1))
        beside.replace(self.out / "results.json")
        write_table(self.content, self.out / "table.md")


class Runner:
    """Starts sections, one after the other, and ends those that take too long."""

    def __init__(self, setting: Setting, results: Results, deadline: float, site: Path | None) -> None:
        self.setting, self.results, self.deadline, self.site = setting, results, deadline, site

    def run(self, section: Section) -> None:
        """One section, or the reason why it is skipped."""
        left = self.deadline - time.time()
        if left < section.least_s:
            reason = (
                f"no time left: {max(0, left):.0f} s of all, and it needs {section.least_s:.0f} s at least"
            )
            self.results.record(section.name, {"status": "skipped", "reason": reason})
            return
        began = time.time()
        with tempfile.TemporaryDirectory(prefix="gpu-section-") as folder:
            spec, result = Path(folder) / "spec.json", Path(folder) / "result.json"
            limit_s = min(section.limit_s, left)
            content = {
                "kind": section.kind, "setting": asdict(self.setting), "started": began, "deadline": began + limit_s,
                "arguments": self._arguments(section),
            }  # fmt: skip
            spec.write_text(json.dumps(content))
            command = [sys.executable, "-m", "benchmarks.gpu_sections", str(spec), str(result)]
            status, log = run_child(command, self._environment(), limit_s)
            found: dict[str, Any] = {"status": "failed", "reason": "", "figures": {}}
            if result.exists():
                found = json.loads(result.read_text())
        if status is None:
            found |= {
                "status": "timed_out",
                "reason": f"ended after {limit_s:.0f} s; what it had found stays",
            }
        elif status != 0 or found["status"] == "running" or not (found["reason"] or found["status"] == "ok"):
            last = (log.strip().splitlines() or ["no output"])[-1]
            found |= {"status": "failed", "reason": f"{_words(status)}: {last[:300]}"}
        found["seconds"] = round(time.time() - began, 1)
        with (self.results.out / "log.txt").open("a") as file:
            file.write(f"=== {section.name}: {found['status']} {found['reason']}\n{log}\n")
        self.results.record(section.name, found)

    def _arguments(self, section: Section) -> dict[str, Any]:
        """What the section is given from those before it: the device's peaks, and what to profile."""
        arguments = dict(section.arguments)
        environment = self.results.sections.get("environment", {}).get("figures", {})
        if "gemm_peak_tflops" in environment:
            arguments["peaks"] = {
                "sheet": environment["peak_tflops"] * 1e12,
                "source": environment["peak_source"],
                "gemm": environment["gemm_peak_tflops"] * 1e12,
            }
        if section.kind == "profile" and (best := best_of(self.results.sections, arguments["preset"])):
            arguments |= {"mode": best["mode"], "rows": best["rows"]}
        return arguments

    def _environment(self) -> dict[str, str]:
        """One rank and one device, whatever this process was started by."""
        kept = {
            key: value
            for key, value in os.environ.items()
            if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR") and not key.startswith("SLURM_")
        }
        devices = kept.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        if not devices.isdecimal():  # DeepSpeed takes numbers only.
            devices = "0"
        if self.setting.tiny:
            # Threads that wait for each other at every small product would take longer than the products.
            kept.setdefault("OMP_NUM_THREADS", "1")
        site = [str(self.site)] if self.site else []
        path = [*site, str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
        return {
            **kept,
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONUNBUFFERED": "1",
            "CUDA_VISIBLE_DEVICES": devices if self.setting.device == "cuda" else "",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }


def run_child(command: Sequence[str], environment: dict[str, str], limit_s: float) -> tuple[int | None, str]:
    """A command with all its children; (exit status, output). None: it was ended after `limit_s` seconds."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        status: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(limit_s)
        finally:
            # Also after a good end, when the compiler's workers may still be there, and where we are stopped.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        return status, log.read()


def _words(status: int) -> str:
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return f"exit code {status}"


def install_wheels(folder: Path, site: Path) -> list[str]:
    """Put those wheels of a folder whose package is missing here into `site`; their names.

    Raises:
        SystemExit: with pip's words, if it cannot.
    """
    present = {_normal(d.metadata["Name"] or "") for d in importlib.metadata.distributions()}
    wheels = [
        path for path in sorted(folder.glob("*.whl")) if _normal(path.name.split("-")[0]) not in present
    ]
    if wheels:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        command += ["--target", str(site), *map(str, wheels)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"pip cannot install from {folder}:\n{done.stderr}")
    return [path.name for path in wheels]


def _normal(name: str) -> str:
    """A package's name as metadata and file names agree on it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", help="section.key=value of our configuration")
    parser.add_argument("--out", type=Path, help="default: $OUT, or runs/gpu_benchmark")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shrunken models: does it all work?")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    parser.add_argument("--wheels", type=Path, help="wheels of packages that may be missing here")
    parser.add_argument("--shards", type=Path, help="pairs to train on instead of made-up ones")
    parser.add_argument("--presets", nargs="+", help=f"default: {' '.join(PRESETS)}")
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=(*MODES, "every_n", COMPILED, FLEX, COMPILED_FLEX),
        help=f"default: {' '.join(MODES)}",
    )
    parser.add_argument("--only", nargs="+", default=[], help="sections, as patterns: environment 'hf/*'")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything that fits into the time; 1 if something failed."""
    began, options = time.time(), parse(arguments)
    out: Path = options.out or Path(os.environ.get("OUT") or ROOT / "runs" / "gpu_benchmark")
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").unlink(missing_ok=True)
    setting = Setting.build(
        options.device, options.tiny, out=str(out), overrides=tuple(options.overrides),
        shards=str(options.shards.resolve()) if options.shards else None,
    )  # fmt: skip
    sections = chosen(plan(setting, options.presets, options.modes), options.only)
    results = Results(out, setting, options.minutes, [section.name for section in sections])
    with tempfile.TemporaryDirectory(prefix="gpu-site-") as folder:
        site = None
        if options.wheels:
            site = Path(folder)
            results.content["wheels"] = install_wheels(options.wheels, site)
        runner = Runner(setting, results, began + 60 * options.minutes, site)
        for section in sections:
            runner.run(section)
            print(
                f"{time.time() - began:6.0f} s  {describe(section.name, results.sections[section.name])}",
                flush=True,
            )
    results.content["seconds"] = round(time.time() - began, 1)
    results.write()
    print(f"\n{(out / 'table.md').read_text()}\n{out}")
    return int(any(section["status"] in FAILED for section in results.sections.values()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
