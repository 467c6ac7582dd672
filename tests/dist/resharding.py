"""Save in one layout, go on in another: shared by the tests and by `benchmarks/reshard.py`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_transformer.checkpoints.folder import TrainerState, latest_checkpoint
from dist_transformer.config import Config, build_config
from dist_transformer.data.token_ids import PAD_ID
from dist_transformer.engine.checkpoint import check_checkpoint, load_checkpoint
from dist_transformer.engine.engine import Engine
from dist_transformer.engine.saving import save_checkpoint
from dist_transformer.parallel import mesh as mesh_module
from dist_transformer.parallel.mesh import Mesh
from tests.dist.test_gradients import Split, config_of, part, rows_of

N_BEFORE, N_AFTER, N_ROWS = 3, 10, 8


@dataclass(frozen=True)
class Place:
    """A layout of a run."""

    tp: int
    dp: int
    stage: int
    precision: str = "fp32"
    offload: str = "none"
    preset: str = "modern_small"

    @property
    def world_size(self) -> int:
        return self.tp * self.dp

    def __str__(self) -> str:
        rest = [] if self.precision == "fp32" else [self.precision]
        rest += [] if self.offload == "none" else [f"offload-{self.offload}"]
        return "-".join([f"tp{self.tp}", f"dp{self.dp}", f"zero{self.stage}", *rest])


def configured(place: Place, run_dir: str, dropout: float = 0.0) -> Config:
    """Two key-value heads to share, or one that tensor-parallel ranks all have; every kind of sharded parameter."""
    split = Split(
        micro_batch_size=N_ROWS // place.dp,
        zero_stage=place.stage,
        precision=place.precision,
        offload=place.offload,
        tp_degree=place.tp,
    )
    tree = config_of(place.preset, split, N_ROWS).model_dump(mode="json")
    tree["run"]["dir"], tree["model"]["dropout"] = run_dir, dropout
    tree["model"] |= {"n_encoder_layers": 1, "n_decoder_layers": 1}
    tree["model"]["decoder"]["n_kv_heads"] = 1
    # A learning rate that moves weights, but not so fast that rounding grows to the fourth digit in ten steps.
    tree["optimizer"] |= {"name": "adamw_rms", "lr": 0.01}
    return build_config(tree)


def mesh_of(world: Mesh, tp: int) -> Mesh:
    """These ranks, shared out in another way. A collective."""
    if world.tp_size == tp:
        return world
    size = world.world_size
    return mesh_module._build_mesh(world.rank, size, world.local_rank, size // tp, tp, world.device)


def losses(engine: Engine, steps: range) -> list[float]:
    """Each step's loss over the global batch. A collective."""
    batch, mesh = rows_of(packed=False), engine.mesh
    n_target_tokens = int((batch.decoder_target_tokens != PAD_ID).sum())
    share, size = N_ROWS // mesh.dp_size, engine.config.train.micro_batch_size
    starts = range(mesh.dp_rank * share, (mesh.dp_rank + 1) * share, size)
    micro_batches = [part(batch, start, start + size) for start in starts]
    found = []
    for step in steps:
        loss = engine.train_step(micro_batches, n_target_tokens, step).sums[:1].clone()
        dist.all_reduce(loss, group=mesh.dp_group)
        found.append(float(loss) / n_target_tokens)
    return found


def save_there(world: Mesh, place: Place, run_dir: str) -> list[float]:
    """Train, save, and go on: the losses after the save."""
    engine = Engine(configured(place, run_dir), mesh_of(world, place.tp))
    losses(engine, range(1, N_BEFORE + 1))
    save_checkpoint(engine, TrainerState(step=N_BEFORE))
    return losses(engine, range(N_BEFORE + 1, N_BEFORE + N_AFTER + 1))


def resume_here(world: Mesh, place: Place, run_dir: str) -> list[float]:
    """Go on in this layout from what another one has saved: the losses after it."""
    path = latest_checkpoint(Path(run_dir))
    assert path is not None
    mesh = mesh_of(world, place.tp)
    config = configured(place, run_dir)
    check_checkpoint(path, config, mesh)
    engine = Engine(config, mesh)
    assert load_checkpoint(engine, path).step == N_BEFORE
    return losses(engine, range(N_BEFORE + 1, N_BEFORE + N_AFTER + 1))


def save_all(world: Mesh, places: list[Place], folder: str) -> dict[str, list[float]]:
    """Every place's losses after its save. A collective."""
    return {
        f"{place.preset}-{place}": save_there(world, place, f"{folder}/{place.preset}-{place}")
        for place in places
    }


def resume_all(world: Mesh, crossings: list[tuple[Place, Place]], folder: str) -> list[list[float]]:
    """Every crossing's losses in its target. A collective."""
    return [resume_here(world, target, f"{folder}/{source.preset}-{source}") for source, target in crossings]


def largest_difference(expected: list[float], found: list[float]) -> float:
    """Relative, over all steps."""
    assert len(expected) == len(found) == N_AFTER
    return max(abs(a - b) / abs(a) for a, b in zip(expected, found, strict=True))


def same_layout_with_dropout(world: Mesh, place: Place, run_dir: str) -> tuple[list[float], list[float], Any]:
    """(losses after a save, losses after resuming in the same layout, those with another seed)."""
    mesh, config = mesh_of(world, place.tp), configured(place, run_dir, dropout=0.2)
    engine = Engine(config, mesh)
    losses(engine, range(1, N_BEFORE + 1))
    path = save_checkpoint(engine, TrainerState(step=N_BEFORE))
    steps = range(N_BEFORE + 1, N_BEFORE + N_AFTER + 1)
    expected = losses(engine, steps)
    resumed = Engine(config, mesh)
    torch.manual_seed(99)
    load_checkpoint(resumed, path)
    found = losses(resumed, steps)
    load_checkpoint(resumed, path)
    torch.manual_seed(99)
    return expected, found, losses(resumed, steps)
