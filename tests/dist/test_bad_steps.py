"""An update whose loss or gradient is not finite on one rank is skipped on all: nothing moves, the run goes on."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from dist_transformer.data.batch import Batch
from dist_transformer.data.token_ids import PAD_ID
from dist_transformer.engine.engine import Engine
from tests.dist.harness import Mesh, run_ranks
from tests.dist.test_gradients import Split, config_of, part, rows_of

SPLITS = [
    Split(
        ranks=2,
        micro_batch_size=2,
        zero_stage=stage,
        precision=precision,
        offload=offload,
        optimizer=optimizer,
    )
    for stage, precision, offload, optimizer in [
        (0, "fp32", "none", "adamw"),
        (0, "bf16", "none", "adamw"),
        (1, "fp32", "none", "adamw"),
        (1, "bf16", "none", "adamw"),
        (2, "fp32", "none", "adamw_rms"),
        (2, "bf16", "none", "adamw"),
        (3, "fp32", "none", "adamw"),
        (3, "bf16", "none", "adamw"),
        (1, "bf16", "optimizer", "adamw"),
        (2, "bf16", "optimizer", "adamw"),
        (2, "fp32", "optimizer", "adamw"),
        (3, "bf16", "all", "adamw"),
    ]
]


def name_of(split: Split) -> str:
    return f"zero{split.zero_stage}-{split.precision}-{split.optimizer}-offload_{split.offload}"


@dataclass
class Found:
    applied: list[bool] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    moved: list[bool] = field(default_factory=list)
    """Whether each step changed any weight."""
    weights: dict[str, Tensor] = field(default_factory=dict)


def weights_of(engine: Engine) -> dict[str, Tensor]:
    with engine.whole_model() as model:
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def poison(engine: Engine, value: float, in_gradient: bool) -> torch.utils.hooks.RemovableHandle:
    """Makes what the next micro-step computes not finite: its loss, or one weight's gradient alone."""
    decoder = engine.model.decoder
    if not in_gradient:
        return decoder.register_forward_hook(lambda module, inputs, output: output * value)

    def spoil(module: torch.nn.Module, inputs: object, output: Tensor) -> None:
        output.register_hook(lambda gradient: gradient * value)  # type: ignore[no-untyped-call]

    return decoder.register_forward_hook(spoil)


def train(mesh: Mesh, split: Split, kinds: list[str]) -> Found:
    """One step for each kind; a skipped kind is left out of the run altogether, its number in the schedule too."""
    batch = rows_of(packed=False)
    n_target_tokens = int((batch.decoder_target_tokens != PAD_ID).sum())
    engine, found = Engine(config_of("t5_v1_1_small", split, 8), mesh), Found()
    first, second = (part(batch, start, start + 2) for start in (mesh.dp_rank * 4, mesh.dp_rank * 4 + 2))
    before = weights_of(engine)
    for number, kind in enumerate(kinds, start=1):
        if kind == "left out":
            continue
        handle = None
        if kind != "good" and mesh.rank == mesh.world_size - 1:
            handle = poison(engine, float("nan" if kind == "loss" else "inf"), in_gradient=kind == "gradient")
        micro_batches: list[Batch] = [first, second]
        result = engine.train_step(micro_batches, n_target_tokens, number)
        if handle is not None:
            handle.remove()
        after = weights_of(engine)
        found.applied.append(result.applied)
        found.norms.append(result.grad_norm)
        found.moved.append(any(not torch.equal(before[name], after[name]) for name in after))
        before = after
    found.weights = before
    return found


def compare_runs(mesh: Mesh, splits: list[Split]) -> list[tuple[Found, Found]]:
    kinds = ["good", "loss", "gradient", "good"]
    without = [kind if kind == "good" else "left out" for kind in kinds]
    return [(train(mesh, split, kinds), train(mesh, split, without)) for split in splits]


@pytest.fixture(scope="module")
def runs() -> list[list[tuple[Found, Found]]]:
    return [list(ranks) for ranks in zip(*run_ranks(2, compare_runs, SPLITS), strict=True)]


@pytest.mark.parametrize("index", range(len(SPLITS)), ids=[name_of(split) for split in SPLITS])
def test_a_bad_update_is_as_if_it_had_not_been(index: int, runs: list[list[tuple[Found, Found]]]) -> None:
    for found, without in runs[index]:
        assert found.applied == [True, False, False, True]
        assert found.moved == found.applied
        assert [torch.tensor(norm).isfinite().item() for norm in found.norms] == found.applied
        assert all(norm > 0 for norm, applied in zip(found.norms, found.applied, strict=True) if applied)
        assert found.weights.keys() == without.weights.keys()
        for name, weight in found.weights.items():
            assert torch.equal(weight, without.weights[name]), name
