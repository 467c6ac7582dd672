"""Our model trained through the engine that users run, by one process: ZeRO 1, bf16, packed rows."""

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_sections.measure import Figures, Peaks, search, time_size
from benchmarks.gpu_sections.plan import COMPILED, COMPILED_FLEX, FLEX, LARGEST, Setting
from benchmarks.gpu_sections.rows import Pool
from benchmarks.gpu_sections.task import Task, UnavailableError, first_line
from dist_transformer.config import Config, build_config, preset_names
from dist_transformer.data.batch import Batch
from dist_transformer.model import build_model
from dist_transformer.parallel.mesh import Mesh, open_mesh

N_BATCHES = 6
"""Different ones, used in turn."""
BYTES_OF_PARAMETER = 18
"""Weights in bf16, and in fp32 the gradients that add up, the master weights and two moments."""
PLANNING_S = 15.0
"""With less time left, what was measured is not held against a plan."""
FULL = 0.85
"""Of a device's memory, the share that these may fill."""


def config_of(
    setting: Setting,
    preset: str,
    mode: str,
    rows: int,
    vocab_size: int,
    precision: str = "bf16",
    micro_batches: int = 1,
) -> Config:
    """A preset's configuration, with so many micro-batches an update; a tiny setting shrinks the model."""
    model: dict[str, Any] = {"preset": preset, "vocab_size": -(-vocab_size // 64) * 64}
    if setting.tiny:
        model |= {"d_model": 32, "d_ff": 48, "n_heads": 4, "head_dim": 8}
        model |= {"n_encoder_layers": 2, "n_decoder_layers": 2}
        if preset.startswith("modern"):
            model["n_kv_heads"] = 2
    policy = "none" if mode in (COMPILED, FLEX, COMPILED_FLEX) else mode
    tree = {
        "run": {"dir": "unused"},
        "model": model,
        "data": {
            "train": "unused",
            "max_source_len": setting.source_len,
            "max_target_len": setting.target_len,
        },
        "train": {
            "steps": 10**6,
            "global_batch_size": rows * micro_batches,
            "micro_batch_size": rows,
            "precision": precision,
            "compile": mode in (COMPILED, COMPILED_FLEX),
            "attention": "flex" if mode in (FLEX, COMPILED_FLEX) else "sdpa",
        },
        "optimizer": {"lr": 1e-4, "schedule": "constant", "warmup_steps": 0},
        "parallel": {"zero_stage": 1},
        "recompute": {"encoder": policy, "decoder": policy},
    }
    return build_config(tree, "benchmarks/gpu.py", setting.overrides)


def largest_preset(setting: Setting, measured: list[str], vocab_size: int) -> str:
    """The preset with the most parameters whose states fit the device.

    Raises:
        UnavailableError: if there is no device, or that preset is measured anyway.
    """
    if setting.device != "cuda":
        raise UnavailableError("needs a CUDA device, whose memory decides what the largest is")
    room = FULL * torch.cuda.get_device_properties(0).total_memory / BYTES_OF_PARAMETER
    sizes = {}
    for preset in preset_names():
        model = build_model(config_of(setting, preset, "full", 1, vocab_size).model)
        sizes[preset] = sum(parameter.numel() for parameter in model.parameters())
    fitting = [preset for preset in sizes if sizes[preset] <= room]
    if not fitting:
        raise UnavailableError("no preset's states fit this device")
    largest = max(fitting, key=lambda preset: sizes[preset])
    if largest in measured:
        raise UnavailableError(f"the largest that fits is {largest}, which is measured by itself")
    return largest


class Trainee:
    """An engine, and batches for it."""

    def __init__(self, config: Config, mesh: Mesh, pool: Pool) -> None:
        # Imported late: DeepSpeed reads its environment at that moment.
        from dist_transformer.engine.engine import Engine

        self.engine, self.pool = Engine(config, mesh), pool
        self.n_steps = self.n_bad = 0

    def step(self, batches: Sequence[Batch]) -> Tensor:
        """One update, as the trainer makes it; returns the loss a target token."""
        self.n_steps += 1
        n_target_tokens = sum(batch.n_target_tokens for batch in batches)
        result = self.engine.train_step(batches, n_target_tokens, self.n_steps)
        self.n_bad += not result.applied
        return result.sums[1] / n_target_tokens

    def batches(self, rows: int) -> Iterator[Batch]:
        """For ever, batches of so many rows."""
        return cycle(self.pool.batches(rows, N_BATCHES))


def planned(config: Config, device: str) -> dict[str, Any]:
    """What `dist-transformer plan` would have said, to be held against what is measured; without a GPU, of an H100."""
    from dist_transformer.plan.devices import GPUS, find_gpu
    from dist_transformer.plan.planner import GIB, Planner
    from dist_transformer.plan.speed import Cluster

    name = torch.cuda.get_device_name() if device == "cuda" else "H100"
    # The longest name that fits: an H100 NVL is no H100.
    names = sorted((len(gpu.sheet), key) for key, gpu in GPUS.items() if gpu.sheet in name)
    gpu = find_gpu(names[-1][1] if names else "h100")
    plan = Planner(Cluster(1, 1, gpu, 50e9), reserved=0.0).plan(config)
    return {
        "gpu": gpu.name, "peak_memory_gib": plan.memory.total / GIB, "tokens_per_s": plan.tokens_per_s,
        "step_s": plan.time.total, "bound_by_host": plan.time.bound_by_host,
    }  # fmt: skip


def ours(task: Task) -> None:
    """Tokens a second, MFU and memory of a preset with a way to recompute, at every size of the micro-batch."""
    setting, pool, peaks = task.setting, Pool(task.setting), Peaks.of(task)
    preset = task.arguments["preset"]
    if setting.device != "cuda" and task.arguments["mode"] in (FLEX, COMPILED_FLEX):
        raise UnavailableError("FlexAttention has no backward pass on CPUs")
    if preset == LARGEST:
        preset = largest_preset(setting, task.arguments["measured"], pool.vocab_size)
    config = config_of(
        setting, preset, task.arguments["mode"], 1, pool.vocab_size, micro_batches=setting.micro_batches
    )
    task.add(preset=preset, mode=task.arguments["mode"], peak=peaks.source)
    with open_mesh() as mesh:
        trainee = Trainee(config, mesh, pool)
        task.add(
            n_parameters=trainee.engine.n_parameters, zero_stage=config.parallel.zero_stage,
            precision=config.train.precision,
        )  # fmt: skip

        def measure(rows: int) -> Figures:
            if task.arguments["mode"] in (COMPILED, FLEX, COMPILED_FLEX):
                # Each size has programs of its own, and torch makes only a few before it goes on uncompiled.
                torch.compiler.reset()
            return time_size(task, rows, trainee.batches(rows), trainee.step, config.model, peaks)

        search(task, measure)
        task.add(n_bad_steps=trainee.n_bad)
    if "best" in task.figures and task.time_left() > PLANNING_S:
        rows = task.figures["best"]["rows"]
        best = config_of(
            setting,
            preset,
            task.arguments["mode"],
            rows,
            pool.vocab_size,
            micro_batches=setting.micro_batches,
        )
        try:
            task.add(planned=planned(best, setting.device))
        except Exception as error:  # What was measured is no worse for it.
            task.add(plan_error=first_line(error))
