"""What a plan says a GPU needs, and the most that CUDA's allocator has given out.

Unrun so far: written without a GPU at hand. Every test is skipped where there is none.
"""

import gc

import pytest
import torch

from dist_transformer.config import build_config
from dist_transformer.engine.engine import Engine
from dist_transformer.parallel.mesh import Mesh
from dist_transformer.plan.devices import find_gpu
from dist_transformer.plan.micro_step import full_rows
from dist_transformer.plan.planner import Planner
from dist_transformer.plan.speed import Cluster
from tests.gpu.test_parity import mesh, pytestmark

__all__ = ["mesh", "pytestmark"]
ROWS = 16


@pytest.mark.parametrize(
    ("stage", "preset", "policy"),
    [
        (1, "vaswani2017_base", "none"), (2, "t5_v1_1_base", "none"), (1, "modern_base", "none"),
        (2, "modern_base", "selective"), (1, "t5_v1_1_base", "full"),
    ],
)  # fmt: skip
def test_memory_is_what_was_planned(stage: int, preset: str, policy: str, mesh: Mesh) -> None:
    config = build_config(
        {
            "run": {"dir": "unused"},
            "model": {"preset": preset, "vocab_size": 32128},
            "data": {"train": "unused", "max_source_len": 512, "max_target_len": 128},
            "train": {"steps": 10, "global_batch_size": 2 * ROWS, "micro_batch_size": ROWS},
            "recompute": {"encoder": policy, "decoder": policy},
            "parallel": {"zero_stage": stage},
        }
    )
    rows = [full_rows(config, ROWS, torch.device("cpu")) for _ in range(2)]
    gc.collect()  # an engine of another test is a cycle of references
    torch.cuda.empty_cache()
    engine = Engine(config, mesh)
    engine.train_step(rows, 2 * ROWS * 128, 1)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    engine.train_step(rows, 2 * ROWS * 128, 2)
    memory = Planner(Cluster(1, 1, find_gpu("h100"), 50e9), reserved=0.0).plan(config).memory
    assert memory.total == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.05)
