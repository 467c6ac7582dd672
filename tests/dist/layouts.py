"""A short training run in a layout, and what no layout may change; `benchmarks/layouts.py` runs the whole grid."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_transformer.config import Config, build_config
from dist_transformer.data.token_ids import PAD_ID
from dist_transformer.engine.engine import Engine
from tests.dist.harness import Mesh
from tests.dist.test_gradients import part, rows_of

VOCAB, N_ROWS = 96, 8
PRESETS = ("vaswani2017_base", "t5_v1_1_small", "modern_small")


@dataclass(frozen=True)
class Case:
    """A model, what is varied about its training, and the layout besides the numbers of ranks."""

    preset: str
    zero_stage: int = 0
    sequence_parallel: bool = True
    offload: str = "none"
    precision: str = "fp32"
    grad_accum_dtype: str = "same"
    """In bf16: what micro-steps' gradients add up in."""
    optimizer: str = "adamw"
    recompute: str = "none"
    n_steps: int = 20
    micro_steps: int = 1
    model: tuple[tuple[str, Any], ...] = ()
    deepspeed: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass
class Course:
    """What a rank saw."""

    losses: list[float]
    """Objective per target token of each step."""
    norms: list[float]
    """Gradient norm of each step, before clipping."""
    evaluation: float
    """Cross-entropy per target token at the end."""
    initial: dict[str, Tensor]
    """The first weights, whole."""


def config_of(case: Case, mesh: Mesh) -> Config:
    small = {
        "vocab_size": VOCAB,
        "d_model": 32,
        "d_ff": 48,
        "n_heads": 4,
        "n_kv_heads": 2 if case.preset.startswith("modern") else 4,
        "head_dim": 8,
        "n_encoder_layers": 2,
        "n_decoder_layers": 2,
        "dropout": 0.0,
    }
    return build_config(
        {
            "run": {"dir": "unused"},
            "model": {"preset": case.preset, **small, **dict(case.model)},
            "data": {"train": "unused"},
            "train": {
                "steps": 100,
                "global_batch_size": N_ROWS,
                "micro_batch_size": N_ROWS // (mesh.dp_size * case.micro_steps),
                "precision": case.precision,
                "grad_accum_dtype": case.grad_accum_dtype if case.precision == "bf16" else "fp32",
                "label_smoothing": 0.1,
                "z_loss": 1e-3,
                "clip": 0.5,
                "loss_chunk_rows": 20,
            },
            "optimizer": {
                "name": case.optimizer,
                "lr": 0.003,
                "warmup_steps": 5,
                "schedule": "inverse_sqrt",
                "weight_decay": 0.01,
                "eps": 1e-5,
            },
            "parallel": {
                "tp_degree": mesh.tp_size,
                "sequence_parallel": case.sequence_parallel,
                "zero_stage": case.zero_stage,
                "offload": case.offload,
            },
            "recompute": {"encoder": case.recompute, "decoder": case.recompute},
            "deepspeed": case.deepspeed,
        }
    )


def course(mesh: Mesh, case: Case) -> Course:
    """Train for `n_steps` on one batch of eight rows, whose lengths (14 and 11) do not divide by four."""
    engine = Engine(config_of(case, mesh), mesh)
    with engine.whole_model() as model:
        initial = {name: value.detach().clone() for name, value in model.named_parameters()}
    rows = rows_of(packed=False)
    n_tokens = int((rows.decoder_target_tokens != PAD_ID).sum())
    size = N_ROWS // (mesh.dp_size * case.micro_steps)
    first = mesh.dp_rank * case.micro_steps * size
    batches = [part(rows, first + i * size, first + (i + 1) * size) for i in range(case.micro_steps)]
    losses, norms = [], []
    for step in range(1, case.n_steps + 1):
        result = engine.train_step(batches, n_tokens, step)
        total = result.sums.clone()
        torch.distributed.all_reduce(total, group=mesh.dp_group)
        losses.append(float(total[0]) / n_tokens)
        norms.append(result.grad_norm)
    evaluation = float(engine.evaluate_batch(rows).cross_entropy) / n_tokens
    return Course(losses, norms, evaluation, initial if mesh.is_rank_zero else {})


def courses(mesh: Mesh, cases: Sequence[Case]) -> list[Course]:
    return [course(mesh, case) for case in cases]


def compare(found: Course, expected: Course, case: Any, relative: float = 1e-4) -> None:
    """Losses, norms and evaluation to `relative`, for as many steps as there are; initial weights bit for bit."""
    n_steps = len(found.losses)
    assert found.losses == pytest.approx(expected.losses[:n_steps], rel=relative), case
    assert found.norms == pytest.approx(expected.norms[:n_steps], rel=relative), case
    assert expected.losses[-1] < 0.8 * expected.losses[0]
    assert min(expected.norms) > 0.5, "never clipped"
    if n_steps == len(expected.losses):
        assert found.evaluation == pytest.approx(expected.evaluation, rel=relative), case
    for name in found.initial:
        assert torch.equal(found.initial[name], expected.initial[name]), f"{case}: {name}"
