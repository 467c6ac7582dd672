"""One section of benchmarks/gpu.py, as a process of its own: an out-of-memory or a crash ends no other.

    python -m benchmarks.gpu_sections SPEC.json RESULT.json

SPEC.json is written by benchmarks/gpu.py; RESULT.json anew after every figure, so that one that is ended leaves what it
had found.
"""

import importlib
import json
import sys
import traceback
from pathlib import Path

from benchmarks.gpu_sections.plan import Setting
from benchmarks.gpu_sections.task import Task, UnavailableError, first_line, is_out_of_memory

MODULES = {
    "environment": "benchmarks.gpu_sections.checks",
    "parity": "benchmarks.gpu_sections.checks",
    "tests": "benchmarks.gpu_sections.checks",
    "ours": "benchmarks.gpu_sections.ours",
    "hf": "benchmarks.gpu_sections.peers",
    "profile": "benchmarks.gpu_sections.profile",
    "attention": "benchmarks.gpu_sections.attention",
}
"""Where the function of each kind is; it has the kind's name and takes a Task."""


def check_device(setting: Setting) -> None:
    """Large models must not be trained on a CPU by mistake.

    Raises:
        RuntimeError: if there is no GPU where one was asked for.
    """
    import torch

    if setting.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} finds no CUDA device here")


def main() -> None:
    """Do what SPEC.json says."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    setting = Setting(**{**spec["setting"], "overrides": tuple(spec["setting"]["overrides"])})
    task = Task(setting, spec["arguments"], spec["started"], spec["deadline"], Path(sys.argv[2]))
    try:
        check_device(setting)
        function = getattr(importlib.import_module(MODULES[spec["kind"]]), spec["kind"])
        function(task)
    except UnavailableError as error:
        task.write("unavailable", str(error))
    except Exception as error:
        traceback.print_exc()
        task.write("out_of_memory" if is_out_of_memory(error) else "failed", first_line(error))
    else:
        task.write("ok", "")


if __name__ == "__main__":
    main()
